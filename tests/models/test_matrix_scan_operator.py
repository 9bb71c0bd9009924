"""The matrix scan as a torch operator: opcheck, torch.compile, autocast, backends, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_close, run_and_differentiate
from matrix_scan_cases import Case, random_case
from torch import Tensor

import minrnn.models.matrix_scan as matrix_scan_module
from minrnn.models.boundaries import Boundaries
from minrnn.models.matrix_scan import matrix_scan
from minrnn.models.operators import namespace

backends = pytest.mark.parametrize("backend", ["reference", "torch"])


def operator(name: str):
    return getattr(getattr(torch.ops, namespace(matrix_scan_module.__file__)), name).default


def case_of(time: int, heads: int = 2, decay: str = "channel", dtype: torch.dtype = torch.float32) -> Case:
    return random_case(1, (2, time, heads, 3, 5), decay=decay, kind="long", dtype=dtype)


def run(case: Case, backend: str | None) -> tuple[Tensor, Tensor]:
    return matrix_scan(*case.tensors.values(), boundaries=case.boundaries, backend=backend)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize(("time", "heads"), [(6, 2), (70, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(decay, time, heads, dtype):
    case = case_of(time, heads, decay, dtype)
    inputs = [tensor.requires_grad_() for tensor in case.tensors.values()]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.library.opcheck(operator("matrix_scan_torch"), tuple(inputs), atol=tolerance, rtol=tolerance)
    gradients = torch.randn_like(case.v), torch.randn_like(inputs[-1])
    torch.library.opcheck(
        operator("matrix_scan_backward_torch"),
        (*(tensor.detach() for tensor in inputs), *gradients),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_without_a_graph_break():
    def function(*inputs: Tensor) -> Tensor:
        y, last = matrix_scan(*inputs)
        return (y * inputs[2]).sum() + (last**2).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = case_of(9).tensors.values()
    for actual, expected in zip(
        run_and_differentiate(compiled, *inputs), run_and_differentiate(function, *inputs), strict=True
    ):
        assert_close(actual, expected, atol=1e-6)


@backends
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_autocast_has_no_effect(backend, decay):
    inputs = case_of(9, decay=decay).tensors.values()

    def function(*inputs: Tensor) -> Tensor:
        y, last = matrix_scan(*inputs, backend=backend)
        return (y**2).sum() + (last**2).sum()

    expected = run_and_differentiate(function, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_and_differentiate(function, *inputs)
    assert all(torch.equal(value, other) for value, other in zip(actual, expected, strict=True))


@backends
@pytest.mark.parametrize("time", [0, 1, 5])
def test_inputs_stay_and_outputs_are_new(backend, time):
    case = random_case(1, (2, time, 1, 3, 4), with_starts=True, with_lengths=True)
    before = [tensor.clone() for tensor in case.tensors.values()]
    for output in run(case, backend):
        output.fill_(7)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(case.tensors.values(), before, strict=True))


def test_one_token_runs_plain_operations(monkeypatch):
    def refuse(*_):
        raise AssertionError("the operator was called")

    monkeypatch.setattr(matrix_scan_module, "_torch_scan", refuse)
    run(case_of(1), None)
    with pytest.raises(AssertionError, match="the operator was called"):
        run(case_of(2), None)


def test_forward_mode_is_refused():
    case = case_of(4)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="matrix_scan_torch has no forward-mode derivative"),
    ):
        run(replace(case, q=torch.autograd.forward_ad.make_dual(case.q, case.q)), "torch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"k": torch.ones(2, 3, 4)},
            r"k \[batch, time, heads, K\] .* but got \(2, 3, 4\) and \(2, 7, 2, 5\)",
        ),
        ({"q": torch.ones(2, 7, 2, 4)}, r"q of shape \(2, 7, 2, 3\), but got \(2, 7, 2, 4\)"),
        ({"v": torch.ones(2, 6, 2, 5)}, r"v of shape \(2, 7, 2, 5\), but got \(2, 6, 2, 5\)"),
        (
            {"log_decay": torch.zeros(2, 7, 2, 2)},
            r"log_decay of shape \(2, 7, 2, 3\) or \(2, 7, 2, 1\), but got \(2, 7, 2, 2\)",
        ),
        ({"state": torch.ones(2, 2, 5, 3)}, r"state of shape \(2, 2, 3, 5\), but got \(2, 2, 5, 3\)"),
        (
            {"boundaries": Boundaries(torch.ones(2, 6, dtype=torch.bool))},
            r"document_starts of shape \(2, 7\)",
        ),
        ({"boundaries": Boundaries(lengths=torch.ones(3))}, r"lengths of shape \(2,\), but got \(3,\)"),
        ({"boundaries": Boundaries(torch.ones(2, 7))}, "document_starts as bool, but got torch.float32"),
        ({"q": torch.ones(2, 7, 2, 3, dtype=torch.int64)}, "floating-point tensors, but q is torch.int64"),
        ({"q": torch.ones(2, 7, 2, 3, device="meta")}, "on one device, but q is on meta and k on cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(case_of(7), **changes), None)


def test_unknown_backends_are_refused():
    with pytest.raises(
        ValueError, match="no backend 'numba' of the matrix scan; choose one of reference, torch, fla"
    ):
        run(case_of(3), "numba")
