"""RMS norm, causal convolution and gated activation on the CPU, in one pass over memory each.

Tasks are blocks of ROWS consecutive tokens, and gradients of weights are first summed within a block. So
results do not depend on the number of threads.
"""

# pyright: reportPossiblyUnboundVariable=false

import torch
from torch import Tensor

from .numba_support import as_numpy, is_available, run_tasks

ROWS = 64  # tokens of a task

if is_available():
    import numpy as np

    from .numba_support import (
        ONE,
        ZERO,
        kernel,
        load_input,
        load_state,
        multiply_add,
        reduction,
        sigmoid,
        store_output,
        store_state,
    )

    @reduction
    def _dot(x, y, scale):
        """sum of x * y * scale over three rows, in any order (vectorised)."""
        total = ZERO
        for d in range(x.size):
            total += load_input(x, d) * load_input(y, d) * load_input(scale, d)
        return total

    @kernel
    def _norm_forward(x, weight, ones, eps, y, inverse, rows, first, last):
        """x [N, H] -> y [N, H] and 1 / rms, [N]."""
        for n in range(first * rows, min(last * rows, x.shape[0])):
            x_n, y_n = x[n], y[n]
            scale = ONE / np.sqrt(_dot(x_n, x_n, ones) / np.float32(x.shape[1]) + eps)
            inverse[n] = scale
            for d in range(x.shape[1]):
                store_output(y_n, d, load_input(x_n, d) * scale * load_input(weight, d))

    @kernel
    def _norm_backward(x, weight, inverse, grad_y, dx, d_weight, rows, first, last):
        """dx [N, H]; d_weight [blocks, H] by block. With n = x / rms: dx = (w g - n * mean(w g n)) / rms."""
        for block in range(first, last):
            d_w = d_weight[block]
            for n in range(block * rows, min((block + 1) * rows, x.shape[0])):
                x_n, g_n, dx_n, scale = x[n], grad_y[n], dx[n], inverse[n]
                mean = _dot(x_n, g_n, weight) * scale * scale / np.float32(x.shape[1])
                for d in range(x.shape[1]):
                    value, weighted = load_input(x_n, d), load_input(g_n, d) * scale
                    store_state(d_w, d, multiply_add(weighted, value, load_state(d_w, d)))
                    store_output(dx_n, d, weighted * load_input(weight, d) - value * scale * mean)

    @kernel
    def _conv_forward(x, weight, state, reach, y, row_blocks, rows, first, last):
        """x, y [B, T, H]; weight [K, H], tap j of t-j; state [B, K-1, H]; reach [B, T] or [0, 0]."""
        time, width, taps = x.shape[1], x.shape[2], weight.shape[0]
        accumulator = np.empty(width, np.float32)
        for task in range(first, last):
            row, start = task // row_blocks, (task % row_blocks) * rows
            for t in range(start, min(start + rows, time)):
                x_t, y_t, w = x[row, t], y[row, t], weight[0]
                for d in range(width):
                    store_state(accumulator, d, load_input(x_t, d) * load_input(w, d))
                for j in range(1, taps if reach.size == 0 else min(taps, reach[row, t] + 1)):
                    source, w = x[row, t - j] if t >= j else state[row, taps - 1 + t - j], weight[j]
                    for d in range(width):
                        store_state(
                            accumulator,
                            d,
                            multiply_add(load_input(source, d), load_input(w, d), load_state(accumulator, d)),
                        )
                for d in range(width):
                    store_output(y_t, d, load_state(accumulator, d))

    @kernel
    def _conv_backward(x, weight, state, reach, grad_y, dx, d_weight, d_state, row_blocks, rows, first, last):
        """dx [B, T, H], d_state [B, K-1, H]; d_weight [tasks, K, H] by task."""
        time, width, taps = x.shape[1], x.shape[2], weight.shape[0]
        accumulator = np.empty(width, np.float32)
        for task in range(first, last):
            row, start = task // row_blocks, (task % row_blocks) * rows
            begin = 1 - taps if start == 0 else start  # the state's inputs are tokens -(K-1) .. -1
            for t in range(begin, min(start + rows, time)):
                accumulator[:] = ZERO
                for j in range(taps):
                    if 0 <= t + j < time and (reach.size == 0 or reach[row, t + j] >= j):
                        g, w = grad_y[row, t + j], weight[j]
                        for d in range(width):
                            store_state(
                                accumulator,
                                d,
                                multiply_add(load_input(g, d), load_input(w, d), load_state(accumulator, d)),
                            )
                out = dx[row, t] if t >= 0 else d_state[row, taps - 1 + t]
                for d in range(width):
                    store_output(out, d, load_state(accumulator, d))
                if t < 0:
                    continue
                g = grad_y[row, t]
                for j in range(taps if reach.size == 0 else min(taps, reach[row, t] + 1)):
                    source, d_w = x[row, t - j] if t >= j else state[row, taps - 1 + t - j], d_weight[task, j]
                    for d in range(width):
                        store_state(
                            d_w, d, multiply_add(load_input(g, d), load_input(source, d), load_state(d_w, d))
                        )

    @kernel
    def _swiglu_forward(x, y, rows, first, last):
        """x [N, 2 I] = gate | up -> y [N, I]."""
        width = y.shape[1]
        for n in range(first * rows, min(last * rows, y.shape[0])):
            gate, up, y_n = x[n, :width], x[n, width:], y[n]
            for d in range(width):
                g = load_input(gate, d)
                store_output(y_n, d, g * sigmoid(g) * load_input(up, d))

    @kernel
    def _swiglu_backward(x, grad_y, dx, rows, first, last):
        """dx [N, 2 I]."""
        width = grad_y.shape[1]
        for n in range(first * rows, min(last * rows, grad_y.shape[0])):
            gate, up, g_n, d_gate, d_up = x[n, :width], x[n, width:], grad_y[n], dx[n, :width], dx[n, width:]
            for d in range(width):
                g, gradient = load_input(gate, d), load_input(g_n, d)
                s = sigmoid(g)
                store_output(d_gate, d, gradient * load_input(up, d) * s * multiply_add(g, ONE - s, ONE))
                store_output(d_up, d, gradient * g * s)


