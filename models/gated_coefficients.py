"""Coefficients (a, b) of h_t = a_t h_{t-1} + b_t for HGRN and the RG-LRU.

    HGRN     a = lb + (1 - lb) sigmoid(f),     b = (1 - a) c(u)                       lb: lower bound
    RG-LRU   a = exp(rate sigmoid(r)),         b = sqrt(1 - a^2) sigmoid(i) c(u)      rate < 0

Lower bound and rate are constants of a channel, in a row below the gates' biases. In the RG-LRU, the factor
sqrt(1 - a^2) is 1 where no state precedes a token. Sources: Qin et al., arXiv 2311.04823; De et al.,
"Griffin", arXiv 2402.19427, section 2.4.
"""

import torch
from torch import Tensor

from .dtypes import at_least_fp32
from .minimal_coefficients import MinimalCell, candidate

SMALLEST = 1e-12
"""Least 1 - a^2 under the root, whose gradient has no bound at 0: that of a memory of 2e12 tokens."""


def hgrn(f: Tensor, bound: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """f, u [batch, time, width], bound [width] -> a (at least fp32), b (dtype of u)."""
    f, rest = at_least_fp32(f), 1 - bound
    b = rest * torch.sigmoid(-f) * candidate(at_least_fp32(u), activation)
    return bound + rest * torch.sigmoid(f), b.to(u.dtype)


def rglru(
    r: Tensor, i: Tensor, rate: Tensor, u: Tensor, activation: str, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """r, i, u [batch, time, width], rate [width], starts [batch, time, 1] -> a (at least fp32), b (of u)."""
    log_a = torch.sigmoid(at_least_fp32(r)) * rate
    scale = (-torch.expm1(2 * log_a)).clamp(min=SMALLEST).sqrt()
    scale = scale if starts is None else scale.masked_fill(starts, 1)
    b = scale * torch.sigmoid(at_least_fp32(i)) * candidate(at_least_fp32(u), activation)
    return log_a.exp(), b.to(u.dtype)


def _hgrn_rows(memory: Tensor) -> Tensor:
    return torch.stack([torch.log(memory - 1), torch.zeros_like(memory)])


def _rglru_rows(memory: Tensor) -> Tensor:
    zeros = torch.zeros_like(memory)
    return torch.stack([zeros, zeros, 2 * torch.log1p(-1 / memory)])  # sigmoid(0) = 1/2


GATED_CELLS = {
    "hgrn": MinimalCell(1, hgrn, _hgrn_rows, num_constants=1),
    "rglru": MinimalCell(2, rglru, _rglru_rows, num_constants=1, reads_starts=True, output_gate="gelu"),
}
