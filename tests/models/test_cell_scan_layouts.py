"""The fused cell scan gives the same bits for any layout, number of threads, default dtype and autocast."""

import pytest
import torch
from cell_scan_cases import few_cases, random_boundaries, random_inputs
from cell_scan_results import assert_same_bits, run
from torch import Tensor

from minrnn.models.boundaries import Boundaries
from minrnn.models.cell_scan import cell_scan, cell_scan_with_decay


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in another layout; sliced, with others between them."""
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([tensor, ~tensor if tensor.dtype == torch.bool else tensor - 7], dim=-1)[..., 0]


@few_cases
@pytest.mark.parametrize("how", ["transposed", "sliced"])
@pytest.mark.parametrize("time", [0, 1, 13])
def test_any_layout(spec, dtype, how, time):
    projected, gate_bias, h0 = random_inputs(8, spec, dtype, (3, time, 17))
    boundaries = random_boundaries(8, 3, time, True, True)
    assert boundaries.document_starts is not None
    assert boundaries.lengths is not None
    expected = run(spec, projected, gate_bias, h0, boundaries)
    boundaries = Boundaries(strided(boundaries.document_starts, how), strided(boundaries.lengths, how))
    actual = run(spec, strided(projected, how), strided(gate_bias, how), strided(h0, how), boundaries)
    assert_same_bits(actual, expected)


@few_cases
def test_gradients_in_any_layout(spec, dtype):
    """A gradient may come in expanded (of a sum) or transposed."""
    projected, gate_bias, h0 = random_inputs(9, spec, dtype, (2, 6, 5))
    leaves = [tensor.requires_grad_() for tensor in (projected, gate_bias, h0)]
    y, h_last = cell_scan(projected, gate_bias, h0, spec=spec)
    ones = (
        torch.ones_like(y).transpose(0, 2).contiguous().transpose(0, 2),
        torch.ones_like(h_last).t().contiguous().t(),
    )
    results = [
        torch.autograd.grad(outputs, leaves, retain_graph=True)
        for outputs in (y.sum() + h_last.sum(), (y * ones[0]).sum() + (h_last * ones[1]).sum())
    ] + [torch.autograd.grad((y, h_last), leaves, ones)]
    for other in results[1:]:
        assert all(torch.equal(value, first) for value, first in zip(other, results[0], strict=True))


@few_cases
@pytest.mark.parametrize(("batch", "time", "width"), [(1, 21, 70), (3, 33, 130), (40, 2, 1100)])
def test_threads_change_no_bit(spec, dtype, batch, time, width):
    """Threads share rows, or stripes of a row; torch would sum the bias's gradient in several threads."""
    arguments, results = random_inputs(10, spec, dtype, (batch, time, width)), []
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        results.append(run(spec, *arguments, random_boundaries(10, batch, time, True, False)))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@few_cases
def test_default_dtype_has_no_effect(spec, dtype):
    arguments = random_inputs(11, spec, dtype, (2, 7, 9))
    expected = (*cell_scan_with_decay(*arguments, spec=spec), *run(spec, *arguments).values())
    torch.set_default_dtype(torch.float64)
    try:
        actual = (*cell_scan_with_decay(*arguments, spec=spec), *run(spec, *arguments).values())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        value.dtype == other.dtype and torch.equal(value, other)
        for value, other in zip(actual, expected, strict=True)
    )


@few_cases
def test_autocast_has_no_effect(spec, dtype):
    arguments = random_inputs(12, spec, dtype, (2, 7, 9))
    expected = run(spec, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(spec, *arguments)
    assert_same_bits(actual, expected)