def _blocks(num_rows: int) -> int:
    return -(-num_rows // ROWS)


def _run(kernel_function, tensors: tuple, extra: tuple, num_tasks: int) -> None:
    run_tasks(
        kernel_function, (*(as_numpy(x) if isinstance(x, Tensor) else x for x in tensors), *extra), num_tasks
    )


def norm_forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [N, H], weight [H] fp32 -> y [N, H] in `dtype`, 1 / rms [N] fp32."""
    y, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
    _run(
        _norm_forward,
        (x, weight, torch.ones_like(weight), np.float32(eps), y, inverse),
        (ROWS,),
        _blocks(len(x)),
    )
    return y, inverse


def norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """dx in x's dtype, d_weight [H] fp32."""
    dx, d_weight = torch.empty_like(x), x.new_zeros(_blocks(len(x)), x.shape[1], dtype=torch.float32)
    _run(_norm_backward, (x, weight, inverse, grad_y, dx, d_weight), (ROWS,), _blocks(len(x)))
    return dx, d_weight.sum(0)


def conv_forward(x: Tensor, weight: Tensor, state: Tensor, reach: Tensor | None) -> Tensor:
    """x [B, T, H], weight [K, H] fp32, state [B, K-1, H] in x's dtype, reach int64 [B, T] -> y like x."""
    y, row_blocks = torch.empty_like(x), _blocks(x.shape[1])
    reach = x.new_empty(0, 0, dtype=torch.int64) if reach is None else reach.contiguous()
    _run(_conv_forward, (x, weight, state, reach, y), (row_blocks, ROWS), len(x) * row_blocks)
    return y


def conv_backward(
    x: Tensor, weight: Tensor, state: Tensor, reach: Tensor | None, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, d_weight [K, H] fp32, d_state like state."""
    row_blocks = _blocks(x.shape[1])
    dx, d_state = torch.empty_like(x), torch.zeros_like(state)
    d_weight = weight.new_zeros(len(x) * row_blocks, *weight.shape)
    reach = x.new_empty(0, 0, dtype=torch.int64) if reach is None else reach.contiguous()
    _run(
        _conv_backward,
        (x, weight, state, reach, grad_y, dx, d_weight, d_state),
        (row_blocks, ROWS),
        len(x) * row_blocks,
    )
    return dx, d_weight.sum(0), d_state


def swiglu_forward(x: Tensor) -> Tensor:
    """x [N, 2 I] -> [N, I]."""
    y = x.new_empty(len(x), x.shape[1] // 2)
    _run(_swiglu_forward, (x, y), (ROWS,), _blocks(len(x)))
    return y


def swiglu_backward(x: Tensor, grad_y: Tensor) -> Tensor:
    """dx like x."""
    dx = torch.empty_like(x)
    _run(_swiglu_backward, (x, grad_y, dx), (ROWS,), _blocks(len(x)))
    return dx
