"""Building blocks of the numba kernels: typed memory access, a vectorisable exponential, threads.

numba has no bfloat16. Such arrays are passed as their bits (uint16), widened in registers, and rounded to
nearest even when they are written.

Kernels access memory through four intrinsics, which tell LLVM that inputs are never written and that outputs
and carried state do not overlap them. Without this, a loop over six arrays needs so many overlap checks at
run time that LLVM leaves it scalar.

Every operation is rounded once; `multiply_add` is one rounding for two operations. With fastmath's "contract"
the compiler would round vectors and the remainder of a row differently, and results would depend on the
number of threads.

Kernels run on plain Python threads without the GIL, as many as torch uses, because numba's own thread pool
supports neither forks nor concurrent calls. A forked child starts its own threads, and computes on one thread
until it asks for more, as a worker of torch's DataLoader does: torch's threads (OpenMP) do not survive a fork
either, and the first operation that needs them would hang.
"""

# pyright: reportPossiblyUnboundVariable=false
# (numba may be missing)

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .boundaries import Boundaries
from .kernel_cache import keep_on_disk

try:  # optional: without numba, the CPU uses torch, and remote code still loads
    import numba
    from llvmlite import ir
    from numba import types
    from numba.core import config
    from numba.extending import intrinsic

    IS_DISABLED = bool(getattr(config, "DISABLE_JIT", 0))
    if IS_DISABLED:
        numba = None
except ImportError:
    numba, IS_DISABLED = None, False


def numba_problem() -> str | None:
    """Why the numba kernels cannot be compiled; None if they can."""
    if numba is not None:
        return None
    return (
        "numba's compiler is switched off (NUMBA_DISABLE_JIT)"
        if IS_DISABLED
        else "the package numba is not installed"
    )


def is_available() -> bool:
    """Whether the kernels can be compiled."""
    return numba is not None


def serves(tensor: Tensor, backend: str | None) -> bool:
    """Whether the numba kernels compute this [batch, time, ...]: fp32 or bf16 on the CPU.

    By default they do not compute a single token of inference, where an operator call costs more than its
    work.
    """
    runs_here = (
        is_available() and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)
    )
    return runs_here and (backend == "numba" or (backend is None and not is_token_step(tensor)))


def is_token_step(x: Tensor) -> bool:
    """Whether x [batch, time, ...] has one token per row and gradients are off: a decoding step."""
    return x.shape[1:2] == (1,) and not torch.is_grad_enabled()


