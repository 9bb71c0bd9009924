"""cell_scan as a torch operator: opcheck, torch.compile, the meta device, kernels on disk, errors."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from cell_scan_cases import DEFAULT, few_cases, random_boundaries, random_inputs
from helpers import assert_close, generator
from torch import Tensor

import minrnn.models.cell_scan as cell_scan_module
import minrnn.models.cell_scan_numba as kernels
from minrnn.models.block import MinRNNBlock
from minrnn.models.boundaries import Boundaries
from minrnn.models.cell_scan import cell_scan, cell_scan_with_decay
from minrnn.models.cell_spec import CellSpec, empty_rows
from minrnn.models.configuration_minrnn import MinRNNConfig
from minrnn.models.operators import namespace


def operator(name: str):
    return getattr(getattr(torch.ops, namespace(cell_scan_module.__file__)), name).default


@few_cases
@pytest.mark.parametrize("time", [0, 6])
@pytest.mark.parametrize("plain", [True, False])
def test_opcheck(spec, dtype, time, plain):
    """Schema, fake tensors, autograd registration, dynamic shapes; outputs alias no input."""
    arguments = random_inputs(13, spec, dtype, (2, time, 5))
    for tensor in arguments:
        tensor.requires_grad_()
    boundaries = random_boundaries(13, 2, time, not plain, not plain)
    where = boundaries.document_starts, boundaries.lengths, empty_rows(arguments[2], spec)
    options = dataclasses.astuple(spec)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.library.opcheck(
        operator("cell_scan_numba"),
        (*arguments, *where, *options, not plain),
        atol=tolerance,
        rtol=tolerance,
    )
    projected, gate_bias, h0 = (tensor.detach() for tensor in arguments)
    h, grad_last = torch.randn(2, time, 5).to(dtype), torch.randn(2, 5)
    backward_arguments = (
        projected,
        gate_bias,
        h0,
        *where,
        h,
        torch.randn_like(h),
        grad_last,
        *options,
    )
    torch.library.opcheck(
        operator("cell_scan_backward_numba"),
        backward_arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(("autocast", "backend"), [(False, "inductor"), (True, "aot_eager")])
def test_a_compiled_block_is_the_same(autocast, backend):
    """torch.compile without a graph break through our operators, into C++ around them."""
    torch.manual_seed(0)
    config = MinRNNConfig(hidden_size=16, intermediate_size=24)
    block = MinRNNBlock(config, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    where = Boundaries.of(
        torch.rand(2, 11, generator=generator(1)) < 0.2, torch.tensor([11, 7]), config.conv_kernel
    )
    x, h0 = (
        torch.randn(2, 11, 16, generator=generator(2)),
        torch.randn(2, config.recurrent_size, generator=generator(3)),
    )

    def differentiate(function) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, h_last, _ = function(leaf, h0, None, where)
        loss = (y[0] ** 2).sum() + (y[1, :7] ** 2).sum() + (h_last**2).sum()
        return [y[0], y[1, :7], h_last, *torch.autograd.grad(loss, [leaf, *block.parameters()])]

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for value, other in zip(differentiate(compiled), differentiate(block), strict=True):
        assert_close(value, other, atol=0.02 if autocast else 2e-6)


def test_the_meta_device_gets_shapes():
    projected, gate_bias, h0 = (
        tensor.to("meta") for tensor in random_inputs(14, DEFAULT, torch.bfloat16, (2, 5, 3))
    )
    y, h_last, decay = cell_scan_with_decay(projected, gate_bias, h0, spec=DEFAULT)
    assert (y.shape, y.dtype, h_last.shape, h_last.dtype, decay.shape) == (
        (2, 5, 3),
        torch.bfloat16,
        (2, 3),
        torch.float32,
        (2, 3),
    )


def test_kernels_capture_only_numbers():
    """numba keys kernels on disk by captured values, and a captured kernel differs in every process."""
    for make in (kernels._forward_kernel, kernels._backward_kernel):
        kernel: Any = make(0, 0, False)
        assert all(isinstance(captured.cell_contents, int) for captured in kernel.py_func.__closure__), (
            make.__name__
        )


def refused(message: str, **changes: Any) -> None:
    """cell_scan raises `message` when these arguments, fields of the spec or boundaries are changed."""
    spec = {"cell": "mingru", "activation": "none", "output_gate": False}
    projected, gate_bias, h0 = random_inputs(15, CellSpec(**spec), torch.float32, (2, 3, 4))
    arguments = {"projected": projected, "gate_bias": gate_bias, "h0": h0, "backend": None}
    boundaries = {"document_starts": None, "lengths": None}
    for group in (spec, arguments, boundaries):
        group |= {name: changes.pop(name) for name in group.keys() & changes.keys()}
    assert not changes
    with pytest.raises(ValueError, match=re.escape(message)):
        cell_scan(**arguments, spec=CellSpec(**spec), boundaries=Boundaries(**boundaries))


def test_shapes_that_do_not_fit_are_refused():
    takes = (
        "cell_scan takes projected [batch, time, 2 * width] and gate_bias [1, width] for 'mingru', but got"
    )
    refused(f"{takes} (2, 3, 7) and (1, 4).", projected=torch.ones(2, 3, 7))
    refused(f"{takes} (3, 8) and (1, 4).", projected=torch.ones(3, 8))
    refused(f"{takes} (2, 3, 8) and (2, 4).", gate_bias=torch.ones(2, 4))
    refused(f"{takes} (2, 3, 8) and (4,).", gate_bias=torch.ones(4))
    takes = (
        "cell_scan takes projected [batch, time, 3 * width] and gate_bias [1, width] "
        "for 'mingru' with an output gate, but got"
    )
    refused(f"{takes} (2, 3, 8) and (1, 4).", output_gate=True)
    refused("cell_scan takes h0 of shape (2, 4), but got (1, 4).", h0=torch.ones(1, 4))
    refused(
        "cell_scan takes document_starts of shape (2, 3), but got (2, 4).",
        document_starts=torch.zeros(2, 4, dtype=torch.bool),
    )
    refused(
        "cell_scan takes document_starts as bool, but got torch.int64.",
        document_starts=torch.zeros(2, 3, dtype=torch.int64),
    )
    refused("cell_scan takes lengths of shape (2,), but got (3,).", lengths=torch.ones(3, dtype=torch.int64))


def test_names_and_devices_that_do_not_fit_are_refused():
    refused(
        "There is no cell 'lstm'; choose one of mingru, minlstm, mingru_signed, minlstm_signed, "
        "mingru_normalized, minlstm_normalized, hgrn, rglru.",
        cell="lstm",
    )
    refused("There is no candidate activation 'relu'; choose one of g, none, tanh, silu.", activation="relu")
    refused(
        "There is no scan backend 'cuda'; choose one of reference, torch, numba, triton, "
        "or none for the fastest here.",
        backend="cuda",
    )
    for name, tensor in (
        ("h0", torch.ones(2, 4)),
        ("gate_bias", torch.ones(1, 4)),
        ("document_starts", torch.ones(2, 3, dtype=torch.bool)),
        ("lengths", torch.ones(2, dtype=torch.int64)),
    ):
        message = f"The scan takes tensors on one device, but {name} is on meta and the others on cpu."
        refused(message, **{name: tensor.to("meta")})
