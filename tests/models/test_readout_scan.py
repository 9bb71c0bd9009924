"""The CPU's readout scan against its composition in fp64: values, gradients, boundaries, cuts, threads."""

import itertools
from collections.abc import Callable

import pytest
import torch
from cell_scan_cases import random_boundaries, real_tokens
from helpers import assert_close, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import minrnn.models.readout_scan as readout_scan_module
from minrnn.models.boundaries import NO_BOUNDARIES, Boundaries
from minrnn.models.bounded_scans import BoundedScans
from minrnn.models.operators import namespace

FP32 = 2e-6  # of the largest: a few roundings of 2^-24, which add up over the length of the memory
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
NAMES = ("a", "theta", "weight", "u", "h0")
dtypes = pytest.mark.parametrize("dtype", list(HALF_UNIT))


def random_inputs(seed: int, dtype: torch.dtype, batch: int, time: int, width: int, states: int = 3):
    """a, theta, weight, u (in dtype) and h0, as `BoundedScans.readout` takes them; 0 in h0's second row."""
    random = generator(seed)
    h0 = torch.randn(batch, 2 * width * states, generator=random)
    h0[1:2] = 0
    return (
        0.5 + 0.5 * torch.rand(width, states, generator=random),
        4 * torch.randn(width, states, generator=random),
        torch.randn(2, width, states, generator=random),
        torch.randn(batch, time, width, generator=random).to(dtype),
        h0,
    )


def readout(boundaries: Boundaries = NO_BOUNDARIES, backend: str | None = "numba") -> Callable:
    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        y, last, _ = BoundedScans(boundaries, backend, None).readout(*tensors)
        return y, last

    return scan


def in_pieces(edges: list[int], boundaries: Boundaries) -> Callable:
    """The scan over [low, high) between neighbouring edges, the state handed over."""
    starts, lengths = boundaries.document_starts, boundaries.lengths

    def scan(a: Tensor, theta: Tensor, weight: Tensor, u: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        pieces = []
        for low, high in itertools.pairwise(edges):
            piece = Boundaries(
                starts if starts is None else starts[:, low:high],
                lengths if lengths is None else (lengths - low).clamp(0, high - low),
            )
            y, h0 = readout(piece)(a, theta, weight, u[:, low:high], h0)
            pieces.append(y)
        return torch.cat(pieces, dim=1), h0

    return scan


def outputs_and_gradients(scan: Callable, tensors: tuple[Tensor, ...], lengths: Tensor | None) -> dict:
    """y (0 at padding), last, and the gradients of their weighted sum."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y, last = scan(*leaves)
    y = y.where(real_tokens(y.shape[0], y.shape[1], lengths), 0)
    weights = [torch.randn(x.shape, generator=generator(5)).to(x.dtype) for x in (y, last)]
    loss = (y * weights[0]).sum() + (last * weights[1]).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return {"y": y.detach(), "last": last.detach()} | dict(zip(NAMES, gradients, strict=True))


shapes = st.tuples(st.integers(1, 3), st.integers(0, 40), st.sampled_from([1, 2, 15, 16, 17, 33]))


@dtypes
@settings(max_examples=25)
@given(shape=shapes, starts=st.booleans(), lengths=st.booleans(), seed=st.integers(0, 2**20))
def test_values_and_gradients(dtype, shape, starts, lengths, seed):
    tensors = random_inputs(seed, dtype, *shape)
    boundaries = random_boundaries(seed, shape[0], shape[1], starts, lengths)
    actual = outputs_and_gradients(readout(boundaries), tensors, boundaries.lengths)
    exact = tuple(tensor.double() for tensor in tensors)
    expected = outputs_and_gradients(readout(boundaries, "reference"), exact, boundaries.lengths)
    for name, value in actual.items():
        assert value.dtype == (dtype if name == "u" else torch.float32), name
        rounding = HALF_UNIT[dtype] if name == "u" else 0.0
        atol = 10 * FP32 if name in ("a", "theta") else FP32  # sums over all tokens of a derivative
        assert_close(value, expected[name], atol=atol, rtol=rounding, name=name)


@dtypes
@settings(max_examples=10)
@given(
    cuts=st.lists(st.integers(0, 20), max_size=4),
    starts=st.booleans(),
    lengths=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_cuts_change_no_bit(dtype, cuts, starts, lengths, seed):
    """But for the order in which the gradients of parameters are summed."""
    tensors = random_inputs(seed, dtype, 2, 20, 17)
    where = random_boundaries(seed, 2, 20, starts, lengths)
    actual, whole = (
        outputs_and_gradients(in_pieces(edges, where), tensors, where.lengths)
        for edges in ([0, *sorted(cuts), 20], [0, 20])
    )
    for name in ("y", "last", "u", "h0"):
        assert torch.equal(actual[name], whole[name]), name
    for name in ("a", "theta", "weight"):
        assert_close(actual[name], whole[name], atol=1e-5, name=name)


@dtypes
def test_a_start_drops_the_state_and_a_pad_drops_the_token(dtype):
    """NaN before a document start or behind a row's end is not read; it is not multiplied by 0 either."""
    *parameters, u, h0 = random_inputs(6, dtype, 2, 9, 17)
    starts, lengths = torch.zeros(2, 9, dtype=torch.bool), torch.tensor([9, 6])
    starts[0, 4] = True
    broken, state = u.clone(), h0.clone()
    broken[0, :4] = broken[1, 6:] = torch.nan
    state[0] = torch.inf
    scan = readout(Boundaries(starts, lengths))
    actual, expected = scan(*parameters, broken, state), scan(*parameters, u, h0)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0][0, 4:], expected[0][0, 4:])
    assert torch.equal(actual[0][1, :6], expected[0][1, :6])


