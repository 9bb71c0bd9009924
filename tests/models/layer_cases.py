"""Inputs of norm, convolution and gated activation, their results with gradients, and the comparison."""

from collections.abc import Callable

import pytest
import torch
from helpers import generator
from hypothesis import strategies as st
from torch import Tensor

from minrnn.models.conv import causal_conv
from minrnn.models.layers import RMSNorm
from minrnn.models.layers_numba import ROWS

# dtypes of (input, output): alone, and under an autocast that the matrix product after a norm will be in
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32-bf16": (torch.float32, torch.bfloat16),
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
norm_dtypes = pytest.mark.parametrize("kind", DTYPES)

# Tolerances: fp32 arithmetic of a few operations (sums over a row or over tokens: relative to what is
# summed), and one rounding of the result to nearest, half a unit in the last place.
FP32 = 1e-6
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}

row_counts = st.sampled_from([0, 1, 2, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 7])
widths = st.sampled_from([1, 2, 3, 15, 16, 17, 70])
Results = dict[str, Tensor]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def outputs_and_gradients(function: Callable[..., Tensor], **leaves: Tensor) -> Results:
    """y, and the gradients of a sum of it weighted by bf16 numbers."""
    tensors = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    y = function(**tensors)
    weights = torch.randint(-8, 9, y.shape, generator=generator(99)) / 4
    loss = (y * weights.to(y.dtype)).double().sum() + sum(
        (0 * leaf.double()).sum() for leaf in tensors.values()
    )
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return {"y": y.detach()} | {
        f"d_{name}": gradient for name, gradient in zip(tensors, gradients, strict=True)
    }


def doubled(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def assert_results(
    actual: Results, expected: Results, dtypes: dict[str, torch.dtype], **sizes: Tensor
) -> None:
    """Each within half a unit of its dtype, and FP32 of the `sizes` of its terms, which may cancel."""
    assert {name: value.dtype for name, value in actual.items()} == dtypes
    for name, exact in expected.items():
        assert actual[name].shape == exact.shape, name
        error, bound = (
            (actual[name].double() - exact).abs(),
            FP32 * sizes[name] + HALF_UNIT[dtypes[name]] * exact.abs(),
        )
        assert (error <= bound).all(), (
            f"{name}: off by {error.max():.3g}, {(error / bound).max():.3g} times the bound"
        )


def assert_same_bits(actual: Results, expected: Results) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def norm_of(backend: str | None = None, eps: float = 1e-6) -> Callable[..., Tensor]:
    """RMSNorm as a function of x and its weight."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(RMSNorm(weight.numel(), eps, backend), {"weight": weight}, (x,))

    return function


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def conv_of(backend: str | None = None, reach: Tensor | None = None) -> Callable[..., Tensor]:
    return lambda x, weight, state=None: causal_conv(x, weight, state, reach, backend)


def random_conv_inputs(
    seed: int, dtype: torch.dtype, batch: int, time: int, width: int, kernel: int
) -> dict[str, Tensor]:
    x, state = (
        draw(seed, batch, time, width, dtype=dtype),
        draw(seed + 1, batch, kernel - 1, width, dtype=dtype),
    )
    return {"x": x, "weight": draw(seed + 2, width, kernel), "state": state}
