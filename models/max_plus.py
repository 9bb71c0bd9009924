"""The scan of a running maximum: m_t = max(m_{t-1} - w_t, k_t).

A cell that sums exp(k_t) keeps its sums divided by exp(m_t), so that nothing overflows. The sums themselves
do not depend on m, so no gradient flows through it. On the CPU it is one pass of a numba kernel. Elsewhere,
as in scan_torch.py, about sqrt(T) blocks of about sqrt(T) tokens replace one long loop by two short ones. It
is one operator, whose loops `torch.compile` does not trace.
"""

import math

import torch
from torch import Tensor

from .numba_support import is_available
from .operators import define
from .scan_numba import max_plus

EMPTY = -1e30  # the maximum of nothing; finite, so that the difference of two is not NaN


def in_blocks(w: Tensor, key: Tensor, m0: Tensor) -> tuple[Tensor, Tensor]:
    """The scan in plain torch, on any device."""
    batch, time, width = key.shape
    if time == 0:
        return key.new_empty(key.shape), m0.clone()
    block = math.isqrt(time - 1) + 1
    num_blocks = -(-time // block)
    fold, tail = (batch, num_blocks, block, width), (0, 0, 0, num_blocks * block - time)
    local = torch.nn.functional.pad(key, tail, value=EMPTY).view(fold).clone()
    fall = torch.nn.functional.pad(w, tail).view(fold).clone()
    for t in range(1, block):
        torch.maximum(local[:, :, t], local[:, :, t - 1] - fall[:, :, t], out=local[:, :, t])
        fall[:, :, t] += fall[:, :, t - 1]
    carry = torch.empty_like(local[:, :, 0])
    carry[:, 0] = m0
    for k in range(1, num_blocks):
        torch.maximum(local[:, k - 1, -1], carry[:, k - 1] - fall[:, k - 1, -1], out=carry[:, k])
    m = torch.maximum(local, carry.unsqueeze(2) - fall).view(batch, num_blocks * block, width)[:, :time]
    return m.contiguous(), m[:, -1].clone()


def _scan(w: Tensor, key: Tensor, m0: Tensor) -> tuple[Tensor, Tensor]:
    return (max_plus if is_available() and key.device.type == "cpu" else in_blocks)(w, key, m0)


def _fake_scan(w: Tensor, key: Tensor, m0: Tensor) -> tuple[Tensor, Tensor]:
    return key.new_empty(key.shape), m0.new_empty(m0.shape)


_operator = define("max_plus_scan", _scan, _fake_scan)


def max_plus_scan(w: Tensor, key: Tensor, m0: Tensor) -> tuple[Tensor, Tensor]:
    """w, key [batch, time, width], m0 [batch, width] -> m [batch, time, width], the last m [batch, width].

    w >= 0; -EMPTY where a document starts. The arguments must not require a gradient.
    """
    return _operator(w, key, m0)
