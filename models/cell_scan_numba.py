"""Cell and scan on the CPU in one pass: pre-activations in, outputs out; decay and input are never stored.

One task processes one row of the batch, token after token. A token's projections are adjacent in memory,
[gates | candidate | output gate], so each row is read sequentially; the carried state stays in cache. The
backward pass goes from the last token to the first, recomputes the gates, and writes the gradient of all
projections as one tensor.

Each combination of cell, candidate activation and output gate is a kernel of its own, compiled at first use
and kept on disk. The choice is a constant in the inner loop, which can then be vectorised.
"""

# pyright: reportPossiblyUnboundVariable=false

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .cell_spec import CellInputs, CellSpec
from .numba_support import as_numpy, is_available, run_tasks, stripe_width

_CELL_CODES = {"mingru": 0, "minlstm": 1}
_ACTIVATION_CODES = {"none": 0, "g": 1, "tanh": 2, "silu": 3}

if is_available():
    import numpy as np

    from .numba_support import (
        HALF,
        ONE,
        ZERO,
        exp,
        inlined,
        kernel,
        load_input,
        load_state,
        multiply_add,
        sigmoid,
        store_output,
        store_state,
    )

    TWO, _NEAR_ZERO = np.float32(2), np.float32(0.625)
    _T3, _T5, _T7, _T9, _T11 = map(
        np.float32,
        (-3.33332819422e-1, 1.33314422036e-1, -5.37397155531e-2, 2.06390887954e-2, -5.70498872745e-3),
    )

    @inlined
    def _both_sigmoids(x):
        """sigmoid(-x), sigmoid(x): each to full precision, from one exponential."""
        small = exp(-abs(x))
        large = ONE / (ONE + small)
        small = small * large
        return (small, large) if x >= ZERO else (large, small)

    @inlined
    def _ratio(p, q):
        """f / (f + i), i / (f + i) for f = sigmoid(p), i = sigmoid(q): positive terms without overflow."""
        top = max(max(-p, -q), ZERO)
        one, forget, enter = exp(-top), exp(-p - top), exp(-q - top)
        scale = ONE / (one + forget + (one + enter))
        return (one + enter) * scale, (one + forget) * scale

    @inlined
    def _factors(p, q, cell):
        """a, z of h_t = a h_{t-1} + z c(u), from the gates' pre-activations; the minGRU has one gate, p."""
        return _both_sigmoids(p) if cell == 0 else _ratio(p, q)

    @inlined
    def _gate_slopes(p, q, cell):
        """The derivatives of log(z / a) for p and q: dz = a z d log(z / a) = -da."""
        return (ONE, ZERO) if cell == 0 else (-sigmoid(-p), sigmoid(-q))

    @inlined
    def _tanh(u):
        """tanh(u): Cephes' polynomial around 0, where 2 sigmoid(2u) - 1 would lose digits."""
        s = u * u
        p = multiply_add(multiply_add(multiply_add(multiply_add(_T11, s, _T9), s, _T7), s, _T5), s, _T3)
        return multiply_add(p * s, u, u) if abs(u) < _NEAR_ZERO else multiply_add(TWO, sigmoid(TWO * u), -ONE)

    @inlined
    def _candidate(u, code):
        """c(u)."""
        if code == 0:
            return u
        if code == 1:
            return u + HALF if u >= ZERO else sigmoid(u)
        return _tanh(u) if code == 2 else u * sigmoid(u)

    @inlined
    def _candidate_slope(u, code):
        """c'(u)."""
        if code == 0:
            return ONE
        s = sigmoid(TWO * u if code == 2 else u)
        if code == 1:
            return ONE if u >= ZERO else s * (ONE - s)
        if code == 2:
            return np.float32(4) * s * (ONE - s)
        return s * multiply_add(u, ONE - s, ONE)

    @kernel
    def _backward_output_gate(o, h_t, g_t, d_o, carry):
        """y = h silu(o) of one token: writes d_o, and adds the gradient of h_t to `carry`."""
        for d in range(carry.size - 1, -1, -1):
            x, g = load_input(o, d), load_input(g_t, d)
            s = sigmoid(x)
            store_output(d_o, d, g * load_input(h_t, d) * s * multiply_add(x, ONE - s, ONE))
            store_state(carry, d, multiply_add(g * x, s, load_state(carry, d)))


