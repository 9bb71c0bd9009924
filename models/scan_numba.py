"""The scan on the CPU: one pass over memory, compiled by numba.

Each task is one row of the batch and one stripe of channels. It walks through time with the carried state of its stripe in cache, so every
element of a, b and h crosses the memory bus once. The inner loop runs over contiguous channels and vectorises; stripes are wide because the
memory system likes long runs. Channels are independent, so the result does not depend on the number of threads.

numba has no bfloat16: such arrays come in as their bits (uint16), are widened in registers, and are rounded to nearest even on the way out.
Kernels run on plain Python threads without the GIL, as many as torch uses: numba's own thread pool may neither be forked nor entered twice.
"""

# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false
# (numba may be missing, and rewrites the signatures of its intrinsics)

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .scan_torch import accumulate_dtype

try:  # optional: without numba the torch backend serves the CPU, and remote code loads all the same
    import numba
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic
except ImportError:
    numba = None

STRIPE = 512  # channels a task walks at once: 2 KB of fp32, measured best between 256 and 1024


def is_available() -> bool:
    """Whether numba is installed."""
    return numba is not None


if numba is not None:

    @intrinsic
    def widen(typingctx, value):
        """A number to compute with: the bits of a bfloat16 (uint16) as float32, floats as they are."""
        if value != types.uint16:
            return value(value), lambda context, builder, signature, args: args[0]

        def codegen(context, builder, signature, args):
            bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(bits, ir.FloatType())

        return types.float32(value), codegen

    @intrinsic
    def narrow(typingctx, value, like):
        """`value` as an element of the array `like` holds it: float32 rounded to nearest even where it holds bfloat16 bits."""
        if like.dtype != types.uint16:
            target = like.dtype
            return target(value, like), lambda context, builder, signature, args: context.cast(builder, args[0], value, target)

        def codegen(context, builder, signature, args):
            int32 = ir.IntType(32)
            bits = builder.bitcast(context.cast(builder, args[0], value, types.float32), int32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(int32, 16)), ir.Constant(int32, 1))
            rounded = builder.add(bits, builder.add(odd, ir.Constant(int32, 0x7FFF)))
            magnitude = builder.and_(bits, ir.Constant(int32, 0x7FFFFFFF))
            is_nan = builder.icmp_unsigned(">", magnitude, ir.Constant(int32, 0x7F800000))
            rounded = builder.select(is_nan, ir.Constant(int32, 0x7FC00000), rounded)
            return builder.trunc(builder.lshr(rounded, ir.Constant(int32, 16)), ir.IntType(16))

        return types.uint16(value, like), codegen

    kernel = functools.partial(numba.njit, nogil=True, cache=True, fastmath={"contract"}, error_model="numpy", boundscheck=False)

    @kernel
    def _forward_kernel(a, b, h0, h, h_last, stripe, first, last):
        """h and h_last for the tasks first..last; a, b, h [batch, time, width], h0 and h_last [batch, width]."""
        time, width = b.shape[1], b.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            carry = h_last[row, low:high]
            carry[:] = h0[row, low:high]
            for t in range(time):
                a_t, b_t, h_t = a[row, t, low:high], b[row, t, low:high], h[row, t, low:high]
                for d in range(high - low):
                    carry[d] = widen(a_t[d]) * carry[d] + widen(b_t[d])
                    h_t[d] = narrow(carry[d], h)

    @kernel
    def _backward_kernel(a, h, h0, grad_h, total, da, db, stripe, first, last):
        """da, db [batch, time, width] for the tasks first..last; `total` [batch, width] holds dh_last and becomes dh0."""
        time, width = h.shape[1], h.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            carry = total[row, low:high]
            for t in range(time - 1, 0, -1):
                a_t, g_t, previous = a[row, t, low:high], grad_h[row, t, low:high], h[row, t - 1, low:high]
                da_t, db_t = da[row, t, low:high], db[row, t, low:high]
                for d in range(high - low):
                    gradient = carry[d] + widen(g_t[d])
                    db_t[d] = narrow(gradient, db)
                    da_t[d] = narrow(gradient * widen(previous[d]), da)
                    carry[d] = gradient * widen(a_t[d])
            for d in range(low, high):
                if time > 0:
                    gradient = total[row, d] + widen(grad_h[row, 0, d])
                    db[row, 0, d] = narrow(gradient, db)
                    da[row, 0, d] = narrow(gradient * h0[row, d], da)
                    total[row, d] = gradient * widen(a[row, 0, d])


@functools.lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="minrnn-scan")


def run_tasks(kernel_function, arguments: tuple, num_tasks: int) -> None:
    """Call `kernel_function(*arguments, first, last)` so that the tasks are spread evenly over torch's number of threads."""
    num_threads = max(1, min(torch.get_num_threads(), num_tasks))
    if num_threads == 1:
        kernel_function(*arguments, 0, num_tasks)
        return
    edges = [num_tasks * i // num_threads for i in range(num_threads + 1)]
    pool = _pool(torch.get_num_threads())
    others = [pool.submit(kernel_function, *arguments, low, high) for low, high in itertools.pairwise(edges[1:])]
    kernel_function(*arguments, edges[0], edges[1])
    for other in others:
        other.result()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory; bfloat16 as its bits."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _native(tensor: Tensor) -> Tensor:
    """Contiguous, and in a dtype the kernels know: fp16 goes through fp32."""
    return (tensor.float() if tensor.dtype == torch.float16 else tensor).contiguous()


def _stripe(batch: int, width: int) -> int:
    """Stripe width: STRIPE, or less where the batch alone does not give every thread a task."""
    if batch >= torch.get_num_threads():
        return STRIPE
    return min(STRIPE, -(-width // torch.get_num_threads()) or 1)


def forward(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """See `scan.linear_scan`."""
    batch, _, width = b.shape
    dtype, b_dtype = accumulate_dtype(a, b), b.dtype
    a, b = _native(a), _native(b)
    h, h_last = torch.empty_like(b), h0.to(dtype, copy=True).contiguous()
    stripe = _stripe(batch, width)
    arrays = tuple(map(as_numpy, (a, b, h0.to(dtype).contiguous(), h, h_last)))
    run_tasks(_forward_kernel, (*arrays, stripe), batch * -(-width // stripe))
    return h.to(b_dtype), h_last


def backward(a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan`."""
    batch, _, width = h.shape
    dtype, a_dtype, h_dtype = accumulate_dtype(a, h), a.dtype, h.dtype
    a, h = _native(a), _native(h)
    da, db, total = torch.empty_like(a), torch.empty_like(h), grad_last.to(dtype, copy=True).contiguous()
    stripe = _stripe(batch, width)
    arrays = tuple(map(as_numpy, (a, h, h0.to(dtype).contiguous(), _native(grad_h), total, da, db)))
    run_tasks(_backward_kernel, (*arrays, stripe), batch * -(-width // stripe))
    return da.to(a_dtype), db.to(h_dtype), total
