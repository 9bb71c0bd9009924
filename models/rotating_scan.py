"""The complex diagonal recurrence on the real scan: h_t = a_t exp(i theta) h_{t-1} + b_t.

In a frame that turns with the state, g_t = exp(-i theta t) h_t, the rotation disappears:

    g_t = a_t g_{t-1} + exp(-i theta t) b_t          two real channels with one real decay

So the scan's kernels serve complex states too. Pairs of channels are stored as real parts | imaginary parts.
The phases theta t are computed modulo one turn in integers, exactly, so their error does not grow with t. The
gradient for theta is the sum over t of Re(conj(dg_t) i a_t g_{t-1}), which needs no difference of large
terms.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .scan import linear_scan, linear_scan_backward

HALF_TURNS = 2.0**63  # of a full turn, the range of int64


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., 2 P], real parts | imaginary parts, turned by an angle: x * (cos + i sin)."""
    real, imaginary = x.chunk(2, dim=-1)
    turned_real = torch.addcmul(real * cos, imaginary, sin, value=-1)
    return torch.cat([turned_real, torch.addcmul(real * sin, imaginary, cos)], dim=-1)


def phases(theta: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """cos and sin of theta * t for t = 1 .. time: theta [P] -> two [time, P]."""
    turns = theta / (2 * math.pi)
    turns = (turns - (turns + 0.5).floor()).clamp(min=-0.5)  # in [-0.5, 0.5)
    fixed = (turns * (2 * HALF_TURNS)).to(torch.int64)
    t = torch.arange(1, time + 1, device=theta.device).unsqueeze(1)
    angle = (fixed * t).to(theta.dtype) * (math.pi / HALF_TURNS)  # the product wraps at one turn
    return angle.cos(), angle.sin()


class _RotatingScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, theta, b, h0, backend):
        cos, sin = phases(theta.to(b.dtype), b.shape[1])
        decay = torch.cat([a, a], dim=-1)
        g, last = linear_scan(decay, rotate(b, cos, -sin), h0, backend=backend)
        ctx.save_for_backward(decay, theta, g, h0)
        ctx.backend = backend
        h = rotate(g, cos, sin)
        return h, rotate(last, cos[-1], sin[-1]) if b.shape[1] else last

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_h, grad_last = grads
        decay, theta, g, h0 = ctx.saved_tensors
        time, pairs = g.shape[1], theta.shape[0]
        cos, sin = phases(theta.to(g.dtype), time)
        grad_last = rotate(grad_last, cos[-1], -sin[-1]) if time else grad_last
        d_decay, dc, dh0 = linear_scan_backward(
            decay, g, h0, rotate(grad_h, cos, -sin), grad_last, backend=ctx.backend
        )
        previous = torch.cat([h0.to(g.dtype).unsqueeze(1), g[:, :-1]], dim=1) if time else g
        (dc_real, dc_imaginary), (real, imaginary) = dc.split(pairs, -1), previous.split(pairs, -1)
        turned = (dc_imaginary * real - dc_real * imaginary) * decay[..., :pairs]
        da = d_decay[..., :pairs] + d_decay[..., pairs:]
        return da, turned.sum((0, 1)).to(theta.dtype), rotate(dc, cos, sin), dh0.to(h0.dtype), None


_apply: Any = _RotatingScan.apply


def rotating_scan(
    a: Tensor, theta: Tensor, b: Tensor, h0: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = a_t exp(i theta) h_{t-1} + b_t for every pair of channels.

    Args:
        a: absolute values of the decays, [batch, time, pairs].
        theta: angles in radians, [pairs].
        b: inputs, [batch, time, 2 pairs], real parts | imaginary parts, fp32 or fp64 as a.
        h0: state before the first token, as b, [batch, 2 pairs].
        backend: as in `scan.linear_scan`.

    Returns:
        h as b, and the state after the last token as h0.

    Source: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349.
    """
    return _apply(a, theta, b, h0, backend)
