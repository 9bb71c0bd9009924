"""The matrix scan: a state matrix per head, whole or cut, forwards and backwards.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        y_t = S_t^T q_t

This is the recurrence h_t = a_t h_{t-1} + b_t with h [K, V], b_t = k_t v_t^T and one decay for a key channel
or for a whole head. The products b_t are never stored: `torch` (matrix_scan_torch.py) and `fla`
(matrix_scan_fla.py) work in chunks of tokens, in matrix products. `reference` is the loop over time that they
are tested against, differentiated by autograd.

Boundaries (boundaries.py) are exact: log a = -inf where a document starts, and k = v = log a = 0 for padding.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .boundaries import NO_BOUNDARIES, Boundaries
from .dtypes import at_least_fp32
from .matrix_scan_fla import Sizes, fla_problem, fla_scan
from .matrix_scan_torch import backward as torch_backward
from .matrix_scan_torch import forward as torch_forward
from .matrix_scan_torch import summarize
from .operators import define

logger: Any = logging.get_logger(__name__)
MATRIX_BACKENDS = ("reference", "torch", "fla")


def matrix_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None = None,
    *,
    boundaries: Boundaries = NO_BOUNDARIES,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T and y_t = S_t^T q_t for every head, from S_0 = `state`.

    Args:
        q, k: [batch, time, heads, K], any floating dtype.
        v: [batch, time, heads, V].
        log_decay: log a <= 0, [batch, time, heads, K], or [batch, time, heads, 1] for one decay per head;
            None for a = 1. -inf is allowed.
        state: S_0, [batch, heads, K, V]; zeros if None. Keep it in fp32, as the returned state is.
        boundaries: document starts and padding; `reach` is not read.
        backend: "reference" (a loop), "torch" (any device), "fla" (GPU), or None for the fastest on this
            device, which for one token is a few plain operations.

    Returns:
        y [batch, time, heads, V] in v's dtype (undefined at padding), and the state after the last token,
        [batch, heads, K, V] in fp32 (fp64 if an input is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv
    2312.06635, sections 2 and 4.
    """
    log_decay = _no_decay(v) if log_decay is None else log_decay
    _check(q, k, v, log_decay, state, boundaries)
    dtype = _state_dtype(q, k, v, log_decay, state)
    precision = dtype if dtype == torch.float64 else v.dtype
    sizes = k.shape[-1], v.shape[-1], log_decay.shape[-1]
    if backend is None:
        is_short = v.shape[1] <= 1
        backend = "reference" if is_short else default_matrix_backend(v.device, precision, sizes)
    check_matrix_backend(backend, v.device, precision, sizes)
    state = _zero_state(k, v, dtype) if state is None else state.to(dtype)
    k, v, log_decay, starts = _without_padding(k, v, log_decay, boundaries)
    if v.shape[1] == 0:
        return torch.zeros_like(v), state.clone()
    if backend == "fla":
        return fla_scan(q, k, v, log_decay, state, starts)
    scan = _torch_scan if backend == "torch" else reference_scan
    return scan(q, k, v, _with_starts(log_decay, starts), state)


@torch.no_grad()
def matrix_scan_summary(
    k: Tensor, v: Tensor, log_decay: Tensor | None, *, boundaries: Boundaries = NO_BOUNDARIES
) -> tuple[Tensor, Tensor]:
    """What a slice of tokens does to a state: it maps S to decay[..., None] * S + last.

    Returns the product of all decays [batch, heads, K] and the last state from zero [batch, heads, K, V], in
    the dtype of the state and without a graph, as context_parallel.py exchanges them between processes.
    Arguments and errors are those of `matrix_scan`.
    """
    log_decay = _no_decay(v) if log_decay is None else log_decay
    _check(k, k, v, log_decay, None, boundaries)
    state = _zero_state(k, v, _state_dtype(k, v, log_decay))
    k, v, log_decay, starts = _without_padding(k, v, log_decay, boundaries)
    if v.shape[1] == 0:
        decay = torch.ones_like(state[..., 0])
    else:
        decay, state = summarize(k, v, _with_starts(log_decay, starts), state)
    return decay.expand(state.shape[:-1]).contiguous(), state


