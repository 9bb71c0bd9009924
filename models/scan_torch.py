"""The scan in plain torch: any device, parallel in time, decays of any sign, no logarithms.

The sequence is folded into about sqrt(T) blocks of about sqrt(T) tokens. Two short loops replace one long
loop; their steps work on [batch, blocks, width] and on [batch, width]:

    1. inside all blocks at once    local_t = a_t * local_{t-1} + b_t     from local = 0
                                    decay_t = a_t * decay_{t-1}           from decay = 1
    2. from block to block          carry_{k+1} = decay_last,k * carry_k + local_last,k      from carry = h0
    3. all tokens at once           h_t = local_t + decay_t * carry_k

Decays are products of the a, so nothing overflows for |a| <= 1. Rounding errors add up over two loops of
sqrt(T) steps; in log space they would grow with a sum over T tokens.
"""

import math

import torch
from torch import Tensor

from .dtypes import accumulate_dtype


def _scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """h of one dtype: a, b [batch, time, width], h0 [batch, width] -> [batch, time, width]. time >= 1."""
    batch, time, width = b.shape
    block = math.isqrt(time - 1) + 1
    num_blocks = -(-time // block)
    fold = (batch, num_blocks, block, width)
    tail = (0, 0, 0, num_blocks * block - time)
    decay = torch.nn.functional.pad(a, tail, value=1.0).view(fold).clone()
    local = torch.nn.functional.pad(b, tail).view(fold).clone()
    for t in range(1, block):
        local[:, :, t].addcmul_(decay[:, :, t], local[:, :, t - 1])
        decay[:, :, t].mul_(decay[:, :, t - 1])
    carry = torch.empty_like(local[:, :, 0])
    carry[:, 0] = h0
    for k in range(1, num_blocks):
        torch.addcmul(local[:, k - 1, -1], decay[:, k - 1, -1], carry[:, k - 1], out=carry[:, k])
    return local.addcmul_(decay, carry.unsqueeze(2)).view(batch, num_blocks * block, width)[:, :time]


def forward(a: Tensor, b: Tensor, h0: Tensor, return_decay: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan.linear_scan`."""
    dtype = accumulate_dtype(a, b)
    decay = a.prod(1, dtype=dtype) if return_decay else h0.new_empty(0, dtype=dtype)
    if b.shape[1] == 0:
        return torch.empty_like(b, memory_format=torch.contiguous_format), h0.to(dtype, copy=True), decay
    h = _scan(a.to(dtype), b.to(dtype), h0.to(dtype))
    return h.to(b.dtype, copy=True).contiguous(), h[:, -1].clone(), decay


def backward(
    a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan`: the total gradient is the same scan, from the end, over decays shifted by one."""
    dtype = accumulate_dtype(a, h)
    if h.shape[1] == 0:
        return torch.empty_like(a), torch.empty_like(h), grad_last.to(dtype, copy=True)
    reversed_decay = torch.cat([torch.ones_like(a[:, :1]), a[:, 1:].flip(1)], dim=1).to(dtype)
    total = _scan(reversed_decay, grad_h.flip(1).to(dtype), grad_last.to(dtype)).flip(1)
    previous = torch.cat([h0.to(dtype).unsqueeze(1), h[:, :-1].to(dtype)], dim=1)
    return (total * previous).to(a.dtype), total.to(h.dtype, copy=True), total[:, 0] * a[:, 0].to(dtype)