@functools.cache
def _forward_kernel(cell: int, activation: int, gated: bool) -> Callable:
    num_gates = cell + 1

    @kernel
    def forward(projected, bias, h0, starts, lengths, y, h, h_last, decay, stripe, first, last):
        """projected [B, T, P*R], bias [G, R], h0 [B, R] -> y, h [B, T, R], h_last, decay [B, R].

        starts is [B, T] or [0, 0], lengths [B]. h is not written without an output gate; decay is not written
        if it is [0, 0].
        """
        time, width = y.shape[1], y.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            carry, bias_p, bias_q = h_last[row, low:high], bias[0, low:high], bias[num_gates - 1, low:high]
            carry[:] = h0[row, low:high]
            for t in range(time):
                tokens, y_t = projected[row, t], y[row, t, low:high]
                gate_p, gate_q, u = (
                    tokens[low:high],
                    tokens[(num_gates - 1) * width + low :],
                    tokens[num_gates * width + low :],
                )
                if starts.size > 0 and starts[row, t] and t < lengths[row]:
                    carry[:] = ZERO
                    if decay.size > 0:
                        decay[row, low:high] = ZERO
                if t < lengths[row]:
                    for d in range(high - low):
                        p, q = (
                            load_input(gate_p, d) + load_input(bias_p, d),
                            load_input(gate_q, d) + load_input(bias_q, d),
                        )
                        a, z = _factors(p, q, cell)
                        store_state(
                            carry,
                            d,
                            multiply_add(
                                a, load_state(carry, d), z * _candidate(load_input(u, d), activation)
                            ),
                        )
                    if decay.size > 0:
                        for d in range(high - low):
                            p, q = (
                                load_input(gate_p, d) + load_input(bias_p, d),
                                load_input(gate_q, d) + load_input(bias_q, d),
                            )
                            decay[row, low + d] *= _factors(p, q, cell)[0]
                if gated:
                    o, h_t = tokens[(num_gates + 1) * width + low :], h[row, t, low:high]
                    for d in range(high - low):
                        value, gate_input = load_state(carry, d), load_input(o, d)
                        store_output(h_t, d, value)
                        store_output(y_t, d, value * gate_input * sigmoid(gate_input))
                else:
                    for d in range(high - low):
                        store_output(y_t, d, load_state(carry, d))

    return forward


@functools.cache
def _backward_kernel(cell: int, activation: int, gated: bool) -> Callable:
    # Only numbers may be captured: numba would not find a kernel on disk that captures another kernel.
    num_gates = cell + 1

    @kernel
    def backward(
        projected, bias, h0, starts, lengths, h, grad_y, state, d_projected, d_bias, stripe, first, last
    ):
        """`state` [B, R] holds the gradient of h_last and is overwritten with dh0.

        d_bias [B, G, R] is the sum of each row; h0 has the dtype of h.
        """
        time, width = h.shape[1], h.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            carry, bias_p, bias_q = state[row, low:high], bias[0, low:high], bias[num_gates - 1, low:high]
            d_bias_p, d_bias_q = d_bias[row, 0, low:high], d_bias[row, num_gates - 1, low:high]
            for t in range(time - 1, -1, -1):
                tokens, d_tokens, g_t = projected[row, t], d_projected[row, t], grad_y[row, t, low:high]
                gate_p, gate_q, u = (
                    tokens[low:],
                    tokens[(num_gates - 1) * width + low :],
                    tokens[num_gates * width + low :],
                )
                d_gate_p, d_gate_q, d_u = (
                    d_tokens[low:],
                    d_tokens[(num_gates - 1) * width + low :],
                    d_tokens[num_gates * width + low :],
                )
                if gated:
                    offset = (num_gates + 1) * width + low
                    _backward_output_gate(tokens[offset:], h[row, t, low:high], g_t, d_tokens[offset:], carry)
                else:
                    for d in range(high - low - 1, -1, -1):
                        store_state(carry, d, load_state(carry, d) + load_input(g_t, d))
                if t >= lengths[row]:
                    for d in range(high - low):
                        store_output(d_gate_p, d, ZERO)
                        store_output(d_gate_q, d, ZERO)
                        store_output(d_u, d, ZERO)
                    continue
                is_start = starts.size > 0 and starts[row, t] != 0
                previous = h[row, t - 1, low:high] if t > 0 else h0[row, low:high]
                for d in range(high - low - 1, -1, -1):
                    p, q, x = (
                        load_input(gate_p, d) + load_input(bias_p, d),
                        load_input(gate_q, d) + load_input(bias_q, d),
                        load_input(u, d),
                    )
                    a, z = _factors(p, q, cell)
                    gradient = load_state(carry, d)
                    previous_h = ZERO if is_start else load_input(previous, d)
                    slope = gradient * (_candidate(x, activation) - previous_h) * a * z
                    d_p, d_q = _gate_slopes(p, q, cell)
                    store_output(d_u, d, gradient * z * _candidate_slope(x, activation))
                    store_output(d_gate_p, d, slope * d_p)
                    store_state(d_bias_p, d, multiply_add(slope, d_p, load_state(d_bias_p, d)))
                    if num_gates == 2:
                        store_output(d_gate_q, d, slope * d_q)
                        store_state(d_bias_q, d, multiply_add(slope, d_q, load_state(d_bias_q, d)))
                    store_state(carry, d, ZERO if is_start else gradient * a)

    return backward


