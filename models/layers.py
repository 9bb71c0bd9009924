"""RMS norm and gated activation.

Each is defined in plain torch, which `torch.compile` fuses on a GPU. On the CPU, eager torch passes over
memory once per operation, so fp32 and bf16 use one kernel each (`layers_numba.py`), as one differentiable
operator.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dtypes import at_least_fp32, compute_dtype
from .layers_numba import norm_backward, norm_forward, swiglu_backward, swiglu_forward
from .numba_support import serves
from .operators import define


def _num_rows(x: Tensor) -> int:
    """Rows of x [..., width]. `Size.numel` would make a dynamic length static while tracing."""
    return math.prod(x.shape[:-1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(_num_rows(x), x.shape[-1]).contiguous()


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y, inverse = norm_forward(_rows(x), weight.float().contiguous(), eps, dtype)
    return y.view(x.shape), inverse


def _norm_fake(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(_num_rows(x), dtype=torch.float32)


def _norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    dx, d_weight = norm_backward(_rows(x), weight.float().contiguous(), inverse, _rows(grad_y))
    return dx.view(x.shape), d_weight


def _norm_backward_fake(x: Tensor, weight: Tensor, inverse: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


def _swiglu(x: Tensor) -> Tensor:
    return swiglu_forward(_rows(x)).view(*x.shape[:-1], x.shape[-1] // 2)


def _swiglu_fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _swiglu_backward(x: Tensor, grad_y: Tensor) -> Tensor:
    return swiglu_backward(_rows(x), _rows(grad_y)).view(x.shape)


def _swiglu_backward_fake(x: Tensor, grad_y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_norm_backward_op = define("rms_norm_backward", _norm_backward, _norm_backward_fake)
_swiglu_backward_op = define("swiglu_backward", _swiglu_backward, _swiglu_backward_fake)


def _save_norm(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _differentiate_norm(ctx, grad_y: Tensor, _) -> tuple[Tensor, Tensor, None, None]:
    x, weight, inverse = ctx.saved_tensors
    dx, d_weight = _norm_backward_op(x, weight, inverse, grad_y)
    return dx, d_weight.to(weight.dtype), None, None


def _save_swiglu(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_swiglu(ctx, grad_y: Tensor) -> Tensor:
    return _swiglu_backward_op(*ctx.saved_tensors, grad_y)


_norm_op = define("rms_norm", _norm, _norm_fake, _differentiate_norm, _save_norm)
_swiglu_op = define("swiglu", _swiglu, _swiglu_fake, _differentiate_swiglu, _save_swiglu)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Computed in fp32 and returned in the dtype of the matrix product that follows (`compute_dtype`).
    Zhang & Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.

    Args:
        size: Width of the last dimension.
        eps: Added to the mean square.
        backend: as in `scan.linear_scan`; "numba" (and None on the CPU) is one kernel.
    """

    def __init__(self, size: int, eps: float, backend: str | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.backend = eps, backend

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        if x.shape[-1:] != self.weight.shape:
            raise ValueError(f"RMSNorm takes [..., {self.weight.numel()}], but got {tuple(x.shape)}.")
        dtype = compute_dtype(x)
        if serves(x, self.backend) and dtype in (torch.float32, torch.bfloat16):
            return _norm_op(x, self.weight, self.eps, dtype)[0]
        return F.rms_norm(at_least_fp32(x), self.weight.shape, None, self.eps).mul(self.weight).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def swiglu(x: Tensor, backend: str | None = None) -> Tensor:
    """silu(gate) * up for x = gate | up: [..., 2 I] -> [..., I].

    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    if x.shape[-1] % 2:
        raise ValueError(
            f"swiglu takes gate and up side by side, [..., 2 * width], but got {tuple(x.shape)}."
        )
    if serves(x, backend):
        return _swiglu_op(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
