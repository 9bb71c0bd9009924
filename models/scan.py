"""The scan: h_t = a_t * h_{t-1} + b_t, whole or cut, forwards and backwards.

    linear_scan(a, b, h0) -> (h, h_last)        h_last is the h0 of whatever comes next

Everything this project promises about cuts rests on this one function. It is a `torch` custom operator for each backend, so `torch.compile`
sees one opaque node, autograd sees one formula, and autocast sees nothing (a cast of the carried state to bf16 would lose it).

Mathematics. With g_t the gradient that reaches h_t from outside and G_t the whole of it,

    G_t = g_t + a_{t+1} * G_{t+1}        (G_T also receives the gradient of h_last)
    db_t = G_t        da_t = G_t * h_{t-1}        dh0 = a_1 * G_1

so the backward pass is the same recurrence, run from the end. Every backend implements both directions; this file holds the dispatch, the
autograd rule, and the reference: a plain loop over time that every other backend is tested against.

Memory traffic of the general form, in elements of [batch, time, width]: forward reads a, b and writes h; backward reads a, h, g and writes da,
db. Nothing else is saved.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .scan_numba import backward as numba_backward
from .scan_numba import forward as numba_forward
from .scan_numba import is_available as numba_is_available
from .scan_torch import accumulate_dtype
from .scan_torch import backward as torch_backward
from .scan_torch import forward as torch_forward

BACKENDS = ("reference", "torch", "numba")


def _namespace() -> str:
    """Operator namespace that differs whenever the source does.

    A process may hold this package and a remote-code copy of another version; an operator of the same name would silently replace the first.
    """
    folder = Path(__file__).parent
    source = b"".join((folder / f"{name}.py").read_bytes() for name in ("scan", "scan_torch", "scan_numba"))
    return f"minrnn_{hashlib.sha256(source).hexdigest()[:12]}"


def reference_forward(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, one token after another."""
    dtype = accumulate_dtype(a, b)
    h, carry = torch.empty_like(b, memory_format=torch.contiguous_format), h0.to(dtype, copy=True)
    for t in range(b.shape[1]):
        carry = a[:, t].to(dtype) * carry + b[:, t].to(dtype)
        h[:, t] = carry
    return h, carry


def reference_backward(a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative as it is written, from the last token to the first."""
    dtype = accumulate_dtype(a, h)
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    db = torch.empty_like(h, memory_format=torch.contiguous_format)
    total = grad_last.to(dtype, copy=True)
    for t in range(h.shape[1] - 1, -1, -1):
        total = total + grad_h[:, t].to(dtype)
        previous = h[:, t - 1] if t > 0 else h0
        db[:, t], da[:, t] = total, total * previous.to(dtype)
        total = total * a[:, t].to(dtype)
    return da, db, total


def _register(name: str, forward: Callable, backward: Callable) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Make a backend's two functions one differentiable operator, `minrnn_HASH::linear_scan_NAME`."""
    namespace = _namespace()
    registered = getattr(getattr(torch.ops, namespace), f"linear_scan_{name}", None)
    if registered is not None:  # by another copy of this very source in the process; to register it again would destroy that one's
        return registered

    @torch.library.custom_op(f"{namespace}::linear_scan_{name}", mutates_args=())
    def scan(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        h, h_last = forward(a, b, h0)
        return h.contiguous(), h_last.contiguous()

    @torch.library.custom_op(f"{namespace}::linear_scan_backward_{name}", mutates_args=())
    def scan_backward(a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        da, db, dh0 = backward(a, h, h0, grad_h, grad_last)
        return da.contiguous(), db.contiguous(), dh0.contiguous()

    @scan.register_fake
    def _(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        contiguous = torch.empty_like(b, memory_format=torch.contiguous_format)
        return contiguous, h0.new_empty(h0.shape, dtype=accumulate_dtype(a, b))

    @scan_backward.register_fake
    def _(a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        contiguous = torch.contiguous_format
        grad_a, grad_b = torch.empty_like(a, memory_format=contiguous), torch.empty_like(h, memory_format=contiguous)
        return grad_a, grad_b, h0.new_empty(h0.shape, dtype=accumulate_dtype(a, h))

    def setup_context(ctx, inputs, output) -> None:
        a, b, h0 = inputs
        ctx.save_for_backward(a, output[0], h0)
        ctx.b_dtype, ctx.h0_dtype = b.dtype, h0.dtype

    def differentiate(ctx, grad_h: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        a, h, h0 = ctx.saved_tensors
        grad_h = torch.zeros_like(h) if grad_h is None else grad_h
        grad_last = h0.new_zeros(h0.shape, dtype=accumulate_dtype(a, h)) if grad_last is None else grad_last
        da, db, dh0 = scan_backward(a, h, h0, grad_h, grad_last)
        return da, db.to(ctx.b_dtype), dh0.to(ctx.h0_dtype)

    scan.register_autograd(differentiate, setup_context=setup_context)
    return scan


_SCANS = {
    "reference": _register("reference", reference_forward, reference_backward),
    "torch": _register("torch", torch_forward, torch_backward),
    "numba": _register("numba", numba_forward, numba_backward),
}


def default_backend(device: torch.device) -> str:
    """The fastest backend that runs on `device`."""
    return "numba" if device.type == "cpu" and numba_is_available() else "torch"


def _check(a: Tensor, b: Tensor, h0: Tensor | None, backend: str) -> None:
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"linear_scan takes a and b of one shape [batch, time, width], but got {tuple(a.shape)} and {tuple(b.shape)}.")
    state_shape = (b.shape[0], b.shape[2])
    if h0 is not None and tuple(h0.shape) != state_shape:
        raise ValueError(f"linear_scan takes h0 of shape [batch, width] = {state_shape}, but got {tuple(h0.shape)}.")
    for name, tensor in (("a", a), ("b", b), ("h0", h0)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"linear_scan takes floating-point tensors, but {name} is {tensor.dtype}.")
        if tensor.device != b.device:
            raise ValueError(f"linear_scan takes tensors on one device, but {name} is on {tensor.device} and b on {b.device}.")
    if backend not in _SCANS:
        raise ValueError(f"There is no scan backend {backend!r}; choose one of {', '.join(BACKENDS)}, or none for the fastest here.")
    if backend == "numba" and b.device.type not in ("cpu", "meta"):
        raise ValueError(f"The numba backend runs on the CPU, but the tensors are on {b.device}; use backend='torch' or none.")
    if backend == "numba" and not numba_is_available():
        raise ValueError("The numba backend needs the package numba: pip install numba, or use backend='torch'.")


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t for every channel, from h_0 = `h0`.

    Args:
        a: decay, [batch, time, width], any floating dtype. Any value is allowed; |a| <= 1 keeps h bounded.
        b: input, same shape; may have another dtype than a.
        h0: state before the first token, [batch, width]; zeros when not given. Keep it in fp32, as `h_last` is.
        backend: "reference" (a loop), "torch" (any device), "numba" (CPU), or None for the fastest on this device.

    Returns:
        h [batch, time, width] in b's dtype, and h_last [batch, width] in fp32 (fp64 if a or b is): the state after the last token, not rounded
        to b's dtype, so that a sequence cut in two gives what the whole gives. With time = 0, h_last is h0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.

    Source: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018; Feng et al., "Were RNNs All We
    Needed?", arXiv 2410.01201, section 3.
    """
    backend = backend or default_backend(b.device)
    _check(a, b, h0, backend)
    if h0 is None:
        h0 = b.new_zeros(b.shape[0], b.shape[2], dtype=accumulate_dtype(a, b))
    return _SCANS[backend](a, b, h0)
