"""The matrix scan with the Triton kernels of flash-linear-attention, an optional package.

Its `chunk_gla` takes one decay per key channel, its `chunk_simple_gla` one per head. Their sequences start at
`cu_seqlens` in one row of tokens, so document starts are exact: every document is a sequence, and begins from
zero, or from the row's state.

A kernel is used only if it agrees with the torch backend, in values and in gradients. This is tested once per
process, device, dtype and size of a head on a short input, because a wrong result is not an error: it depends
on the versions of the package, of Triton, and of the driver. The sizes are the model's own, because the first
call for a size compiles for minutes (230 s for K = V = 16 on an H200 with 16 cores). With Triton 3.4 to 3.7.0
on Hopper, the package itself refuses the gradients of `chunk_simple_gla`.

Signatures: flash-linear-attention 0.6.0, fla/ops/gla/chunk.py and fla/ops/simple_gla/chunk.py.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from .matrix_scan_torch import backward, forward

Sizes = tuple[int, int, int]
"""K, V, and the number of decays of a head: K, or 1 for the whole head."""
TOLERANCE = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest difference from the torch backend, relative to the largest value: a few roundings of the products'
dtype, which for fp32 is TF32."""
PROBE_DECAYS = {"decays of all sizes": 1.0, "decays near 1": 1e-3, "decays near 0": 50.0}
"""Size of -log a in the comparison."""
MULTIPLE = 16
"""K and V are padded to multiples of this: the kernels refuse odd ones in 16 bit, and products need 16."""
SMALLEST_LOG_DECAY = -50.0
"""The kernels subtract cumulative sums, where -inf gives NaN. e^-50 is 0 within the rounding of fp32."""


@functools.cache
def _kernels() -> tuple[Callable, Callable]:
    """(chunk_gla, chunk_simple_gla). Raises ImportError."""
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ImportError("the package flash-linear-attention is missing, or older than 0.6") from error
    return chunk_gla, chunk_simple_gla


def fla_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `matrix_scan.matrix_scan`. The kernels take one dtype: q and k are converted to v's."""
    num_keys, num_values = k.shape[-1], v.shape[-1]
    is_per_channel = log_decay.shape[-1] == num_keys
    log_decay = _padded(log_decay) if is_per_channel else log_decay
    state = F.pad(state, (0, -num_values % MULTIPLE, 0, -num_keys % MULTIPLE))
    y, last = _run(_padded(q.to(v.dtype)), _padded(k.to(v.dtype)), _padded(v), log_decay, state, starts)
    return y[..., :num_values], last[..., :num_keys, :num_values]


def _padded(x: Tensor) -> Tensor:
    """x with columns of zeros up to a multiple of MULTIPLE. Zeros of k and v leave the state as it is."""
    return F.pad(x, (0, -x.shape[-1] % MULTIPLE))


def _run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `fla_scan`, for sizes that the kernels take."""
    per_channel, per_head = _kernels()
    log_decay = log_decay.float().clamp(min=SMALLEST_LOG_DECAY)
    tokens = q, k, v, log_decay
    kernel = per_channel
    if log_decay.shape[-1] != k.shape[-1]:
        kernel, tokens = per_head, (*tokens[:3], log_decay.squeeze(-1))
    run = functools.partial(kernel, scale=1.0, output_final_state=True)
    with torch.autocast(v.device.type, enabled=False):
        if starts is None:
            return run(*tokens, initial_state=state)
        sequences, initial, last = _sequences(starts, state)
        y, final = run(
            *(x.flatten(0, 1).unsqueeze(0) for x in tokens), initial_state=initial, cu_seqlens=sequences
        )
        return y.view(v.shape), final[last]


def _sequences(starts: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Documents as sequences of one row of batch * time tokens.

    Returns where they begin and the end of all [sequences + 1], the states before them [sequences, heads, K,
    V], and the index of each row's last sequence [batch].
    """
    is_first = starts.clone()
    is_first[:, 0] = True
    first_tokens = is_first.flatten().nonzero().flatten()
    sequences = torch.cat([first_tokens, first_tokens.new_tensor([starts.numel()])])
    after = is_first.sum(1).cumsum(0)  # number of sequences up to each row's end
    state = state.masked_fill(starts[:, 0, None, None, None], 0)
    initial = state.new_zeros(len(first_tokens), *state.shape[1:])
    initial = initial.index_copy(0, after - is_first.sum(1), state)
    return sequences, initial, after - 1


@functools.cache
def _failure(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    """Why a kernel cannot be used on a device, in one line; None if it agrees."""

    def probe() -> str | None:
        try:
            _compare(device, dtype, sizes)
        except Exception as error:  # Triton's own, the compiler's, the driver's, the file system's
            lines = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"
        return None

    with ThreadPoolExecutor(1) as thread:  # without the caller's tracing, autocast or inference mode
        return thread.submit(probe).result()


def _compare(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
    """Run a kernel and the torch backend. Raises ArithmeticError where they differ."""
    (num_keys, num_values, num_decays), (batch, time, heads) = sizes, (2, 70, 2)
    keys, values = (batch, time, heads, num_keys), (batch, time, heads, num_values)
    states = batch, heads, num_keys, num_values
    shapes = keys, keys, values, (batch, time, heads, num_decays), states, values, states
    for name, size in PROBE_DECAYS.items():
        random = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=random).to(device) for shape in shapes]
        tensors[3] = (-size * tensors[3].abs()).clamp(min=SMALLEST_LOG_DECAY)
        for i in (0, 1, 2, 5):
            tensors[i] = tensors[i].to(dtype)
        for result, difference in _differences(*tensors).items():
            if not difference <= TOLERANCE[dtype]:
                raise ArithmeticError(
                    f"with {name}, {num_decays} in each head of K = {num_keys} and V = {num_values}, "
                    f"{result} differs from the torch backend's by {difference:.2g} of the largest value"
                )


def _differences(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, grad_y: Tensor, grad_last: Tensor
) -> dict[str, float]:
    """Of results and gradients of the kernels from the torch backend's, relative to the largest value."""
    starts = torch.zeros(v.shape[:2], dtype=torch.bool, device=v.device)
    starts[0, 0] = starts[0, 40] = starts[1, 65] = True
    q, k, v, log_decay, state = inputs = tuple(x.requires_grad_() for x in (q, k, v, log_decay, state))
    results = fla_scan(q, k, v, log_decay, state, starts)
    gradients = torch.autograd.grad(results, inputs, (grad_y, grad_last))
    with torch.no_grad():
        log_decay = log_decay.masked_fill(starts[..., None, None], -torch.inf)
        exact = q, k, v, log_decay, state
        expected = *forward(*exact), *backward(*exact, grad_y, grad_last)
    names = (
        "y",
        "the last state",
        *(f"the gradient of {x}" for x in ("q", "k", "v", "the decay", "the state")),
    )
    return {
        name: ((actual.float() - other.float()).abs().max() / other.float().abs().max()).item()
        for name, actual, other in zip(names, (*results, *gradients), expected, strict=True)
    }


def fla_problem(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    """Why flash-linear-attention cannot run on tensors of `dtype` on `device`; None if it can."""
    try:
        _kernels()
    except ImportError as error:
        return str(error)
    if device.type != "cuda":
        return f"they run on a GPU, and the tensors are on {device}"
    if dtype == torch.float64:
        return "they compute in fp32 at most, and the tensors are fp64"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _failure(torch.device("cuda", index), dtype, sizes)
