"""The scan: h_t = a_t * h_{t-1} + b_t, whole or cut, forwards and backwards.

    linear_scan(a, b, h0) -> (h, h_last)        h_last is the h0 of whatever comes next

All exact cuts in this project rest on this function. Each backend is a `torch` custom operator:
`torch.compile` sees one opaque node, autograd one formula, and autocast does not change the dtypes (bf16
would lose the carried state).

Mathematics. With g_t the gradient that reaches h_t through the outputs and G_t its total gradient,

    G_t = g_t + a_{t+1} * G_{t+1}        (G_T also receives the gradient of h_last)
    db_t = G_t        da_t = G_t * h_{t-1}        dh0 = a_1 * G_1

so the backward pass is the same recurrence, run from the end. Every backend implements both directions. This
file holds the dispatch, the autograd rule, and the reference: a plain loop over time that the other backends
are tested against.

Memory traffic in elements of [batch, time, width]: forward reads a, b and writes h; backward reads a, h, g
and writes da, db. Nothing else is saved.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .dtypes import accumulate_dtype
from .numba_support import numba_problem
from .operators import define
from .probe_triton import triton_problem
from .scan_numba import backward as numba_backward
from .scan_numba import forward as numba_forward
from .scan_torch import backward as torch_backward
from .scan_torch import forward as torch_forward
from .scan_triton import backward as triton_backward
from .scan_triton import forward as triton_forward

logger: Any = logging.get_logger(__name__)
BACKENDS = ("reference", "torch", "numba", "triton")


def reference_forward(
    a: Tensor, b: Tensor, h0: Tensor, return_decay: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence as defined, one token after another."""
    dtype = accumulate_dtype(a, b)
    h, carry = torch.empty_like(b, memory_format=torch.contiguous_format), h0.to(dtype, copy=True)
    for t in range(b.shape[1]):
        carry = a[:, t].to(dtype) * carry + b[:, t].to(dtype)
        h[:, t] = carry
    return h, carry, a.prod(1, dtype=dtype) if return_decay else carry.new_empty(0)


