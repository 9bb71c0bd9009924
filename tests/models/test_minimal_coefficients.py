"""The cells against their formulas in fp64."""

import pytest
import torch
from helpers import assert_close, generator
from torch import Tensor

from minrnn.models.minimal_coefficients import (
    CANDIDATE_ACTIVATIONS,
    MINIMAL_CELLS,
    candidate,
    mingru,
    minlstm,
)

activations = pytest.mark.parametrize("activation", CANDIDATE_ACTIVATIONS)
SIGNED = [name for name in MINIMAL_CELLS if name.endswith("_signed")]
NORMALIZED = [name for name in MINIMAL_CELLS if name.endswith("_normalized")]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


FORMULAS = {
    "g": lambda u: torch.where(u >= 0, u + 0.5, sigmoid(u)),
    "none": lambda u: u,
    "tanh": lambda u: (torch.exp(2 * u) - 1) / (torch.exp(2 * u) + 1),
    "silu": lambda u: u * sigmoid(u),
}


def pre_activations(num: int, scale: float = 6.0) -> list[Tensor]:
    random = generator(num)
    return [scale * torch.randn(2, 50, 8, generator=random, dtype=torch.float64) for _ in range(num)]


@activations
def test_candidate(activation):
    u = torch.cat([torch.linspace(-20, 20, 4001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    assert_close(candidate(u, activation), FORMULAS[activation](u), atol=1e-15)


@activations
def test_mingru(activation):
    k, u = pre_activations(2)
    a, b = mingru(k, u, activation)
    assert_close(a, 1 - sigmoid(k), atol=1e-15)
    assert_close(b, sigmoid(k) * FORMULAS[activation](u), atol=1e-15, rtol=1e-14)


@activations
def test_minlstm(activation):
    p, q, u = pre_activations(3)
    f, i = sigmoid(p), sigmoid(q)
    a, b = minlstm(p, q, u, activation)
    assert_close(a, f / (f + i), atol=1e-14)
    assert_close(b, i / (f + i) * FORMULAS[activation](u), atol=1e-14)


@pytest.mark.parametrize("name", MINIMAL_CELLS)
@activations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(name, activation, dtype):
    """a is at least fp32 and computed in it; b is the rounded result of the fp32 computation."""
    cell = MINIMAL_CELLS[name]
    arguments = [x.to(dtype) for x in pre_activations(cell.num_gates + 1)]
    a, b = cell.coefficients(*arguments, activation)
    exact_a, exact_b = cell.coefficients(*(x.double() for x in arguments), activation)
    assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert b.dtype == dtype
    assert_close(a, exact_a, atol=4e-7 if name in SIGNED else 2e-7)
    assert_close(b, exact_b, atol=2e-7, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("name", MINIMAL_CELLS)
@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_pre_activations(name, activation, dtype):
    """a in [0, 1], signed in [-1, 1], no NaN, finite gradients for all combinations of 0, +-90 and +-1e4."""
    cell = MINIMAL_CELLS[name]
    extremes = torch.tensor([0.0, 90.0, -90.0, 1e4, -1e4], dtype=dtype)
    arguments = [
        x.clone().requires_grad_() for x in torch.meshgrid(*[extremes] * (cell.num_gates + 1), indexing="ij")
    ]
    a, b = cell.coefficients(*arguments, activation)
    assert ((a >= (-1 if name in SIGNED else 0)) & (a <= 1)).all()
    assert b.isfinite().all()
    for gradient in torch.autograd.grad(a.sum() + b.sum(), arguments):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in MINIMAL_CELLS if name not in SIGNED])
@pytest.mark.parametrize("gate", [-12.0, -9.0, 9.0, 12.0, 40.0, 80.0])
def test_long_and_short_memories_keep_their_digits(name, gate):
    """In fp32, a is exact to the last place near 1 (a memory of exp(12) tokens), and relatively near 0.

    So is 1 - a, in b.
    """
    one = torch.ones(1, 1, 1)
    gates = [one * gate] if name.startswith("mingru") else [one * -gate, one * gate]
    a, b = MINIMAL_CELLS[name].coefficients(*gates, one, "none")
    exact_a, exact_b = MINIMAL_CELLS[name].coefficients(*(x.double() for x in gates), one.double(), "none")
    assert (a.double() - exact_a).abs() <= 2**-24  # half a unit just below 1
    assert_close(a, exact_a, atol=0, rtol=1e-5)  # sigmoid(-k) for k = 80 is 2e-35: 1 - sigmoid(k) would be 0
    assert_close(b, exact_b, atol=0, rtol=1e-5)


@pytest.mark.parametrize("name", MINIMAL_CELLS)
def test_gate_bias_gives_the_memory_lengths(name):
    cell = MINIMAL_CELLS[name]
    memory = torch.logspace(0.302, 5, 64, dtype=torch.float64)
    biases = cell.gate_bias(memory)
    assert biases.shape == (cell.num_gates, 64)
    a, _ = cell.coefficients(*biases, torch.zeros(64, dtype=torch.float64), "none")
    assert_close(1 / (1 - a), memory, atol=0, rtol=1e-9)


@pytest.mark.parametrize("name", NORMALIZED)
@activations
def test_a_normalized_cell_scales_its_input_by_the_root(name, activation):
    """The decay is that of the plain cell, and b is sqrt(1 - a^2) c(u)."""
    cell, plain = MINIMAL_CELLS[name], MINIMAL_CELLS[name.removesuffix("_normalized")]
    arguments = [x.double() for x in pre_activations(cell.num_gates + 1)]
    a, b = cell.coefficients(*arguments, activation)
    plain_a, _ = plain.coefficients(*arguments, activation)
    assert torch.equal(a, plain_a)
    assert_close(b, (1 - a.square()).sqrt() * candidate(arguments[-1], activation), atol=1e-13, rtol=1e-6)


@pytest.mark.parametrize("name", NORMALIZED)
def test_a_normalized_cell_keeps_the_variance_of_its_input(name):
    """The state of independent inputs has their variance, for memories of 2 to 1,000 tokens."""
    memory = torch.tensor([2.0, 16.0, 128.0, 1000.0], dtype=torch.float64)
    cell = MINIMAL_CELLS[name]
    gates = [bias.expand(1, 1, -1) for bias in cell.gate_bias(memory)]
    a, b = cell.coefficients(*gates, torch.ones(1, 1, 4, dtype=torch.float64), "none")
    assert_close(b.square() / (1 - a.square()), torch.ones_like(a), atol=1e-9)


@pytest.mark.parametrize("name", SIGNED)
@activations
def test_a_signed_cell_stretches_the_decay(name, activation):
    """a in (-1, 1) is 2 a - 1 of the unsigned cell; b is the same."""
    cell, plain = MINIMAL_CELLS[name], MINIMAL_CELLS[name.removesuffix("_signed")]
    arguments = [x.double() for x in pre_activations(cell.num_gates + 1)]
    a, b = cell.coefficients(*arguments, activation)
    plain_a, plain_b = plain.coefficients(*arguments, activation)
    assert_close(a, 2 * plain_a - 1, atol=1e-15)
    assert torch.equal(b, plain_b)
    assert a.min() < -0.5 < 0.5 < a.max()
