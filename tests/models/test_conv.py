"""The causal convolution against torch's, whole and cut, packed and separate."""

import itertools

import torch
from helpers import assert_close, generator, run_and_differentiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minrnn.models.boundaries import reach_within_document
from minrnn.models.conv import causal_conv, next_conv_state

KERNELS = st.integers(2, 7)


def torch_conv(x: Tensor, weight: Tensor, state: Tensor | None = None) -> Tensor:
    """Depthwise conv1d over [state, x]; x [batch, time, width], weight [width, kernel]."""
    width, kernel = weight.shape
    state = x.new_zeros(x.shape[0], kernel - 1, width) if state is None else state
    extended = torch.cat([state, x], dim=1).transpose(1, 2)
    if x.shape[1] == 0:
        return x
    return torch.nn.functional.conv1d(extended, weight.unsqueeze(1), groups=width).transpose(1, 2)


def problem(
    seed: int, time: int, kernel: int, batch: int = 2, width: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, state in fp64."""
    random = generator(seed)
    shapes = (batch, time, width), (width, kernel), (batch, kernel - 1, width)
    x, weight, state = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return x, weight, state


@settings(max_examples=40)
@given(time=st.integers(0, 20), kernel=KERNELS, with_state=st.booleans())
def test_is_a_depthwise_convolution(time, kernel, with_state):
    x, weight, state = problem(time, time, kernel)
    probe = torch.randn(x.shape, generator=generator(99), dtype=torch.float64)
    leaves = (x, weight, state) if with_state else (x, weight)
    actual = run_and_differentiate(
        lambda *args: (causal_conv(*args) * probe).sum() + 0 * sum(arg.sum() for arg in args), *leaves
    )
    expected = run_and_differentiate(
        lambda *args: (torch_conv(*args) * probe).sum() + 0 * sum(arg.sum() for arg in args), *leaves
    )
    for value, other in zip(actual, expected, strict=True):
        assert_close(value, other, atol=1e-14)


@settings(max_examples=80)
@given(
    time=st.integers(0, 20),
    kernel=KERNELS,
    cuts=st.lists(st.integers(0, 20), max_size=5),
    starts=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 19)), max_size=6),
)
def test_documents_and_cuts_are_exact(time, kernel, cuts, starts):
    """Packed documents in pieces, most of them shorter than the kernel = each document alone and whole."""
    x, weight, _ = problem(time, time, kernel)
    document_starts = torch.zeros(2, time, dtype=torch.bool)
    for row, position in starts:
        if position < time:
            document_starts[row, position] = True

    edges, state, pieces = [0, *sorted(min(cut, time) for cut in cuts), time], None, []
    for low, high in itertools.pairwise(edges):
        piece, piece_starts = x[:, low:high], document_starts[:, low:high]
        mask = piece_starts if piece_starts.any() else None
        pieces.append(
            causal_conv(piece, weight, state, None if mask is None else reach_within_document(mask, kernel))
        )
        state = next_conv_state(piece, state, kernel, mask)
    y = torch.cat(pieces, dim=1)
    assert state is not None

    for row in range(2):
        bounds = [0, *(t for t in range(1, time) if document_starts[row, t]), time]
        documents = [x[row : row + 1, low:high] for low, high in itertools.pairwise(bounds)]
        assert_close(
            y[row : row + 1],
            torch.cat([torch_conv(document, weight) for document in documents], dim=1),
            atol=1e-14,
        )
        padded = torch.cat([x.new_zeros(1, kernel - 1, x.shape[2]), documents[-1]], dim=1)
        assert torch.equal(state[row], padded[0, padded.shape[1] - (kernel - 1) :]), "state"


@settings(max_examples=40)
@given(
    time=st.integers(1, 9),
    kernel=KERNELS,
    lengths=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 1000),
)
def test_state_is_taken_where_each_row_ends(time, kernel, lengths, seed):
    x, _, state = problem(seed, time, kernel)
    lengths = [min(length, time) for length in lengths]
    actual = next_conv_state(x, state, kernel, None, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        assert torch.equal(
            actual[row : row + 1], next_conv_state(x[row : row + 1, :length], state[row : row + 1], kernel)
        ), row


def test_packed_gradient_equals_that_of_separate_documents():
    x, weight, _ = problem(3, 17, 4)
    starts = torch.zeros(2, 17, dtype=torch.bool)
    starts[:, [0, 2, 3, 9]] = True
    taps = reach_within_document(starts, 4)
    probe = torch.randn(x.shape, generator=generator(98), dtype=torch.float64)

    def separate(x: Tensor, weight: Tensor) -> Tensor:
        pieces = [torch_conv(piece, weight) for piece in x.split([2, 1, 6, 8], dim=1)]
        return (torch.cat(pieces, dim=1) * probe).sum()

    actual = run_and_differentiate(
        lambda x, weight: (causal_conv(x, weight, None, taps) * probe).sum(), x, weight
    )
    for value, other in zip(actual, run_and_differentiate(separate, x, weight), strict=True):
        assert_close(value, other, atol=1e-14)


def test_state_is_no_view_of_the_input():
    """A view would keep the whole chunk alive, and grow the cache with it."""
    x, _, state = problem(1, 50, 4)
    for carried in (
        next_conv_state(x, state, 4),
        next_conv_state(x, state, 4, torch.ones(2, 50, dtype=torch.bool)),
    ):
        assert carried.untyped_storage().nbytes() == carried.numel() * carried.element_size()