if numba is not None:
    INT16, INT32 = ir.IntType(16), ir.IntType(32)
    intrinsic: Callable[..., Any] = intrinsic  # called without the typing context that its definition takes

    def _scopes(builder, *names):
        """LLVM's alias scopes of these names, as metadata."""
        module = builder.module
        domain = module.add_metadata(["minrnn"])
        return module.add_metadata([module.add_metadata([f"minrnn {name}", domain]) for name in names])

    def _pointer(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.gep(array.data, [args[1]])

    def _load_intrinsic(scope):
        @intrinsic
        def load(typingctx, array, index):
            is_bf16 = array.dtype == types.uint16

            def codegen(context, builder, signature, args):
                value = builder.load(_pointer(context, builder, signature, args))
                value.set_metadata("alias.scope", _scopes(builder, scope))
                if is_bf16:
                    value = builder.bitcast(
                        builder.shl(builder.zext(value, INT32), ir.Constant(INT32, 16)), ir.FloatType()
                    )
                return value

            return (types.float32 if is_bf16 else array.dtype)(array, index), codegen

        return load

    def _rounded_bf16(builder, value):
        """The bits of the bfloat16 nearest to a float, ties to even; NaN stays NaN."""
        bits = builder.bitcast(value, INT32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(INT32, 16)), ir.Constant(INT32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(INT32, 0x7FFF)))
        magnitude = builder.and_(bits, ir.Constant(INT32, 0x7FFFFFFF))
        is_nan = builder.icmp_unsigned(">", magnitude, ir.Constant(INT32, 0x7F800000))
        rounded = builder.select(is_nan, ir.Constant(INT32, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(INT32, 16)), INT16)

    def _store_intrinsic(scope, *other_scopes):
        @intrinsic
        def store(typingctx, array, index, value):
            def codegen(context, builder, signature, args):
                if array.dtype == types.uint16:
                    element = _rounded_bf16(builder, context.cast(builder, args[2], value, types.float32))
                else:
                    element = context.cast(builder, args[2], value, array.dtype)
                stored = builder.store(element, _pointer(context, builder, signature, args))
                stored.set_metadata("alias.scope", _scopes(builder, scope))
                stored.set_metadata("noalias", _scopes(builder, *other_scopes))
                return context.get_dummy_value()

            return types.void(array, index, value), codegen

        return store

    # load(array, i) -> float and store(array, i, float), for contiguous 1-d arrays. `state` is read and
    # written by the same loop.
    load_input = _load_intrinsic("input")
    load_state = _load_intrinsic("state")
    store_state = _store_intrinsic("state", "input", "output")
    store_output = _store_intrinsic("output", "input", "state")

    compiled: Callable[..., Any] = functools.partial(
        numba.njit, nogil=True, error_model="numpy", boundscheck=False
    )

    def kernel(function: Callable, **options: Any) -> Any:
        """Decorator: compile at the first call with each combination of argument types; keep it on disk."""
        return keep_on_disk(compiled(function, **options))

    # May add in any order, so it can be vectorised.
    reduction: Callable[..., Any] = functools.partial(kernel, fastmath={"contract", "reassoc"})
    inlined: Callable[..., Any] = functools.partial(numba.njit, error_model="numpy", forceinline=True)

    @intrinsic
    def multiply_add(typingctx, x, y, z):
        """x * y + z, rounded once (on machines with fused multiply-add)."""
        widest = typingctx.unify_types(x, y, z)

        def codegen(context, builder, signature, args):
            factors = [
                context.cast(builder, arg, kind, widest)
                for arg, kind in zip(args, signature.args, strict=True)
            ]
            real = factors[0].type
            return builder.call(
                builder.module.declare_intrinsic("llvm.fmuladd", [real], ir.FunctionType(real, [real] * 3)),
                factors,
            )

        return widest(x, y, z), codegen

    @intrinsic
    def _power_of_two(typingctx, shifted):
        """2^n as float32, for `shifted` = n + 1.5 * 2^23: the low bits of its mantissa are n."""

        def codegen(context, builder, signature, args):
            exponent = builder.shl(builder.bitcast(args[0], INT32), ir.Constant(INT32, 23))
            return builder.bitcast(builder.add(exponent, ir.Constant(INT32, 0x3F800000)), ir.FloatType())

        return types.float32(types.float32), codegen

    F = np.float32
    ZERO, HALF, ONE = F(0), F(0.5), F(1)
    _LOWEST, _HIGHEST = F(-87.3), F(88.3)  # exp stays a normal number
    _SHIFT, _LOG2_E, _LN2_HIGH, _LN2_LOW = F(1.5 * 2**23), F(1.44269504), F(-0.693359375), F(2.12194440e-4)
    _C2, _C3, _C4, _C5, _C6, _C7 = map(
        F,
        (
            5.0000001201e-1,
            1.6666665459e-1,
            4.1665795894e-2,
            8.3334519073e-3,
            1.3981999507e-3,
            1.9875691500e-4,
        ),
    )

    @inlined
    def _exp_parts(x):
        """e^r - 1 and 2^n of e^x = 2^n e^r, |r| <= log(2) / 2, in float32 (Cephes); x in -87.3 .. 88.3."""
        x = _LOWEST if x < _LOWEST else x  # written so that NaN passes
        x = _HIGHEST if x > _HIGHEST else x
        shifted = multiply_add(x, _LOG2_E, _SHIFT)
        n = shifted - _SHIFT
        r = multiply_add(n, _LN2_LOW, multiply_add(n, _LN2_HIGH, x))
        p = multiply_add(multiply_add(multiply_add(_C7, r, _C6), r, _C5), r, _C4)
        p = multiply_add(multiply_add(p, r, _C3), r, _C2)
        return multiply_add(p * r, r, r), _power_of_two(shifted)

    @inlined
    def exp(x):
        """e^x in float32, to about one unit in the last place, clamped to e^-87.3 .. e^88.3."""
        grown, scale = _exp_parts(x)
        return (grown + ONE) * scale

    @inlined
    def expm1(x):
        """e^x - 1 in float32, to about two units in the last place, up to x = 88.3."""
        grown, scale = _exp_parts(x)
        return multiply_add(grown, scale, scale - ONE)

    @inlined
    def sigmoid(x):
        """1 / (1 + e^-x)."""
        return ONE / (ONE + exp(-x))


@functools.lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="minrnn-scan")


def _begin_forked_process() -> None:
    """A forked process has no threads: forget the parent's pool, and set torch to one thread."""
    _pool.cache_clear()
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_forked_process)


def run_tasks(kernel_function, arguments: tuple, num_tasks: int) -> None:
    """Call `kernel_function(*arguments, first, last)` on equal shares of the tasks, one per torch thread."""
    num_threads = max(1, min(torch.get_num_threads(), num_tasks))
    if num_threads == 1:
        kernel_function(*arguments, 0, num_tasks)
        return
    edges = [num_tasks * i // num_threads for i in range(num_threads + 1)]
    pool = _pool(torch.get_num_threads())
    futures = [
        pool.submit(kernel_function, *arguments, low, high) for low, high in itertools.pairwise(edges[1:])
    ]
    kernel_function(*arguments, edges[0], edges[1])
    for future in futures:
        future.result()


def boundary_arrays(boundaries: Boundaries, batch: int, time: int) -> tuple[Tensor, Tensor]:
    """Document starts [batch, time], [0, 0] for none, and lengths int64 [batch], for the kernels."""
    starts, lengths = boundaries.document_starts, boundaries.lengths
    starts = torch.empty(0, 0, dtype=torch.bool, device="cpu") if starts is None else starts
    lengths = torch.full((batch,), time, device="cpu") if lengths is None else lengths.to(torch.int64)
    return starts.contiguous(), lengths.contiguous()


def stripe_width(batch: int, width: int) -> int:
    """Number of channels per task: all of them, unless many threads would be idle.

    Whole rows are contiguous in memory, and the hardware prefetches them. Half rows are read at a third of
    that rate, so two threads with half rows are slower than one thread with whole rows.
    """
    threads_per_row = torch.get_num_threads() // max(batch, 1)
    return max(1, -(-width // threads_per_row)) if threads_per_row >= 4 else max(1, width)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory; bfloat16 as its bits, bool as bytes."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bool else tensor.numpy()