def _boundary_arrays(inputs: CellInputs) -> tuple[Tensor, Tensor]:
    """(document starts, lengths) for the kernels; None becomes an empty array, and `time` in each row."""
    batch, time, _ = inputs.shape
    starts, lengths = inputs.boundaries.document_starts, inputs.boundaries.lengths
    starts = torch.empty(0, 0, dtype=torch.bool, device="cpu") if starts is None else starts.contiguous()
    if lengths is None:
        return starts, torch.full((batch,), time, device="cpu")
    return starts, lengths.to(torch.int64).contiguous()


def forward(
    inputs: CellInputs, spec: CellSpec, return_decay: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `cell_scan.cell_scan`; fp32 and bf16.

    Returns:
        y; h, empty without an output gate, where it equals y; h_last; decay, empty without `return_decay`.
    """
    batch, time, width = inputs.shape
    projected, h0 = inputs.projected, inputs.h0
    y = projected.new_empty(batch, time, width)
    h = torch.empty_like(y) if spec.output_gate else y.new_empty(0, 0, 0)
    h_last = torch.empty_like(h0, dtype=torch.float32, memory_format=torch.contiguous_format)
    decay = h_last.new_ones(h0.shape if return_decay else (0, 0))
    tensors = (projected.contiguous(), inputs.gate_bias.float().contiguous(), h0.float().contiguous())
    arrays = tuple(map(as_numpy, (*tensors, *_boundary_arrays(inputs), y, h, h_last, decay)))
    stripe = stripe_width(batch, width)
    run_tasks(_kernel_of(_forward_kernel, spec), (*arrays, stripe), batch * -(-width // stripe))
    return y, h if spec.output_gate else h.view(0), h_last, decay if return_decay else decay.view(0)


def backward(
    inputs: CellInputs, spec: CellSpec, h: Tensor, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`: d_projected, d_gate_bias and dh0 in fp32. `h` is y without an output gate."""
    batch, _, width = inputs.shape
    projected, gate_bias = inputs.projected.contiguous(), inputs.gate_bias.float().contiguous()
    carry = grad_last.to(torch.float32, copy=True).contiguous()
    d_projected, d_bias = torch.empty_like(projected), carry.new_zeros(batch, *gate_bias.shape)
    tensors = (projected, gate_bias, inputs.h0.to(h.dtype).contiguous(), *_boundary_arrays(inputs))
    tensors += (h.contiguous(), grad_y.contiguous(), carry, d_projected, d_bias)
    arrays, stripe = tuple(map(as_numpy, tensors)), stripe_width(batch, width)
    run_tasks(_kernel_of(_backward_kernel, spec), (*arrays, stripe), batch * -(-width // stripe))
    return d_projected, d_bias.sum(0), carry


def _kernel_of(make: Callable[[int, int, bool], Callable], spec: CellSpec) -> Callable:
    return make(_CELL_CODES[spec.cell], _ACTIVATION_CODES[spec.activation], spec.output_gate)
