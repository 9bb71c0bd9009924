"""Norm, convolution and gated activation as torch operators: opcheck, the meta device, errors."""

import re

import pytest
import torch
from helpers import generator
from torch import Tensor

import minrnn.models.conv as conv_module
import minrnn.models.layers as layers_module
from minrnn.models.conv import causal_conv
from minrnn.models.layers import RMSNorm, swiglu
from minrnn.models.operators import namespace


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(sum(shape)))


def operators() -> list:
    """(operator, arguments): all operators of layers.py and conv.py, forward ones with gradients."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        x, gates, weight, inverse = draw(2, 5, 6).to(dtype), draw(2, 5, 6).to(dtype), draw(6), draw(10).abs()
        taps, state, reach = (
            draw(6, 4),
            draw(2, 3, 6).to(dtype),
            torch.randint(0, 4, (2, 5), generator=generator(17)),
        )
        wide = x.transpose(0, 2).contiguous().transpose(0, 2)
        cases += [
            (layers_module, "rms_norm", (x, weight, 1e-6, dtype)),
            (layers_module, "rms_norm", (wide, weight, 1e-6, torch.bfloat16)),
            (layers_module, "rms_norm_backward", (wide, weight, inverse, x)),
            (layers_module, "swiglu", (wide,)),
            (layers_module, "swiglu_backward", (gates, wide[..., :3])),
            (conv_module, "causal_conv", (wide, taps, state, reach)),
            (conv_module, "causal_conv", (x[:, :0], taps, state, None)),
            (conv_module, "causal_conv_backward", (x, taps, state, reach, wide)),
        ]
    return cases


@pytest.mark.parametrize(("module", "name", "arguments"), operators())
def test_opcheck(module, name, arguments):
    """Schema, fake tensors, autograd registration, dynamic shapes; outputs alias no input."""
    operator, is_backward = (
        getattr(getattr(torch.ops, namespace(module.__file__)), name).default,
        name.endswith("_backward"),
    )
    tensors = [
        value.clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value
        for value in arguments
    ]
    if is_backward:
        torch.library.opcheck(operator, tuple(tensors), test_utils=("test_schema", "test_faketensor"))
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    torch.library.opcheck(operator, tuple(tensors), atol=1e-2, rtol=1e-2)


def test_the_meta_device_gets_shapes():
    x = torch.empty(2, 5, 6, device="meta")
    norm = RMSNorm(6, 1e-6).to("meta")
    assert norm(x).shape == causal_conv(x, torch.empty(6, 4, device="meta")).shape == (2, 5, 6)
    assert swiglu(x).shape == (2, 5, 3)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_shapes_that_do_not_fit_are_refused(backend):
    x, weight = torch.ones(2, 5, 7), torch.ones(7, 4)
    for message, call in (
        ("RMSNorm takes [..., 8], but got (2, 5, 7).", lambda: RMSNorm(8, 1e-6, backend)(x)),
        (
            "swiglu takes gate and up side by side, [..., 2 * width], but got (2, 5, 7).",
            lambda: swiglu(x, backend),
        ),
        (
            "causal_conv takes weight of shape (7, 4) here, but got (8, 4).",
            lambda: causal_conv(x, torch.ones(8, 4), backend=backend),
        ),
        (
            "causal_conv takes state of shape (2, 3, 7) here, but got (2, 4, 7).",
            lambda: causal_conv(x, weight, torch.ones(2, 4, 7), backend=backend),
        ),
        (
            "causal_conv takes reach of shape (2, 5) here, but got (2, 4).",
            lambda: causal_conv(x, weight, None, torch.ones(2, 4), backend),
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