def test_long_memory_is_kept():
    """A memory of 10,000 tokens and a slow turn: sums and their derivatives stay near fp64."""
    memory, time = 1e4, 20_000
    a, theta = torch.full((2, 1), 1 - 1 / memory), torch.tensor([[1e-4], [2.5]])
    tensors = (a, theta, torch.ones(2, 2, 1), torch.randn(1, time, 2, generator=generator(0)) + 1)
    tensors += (torch.zeros(1, 4),)
    actual = outputs_and_gradients(readout(), tensors, None)
    expected = outputs_and_gradients(readout(backend="torch"), tuple(x.double() for x in tensors), None)
    for name, value in actual.items():  # each decay is rounded once: by 2^-25 of 1
        assert_close(value, expected[name], atol=2 * memory * 2**-24, name=name)


@pytest.mark.parametrize(("batch", "time", "width"), [(1, 21, 70), (3, 33, 130)])
def test_threads_change_no_bit(batch, time, width):
    tensors, results = random_inputs(10, torch.bfloat16, batch, time, width), []
    boundaries = random_boundaries(10, batch, time, True, True)
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        results.append(outputs_and_gradients(readout(boundaries), tensors, boundaries.lengths))
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


@dtypes
@pytest.mark.parametrize("plain", [True, False])
def test_opcheck(dtype, plain):
    """Schema, fake tensors, autograd registration, dynamic shapes; outputs alias no input."""
    boundaries = random_boundaries(13, 2, 6, not plain, not plain)
    pairs, random = (2, 3, 5), generator(0)
    decay, weight = (0.5 * torch.randn(pairs, generator=random) for _ in range(2))
    tensors = (torch.randn(2, 6, 5, generator=random).to(dtype), decay, weight)
    tensors += (torch.randn(2, *pairs, generator=random),)
    where = boundaries.document_starts, boundaries.lengths
    operators = getattr(torch.ops, namespace(readout_scan_module.__file__))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.library.opcheck(operators.readout_scan.default, (*leaves, *where), atol=tolerance, rtol=tolerance)
    gradients = torch.randn(2, 6, 5), torch.randn(2, *pairs)
    torch.library.opcheck(
        operators.readout_scan_backward.default,
        (*tensors, *where, *gradients),
        test_utils=("test_schema", "test_faketensor"),
    )
