"""What the checks of Triton's kernels share: the device, tolerances and random tensors.

Tiles are tiny (2 lanes of 2 tokens, 4 channels), so that small inputs cross every border: between lanes,
tiles, chunks and blocks of channels.
"""

import pytest
import torch
from helpers import assert_close, generator
from torch import Tensor

from minrnn.models.launches_triton import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = Tile(lanes=2, rows=2, channels=4)
FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
PRECISION = {FP64: 1e-13, FP32: 3e-6}  # of the arithmetic, relative to the largest
ROUNDING = {FP64: 0.0, FP32: 2**-23, FP16: 2**-10, BF16: 2**-7}  # one unit in the last place
ignores_overflow = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, for what overflows on purpose
Results = dict[str, Tensor]
Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # what goes in, and the gradients of what comes out


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=FP64)


def assert_results(actual: Results, expected: Results, dtype: torch.dtype = FP32) -> None:
    """`dtype`: of what the kernels read; the gradient of a product with a rounded number is that far off."""
    for name, value in expected.items():
        rounding = max(ROUNDING[actual[name].dtype], ROUNDING[dtype])
        accumulated = FP64 if actual[name].dtype == FP64 else FP32
        assert_close(
            actual[name].cpu(),
            value,
            atol=PRECISION[accumulated] + (rounding if dtype in (BF16, FP16) else 0),
            rtol=rounding,
            name=name,
        )


def to_device(tensors: Problem) -> Problem:
    """On the device, with the same strides."""
    if DEVICE == "cpu":
        return tensors
    memory = (torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(DEVICE) for x in tensors)
    a, b, c, d, e = (
        whole.as_strided(x.shape, x.stride(), x.storage_offset())
        for whole, x in zip(memory, tensors, strict=True)
    )
    return a, b, c, d, e