def reference_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as defined, one token after another; at least one token, no boundaries."""
    dtype, y = state.dtype, []
    for q_t, k_t, v_t, log_decay_t in zip(*(x.unbind(1) for x in (q, k, v, log_decay)), strict=True):
        decay = log_decay_t.to(dtype).exp().unsqueeze(-1)
        state = decay * state + k_t.to(dtype).unsqueeze(-1) * v_t.to(dtype).unsqueeze(-2)
        y.append((q_t.to(dtype).unsqueeze(-1) * state).sum(-2))
    return torch.stack(y, dim=1).to(v.dtype), state


# The torch backend as an operator.


def _scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return torch_forward(q, k, v, log_decay, state)


def _fake_scan(q, k, v, log_decay, state):
    return torch.empty_like(v, memory_format=torch.contiguous_format), state.new_empty(state.shape)


def _scan_backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch_backward(q, k, v, log_decay, state, grad_y, grad_last)


def _fake_scan_backward(q, k, v, log_decay, state, grad_y, grad_last):
    inputs = (q, k, v, log_decay, state)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


_backward_operator = define("matrix_scan_backward_torch", _scan_backward, _fake_scan_backward)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_y: Tensor | None, grad_last: Tensor | None) -> tuple:
    q, k, v, log_decay, state = ctx.saved_tensors
    grad_y = torch.zeros_like(v) if grad_y is None else grad_y
    grad_last = torch.zeros_like(state) if grad_last is None else grad_last
    return _backward_operator(q, k, v, log_decay, state, grad_y, grad_last)


_torch_scan = define("matrix_scan_torch", _scan, _fake_scan, _differentiate, _save)


# Arguments.


@torch.compiler.assume_constant_result
def default_matrix_backend(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str:
    """The fastest backend for tensors of `dtype` on `device`, for heads of these sizes.

    On a GPU this is "fla", unless the numbers are fp64, or are fp32 and torch must not round them to TF32
    (`torch.set_float32_matmul_precision`). Logs a warning if its kernel cannot run, or if its results differ
    from those of "torch".
    """
    is_exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if device.type != "cuda" or dtype == torch.float64 or is_exact:
        return "torch"
    problem = fla_problem(device, dtype, sizes)
    if problem is None:
        return "fla"
    logger.warning_once(
        f"warning: the kernels of flash-linear-attention cannot run on {device}: {problem}; "
        "the torch backend takes their place, with the same results and more memory traffic"
    )
    return "torch"


@torch.compiler.assume_constant_result
def check_matrix_backend(backend: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
    """Raises ValueError if `backend` does not exist, or cannot run on tensors of `dtype` on `device`."""
    if backend not in MATRIX_BACKENDS:
        choice = f"choose one of {', '.join(MATRIX_BACKENDS)}, or none for the fastest here"
        raise ValueError(f"There is no backend {backend!r} of the matrix scan; {choice}.")
    problem = fla_problem(device, dtype, sizes) if backend == "fla" else None
    if problem is not None:
        raise ValueError(
            f"The kernels of flash-linear-attention cannot run here: {problem}; "
            "use another backend, or none for the fastest."
        )


def _no_decay(v: Tensor) -> Tensor:
    return torch.zeros_like(v[..., :1], dtype=at_least_fp32(v[:0]).dtype)


def _state_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _zero_state(k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    batch, _, heads, num_keys = k.shape
    return k.new_zeros(batch, heads, num_keys, v.shape[-1], dtype=dtype)


def _without_padding(
    k: Tensor, v: Tensor, log_decay: Tensor, boundaries: Boundaries
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """k, v, log_decay and document starts, such that padded tokens leave the state as it is."""
    starts = boundaries.document_starts
    if (is_pad := boundaries.padding(v.shape[1])) is None:
        return k, v, log_decay, starts
    k, v, log_decay = (x.masked_fill(is_pad[..., None, None], 0) for x in (k, v, log_decay))
    return k, v, log_decay, None if starts is None else starts & ~is_pad


def _with_starts(log_decay: Tensor, starts: Tensor | None) -> Tensor:
    """log_decay with a = 0 where a document starts."""
    return log_decay if starts is None else log_decay.masked_fill(starts[..., None, None], -torch.inf)


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, boundaries: Boundaries
) -> None:
    """Raises ValueError where shapes, dtypes or devices do not fit each other."""
    if k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "matrix_scan takes k [batch, time, heads, K] and v [batch, time, heads, V], "
            f"but got {tuple(k.shape)} and {tuple(v.shape)}."
        )
    (*rows, num_keys), num_values = k.shape, v.shape[-1]
    batch, time, heads = rows
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "v": (v, [(*rows, num_values)]),
        "q": (q, [(*rows, num_keys)]),
        "log_decay": (log_decay, [(*rows, num_keys), (*rows, 1)]),
        "state": (state, [(batch, heads, num_keys, num_values)]),
        "document_starts": (boundaries.document_starts, [(batch, time)]),
        "lengths": (boundaries.lengths, [(batch,)]),
    }
    for name, (tensor, allowed) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) not in allowed:
            shape = " or ".join(map(str, allowed))
            raise ValueError(f"matrix_scan takes {name} of shape {shape}, but got {tuple(tensor.shape)}.")
        if tensor.device != k.device:
            raise ValueError(
                f"matrix_scan takes tensors on one device, but {name} is on {tensor.device} "
                f"and k on {k.device}."
            )
    for name, tensor in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("state", state)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"matrix_scan takes floating-point tensors, but {name} is {tensor.dtype}.")
    starts = boundaries.document_starts
    if starts is not None and starts.dtype != torch.bool:
        raise ValueError(f"matrix_scan takes document_starts as bool, but got {starts.dtype}.")