def reference_backward(
    a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative as defined, from the last token to the first."""
    dtype = accumulate_dtype(a, h)
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    db = torch.empty_like(h, memory_format=torch.contiguous_format)
    carry = grad_last.to(dtype, copy=True)
    for t in range(h.shape[1] - 1, -1, -1):
        carry = carry + grad_h[:, t].to(dtype)
        previous = h[:, t - 1] if t > 0 else h0
        db[:, t], da[:, t] = carry, carry * previous.to(dtype)
        carry = carry * a[:, t].to(dtype)
    return da, db, carry


def _register(
    name: str, forward: Callable, backward: Callable
) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Make a backend's two functions one differentiable operator, `minrnn_HASH::linear_scan_NAME`.

    Returns:
        The operator, and the operator of its backward pass.
    """

    def scan(a: Tensor, b: Tensor, h0: Tensor, return_decay: bool) -> tuple[Tensor, Tensor, Tensor]:
        h, h_last, decay = forward(a, b, h0, return_decay)
        return h.contiguous(), h_last.contiguous(), decay.contiguous()

    def fake(a: Tensor, b: Tensor, h0: Tensor, return_decay: bool) -> tuple[Tensor, Tensor, Tensor]:
        h_last = h0.new_empty(h0.shape, dtype=accumulate_dtype(a, b))
        return (
            torch.empty_like(b, memory_format=torch.contiguous_format),
            h_last,
            h_last.new_empty(h0.shape if return_decay else 0),
        )

    def scan_backward(
        a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        da, db, dh0 = backward(a, h, h0, grad_h, grad_last)
        return da.contiguous(), db.contiguous(), dh0.contiguous()

    def fake_backward(
        a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        contiguous = torch.contiguous_format
        grad_a, grad_b = (
            torch.empty_like(a, memory_format=contiguous),
            torch.empty_like(h, memory_format=contiguous),
        )
        return grad_a, grad_b, h0.new_empty(h0.shape, dtype=accumulate_dtype(a, h))

    backward_operator = define(f"linear_scan_backward_{name}", scan_backward, fake_backward)

    def setup_context(ctx, inputs, output) -> None:
        a, b, h0, _ = inputs
        ctx.save_for_backward(a, output[0], h0)
        ctx.b_dtype, ctx.h0_dtype = b.dtype, h0.dtype

    def differentiate(
        ctx, grad_h: Tensor | None, grad_last: Tensor | None, _
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        a, h, h0 = ctx.saved_tensors
        grad_h = torch.zeros_like(h) if grad_h is None else grad_h
        grad_last = h0.new_zeros(h0.shape, dtype=accumulate_dtype(a, h)) if grad_last is None else grad_last
        da, db, dh0 = backward_operator(a, h, h0, grad_h, grad_last)
        return da, db.to(ctx.b_dtype), dh0.to(ctx.h0_dtype), None

    return define(f"linear_scan_{name}", scan, fake, differentiate, setup_context), backward_operator


_SCANS = {
    "reference": _register("reference", reference_forward, reference_backward),
    "torch": _register("torch", torch_forward, torch_backward),
    "numba": _register("numba", numba_forward, numba_backward),
    "triton": _register("triton", triton_forward, triton_backward),
}


@torch.compiler.assume_constant_result
def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest backend that runs on tensors of `dtype` on `device`.

    Logs a warning if the device's own kernels cannot run. A tracer treats the result as a constant and does
    not trace the function, which may run a kernel.
    """
    if device.type == "cpu":
        kernels, problem = "numba", numba_problem()
    elif device.type == "cuda":
        kernels, problem = "triton", triton_problem(device, dtype)
    else:
        return "torch"
    if problem is None:
        return kernels
    name = str(dtype).removeprefix("torch.")
    cost = "the torch backend takes their place, with the same results and several times the memory traffic"
    logger.warning_once(f"warning: the {kernels} kernels cannot run on {device} in {name}: {problem}; {cost}")
    return "torch"


@torch.compiler.assume_constant_result
def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError if `backend` does not exist, or cannot run on tensors of `dtype` on `device`."""
    if backend not in BACKENDS:
        choice = f"choose one of {', '.join(BACKENDS)}, or none for the fastest here"
        raise ValueError(f"There is no scan backend {backend!r}; {choice}.")
    if device.type == "meta" or backend not in ("numba", "triton"):
        return
    problem = triton_problem(device, dtype) if backend == "triton" else numba_problem()
    if problem is None and backend == "numba" and device.type != "cpu":
        problem = f"they run on the CPU, and the tensors are on {device}"
    if problem is not None:
        raise ValueError(
            f"The {backend} kernels cannot run here: {problem}; use another backend, or none for the fastest."
        )


def check_one_device(tensors: dict[str, Tensor | None], device: torch.device) -> None:
    """Raises ValueError if a tensor is on another device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"The scan takes tensors on one device, "
                f"but {name} is on {tensor.device} and the others on {device}."
            )


def _check(a: Tensor, b: Tensor, h0: Tensor | None, backend: str) -> None:
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(
            "linear_scan takes a and b of one shape [batch, time, width], "
            f"but got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    state_shape = (b.shape[0], b.shape[2])
    if h0 is not None and tuple(h0.shape) != state_shape:
        raise ValueError(
            f"linear_scan takes h0 of shape [batch, width] = {state_shape}, but got {tuple(h0.shape)}."
        )
    for name, tensor in (("a", a), ("b", b), ("h0", h0)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"linear_scan takes floating-point tensors, but {name} is {tensor.dtype}.")
    check_one_device({"a": a, "h0": h0}, b.device)
    check_backend(backend, b.device, b.dtype)


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t for every channel, from h_0 = `h0`.

    Args:
        a: decay, [batch, time, width], any floating dtype. Any value is allowed; |a| <= 1 keeps h bounded.
        b: input, same shape; may have another dtype than a.
        h0: state before the first token, [batch, width]; zeros if None. Keep it in fp32, as `h_last` is.
        backend: "reference" (a loop), "torch" (any device), "numba" (CPU), "triton" (GPU), or None for the
            fastest on this device.

    Returns:
        h [batch, time, width] in b's dtype, and h_last [batch, width] in fp32 (fp64 if a or b is): the state
        after the last token. It is not rounded to b's dtype, so a sequence that is cut in two gives the same
        result as the whole sequence. With time = 0, h_last is h0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.

    Source: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018; Feng
    et al., "Were RNNs All We Needed?", arXiv 2410.01201, section 3.
    """
    h, h_last, _ = _scan(a, b, h0, False, backend)
    return h, h_last


def linear_scan_with_decay(
    a: Tensor, b: Tensor, h0: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_scan`, and the product of all decays, [batch, width] in the state's dtype.

    h_last = decay * h0 + (h_last from h0 = 0). No gradient flows through the product.
    """
    h, h_last, decay = _scan(a, b, h0, True, backend)
    return h, h_last, decay.detach()


def _scan(
    a: Tensor, b: Tensor, h0: Tensor | None, return_decay: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    backend = backend or default_backend(b.device, b.dtype)
    _check(a, b, h0, backend)
    if h0 is None:
        h0 = b.new_zeros(b.shape[0], b.shape[2], dtype=accumulate_dtype(a, b))
    return _SCANS[backend][0](a, b, h0, return_decay)


def linear_scan_backward(
    a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_scan` for a, b and h0 from those of h and h_last, without a graph."""
    return _SCANS[backend or default_backend(h.device, h.dtype)][1](a, h, h0, grad_h, grad_last)
