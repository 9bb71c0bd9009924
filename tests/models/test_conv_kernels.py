"""The causal convolution as a CPU kernel against plain torch in fp64."""

import itertools

import pytest
import torch
from helpers import assert_close, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import (
    HALF_UNIT,
    assert_results,
    assert_same_bits,
    conv_of,
    doubled,
    dtypes,
    outputs_and_gradients,
    random_conv_inputs,
    widths,
)
from torch import Tensor

from minrnn.models.boundaries import reach_within_document
from minrnn.models.conv import causal_conv, conv_one_token, next_conv_state
from minrnn.models.layers_numba import ROWS


@dtypes
@settings(max_examples=25)
@given(
    batch=st.integers(0, 3),
    time=st.sampled_from([0, 1, 2, 3, 5, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 3]),
    width=widths,
    kernel=st.integers(2, 7),
    with_state=st.booleans(),
    begins=st.sampled_from([0, 0.05, 0.5]),
    seed=st.integers(0, 2**20),
)
def test_conv(dtype, batch, time, width, kernel, with_state, begins, seed):
    problem = random_conv_inputs(seed, dtype, batch, time, width, kernel)
    if not with_state:
        del problem["state"]
    starts = torch.rand(batch, time, generator=generator(seed)) < begins
    reach = reach_within_document(starts, kernel) if begins else None
    actual, expected = (
        outputs_and_gradients(conv_of(None, reach), **problem),
        outputs_and_gradients(conv_of("torch", reach), **doubled(**problem)),
    )
    absolute = {name: tensor.double().abs() for name, tensor in problem.items()}
    sizes = {f"d_{name}": tensor for name, tensor in gradient_term_sizes(absolute, reach).items()}
    outputs = {"y": dtype, "d_x": dtype, "d_weight": torch.float32} | (
        {"d_state": dtype} if with_state else {}
    )
    assert_results(
        actual,
        expected,
        outputs,
        y=causal_conv(absolute["x"], absolute["weight"], absolute.get("state"), reach, "torch"),
        **sizes,
    )


def gradient_term_sizes(absolute: dict[str, Tensor], reach: Tensor | None) -> dict[str, Tensor]:
    """The same sums over the sizes of their terms; a gradient is at most 2."""
    leaves = {name: leaf.requires_grad_() for name, leaf in absolute.items()}
    y = conv_of("torch", reach)(**leaves)
    loss = 2 * y.sum() + sum(0 * leaf.sum() for leaf in leaves.values())
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@dtypes
@settings(max_examples=15)
@given(
    cuts=st.lists(st.integers(0, 80), max_size=4),
    begins=st.sampled_from([0, 0.1]),
    seed=st.integers(0, 2**20),
)
def test_conv_cuts_change_no_bit(dtype, cuts, begins, seed):
    """Whole = cut in pieces; the gradient through the state is added to the others."""
    time, kernel = 80, 4
    problem = random_conv_inputs(seed, dtype, 2, time, 17, kernel)
    starts = torch.rand(2, time, generator=generator(seed)) < begins
    reach = reach_within_document(starts, kernel) if begins else None

    def in_pieces(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        pieces = []
        for low, high in itertools.pairwise([0, *sorted(cuts), time]):
            piece_starts = starts[:, low:high] if begins else None
            piece = x[:, low:high]
            pieces.append(
                causal_conv(
                    piece,
                    weight,
                    state,
                    None if piece_starts is None else reach_within_document(piece_starts, kernel),
                )
            )
            state = next_conv_state(piece, state, kernel, piece_starts)
        return torch.cat(pieces, dim=1)

    actual, whole = (
        outputs_and_gradients(in_pieces, **problem),
        outputs_and_gradients(conv_of(None, reach), **problem),
    )
    assert torch.equal(actual["y"], whole["y"])
    for name in ("d_x", "d_weight", "d_state"):  # each rounded once for every piece it is in
        assert_close(
            actual[name], whole[name], atol=1e-6 + 4 * HALF_UNIT[dtype] * (name != "d_weight"), name=name
        )


@dtypes
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_conv_reads_no_other_document(dtype, poison):
    """NaN in a document or the state reaches no other document, row or channel, forward or backward."""
    problem, starts = random_conv_inputs(3, dtype, 2, 90, 5, 4), torch.zeros(2, 90, dtype=torch.bool)
    starts[:, [0, 20, 62, 65]] = True
    reach = reach_within_document(starts, 4)
    sound = outputs_and_gradients(conv_of(None, reach), **problem)
    broken = {name: tensor.clone() for name, tensor in problem.items()}
    broken["x"][0, 62:65, 2] = broken["state"][0, :, 2] = poison
    actual = outputs_and_gradients(conv_of(None, reach), **broken)
    assert not actual["y"][0, 62:65, 2].isfinite().any()
    hit = torch.zeros_like(starts)
    hit[0, 62:65] = True
    assert torch.equal(actual["y"][~hit], sound["y"][~hit])
    assert torch.equal(actual["y"][..., [0, 1, 3, 4]], sound["y"][..., [0, 1, 3, 4]])
    assert torch.equal(actual["d_x"], sound["d_x"])
    assert torch.equal(actual["d_weight"][[0, 1, 3, 4]], sound["d_weight"][[0, 1, 3, 4]])


@dtypes
def test_conv_reaches_no_further_than_its_kernel(dtype):
    """A reach that was computed for a wider one reads no memory beyond the weights."""
    problem, starts = random_conv_inputs(4, dtype, 2, 20, 5, 3), torch.zeros(2, 20, dtype=torch.bool)
    starts[:, [0, 7]] = True
    actual, expected = (
        outputs_and_gradients(conv_of(None, reach_within_document(starts, kernel)), **problem)
        for kernel in (9, 3)
    )
    assert_same_bits(actual, expected)


@dtypes
@pytest.mark.parametrize("with_state", [False, True])
def test_conv_of_one_token(dtype, with_state):
    """What decoding takes instead is the same but for rounding: each product in bf16 before the sum."""
    problem = random_conv_inputs(10, dtype, 3, 1, 17, 4)
    state = problem["state"] if with_state else None
    y, after = conv_one_token(problem["x"], problem["weight"], state)
    expected = causal_conv(
        problem["x"].double(),
        problem["weight"].double(),
        None if state is None else state.double(),
        backend="torch",
    )
    assert y.dtype == dtype
    assert_close(y, expected, atol=1e-6 if dtype == torch.float32 else 2**-7)
    assert torch.equal(after, next_conv_state(problem["x"], state, 4))
    assert after.untyped_storage().nbytes() == after.numel() * after.element_size(), (
        "a view would keep more alive"
    )
