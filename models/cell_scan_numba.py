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

from .cell_spec import SCANNED_CELLS, CellInputs, CellSpec
from .gated_coefficients import SMALLEST
from .numba_support import as_numpy, boundary_arrays, is_available, run_tasks, stripe_width

_CELL_CODES = {"mingru": 0, "minlstm": 1, "hgrn": 2, "rglru": 3}
_NUM_GATES = [SCANNED_CELLS[cell].num_gates for cell in _CELL_CODES]
_ACTIVATION_CODES = {"none": 0, "g": 1, "tanh": 2, "silu": 3}

if is_available():
    import numpy as np

    from .numba_support import (
        HALF,
        ONE,
        ZERO,
        exp,
        expm1,
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
    _SMALLEST, _NORMAL, _P = map(np.float32, (SMALLEST, (2 * np.pi) ** -0.5, 0.3275911 * 0.5**0.5))
    _P1, _P2, _P3, _P4, _P5 = map(
        np.float32, (0.127414796, -0.142248368, 0.7107068705, -0.7265760135, 0.5307027145)
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
    def _input_scale(log_a, a, is_first):
        """The RG-LRU's factor sqrt(1 - a^2), and its derivative for log a; 1 and 0 at a first token."""
        share = -expm1(TWO * log_a)
        scale = np.sqrt(max(share, _SMALLEST))
        slope = -a * a / scale if share >= _SMALLEST else ZERO
        return (ONE, ZERO) if is_first else (scale, slope)

    @inlined
    def _factors(p, q, constant, is_first, cell):
        """a, z of h_t = a h_{t-1} + z c(u), from the gates' pre-activations; with one gate, that is p."""
        if cell == 0:
            return _both_sigmoids(p)
        if cell == 1:
            return _ratio(p, q)
        if cell == 2:
            small, large = _both_sigmoids(p)
            return multiply_add(ONE - constant, large, constant), (ONE - constant) * small
        log_a = constant * sigmoid(p)
        a = exp(log_a)
        return a, _input_scale(log_a, a, is_first)[0] * sigmoid(q)

    @inlined
    def _gate_gradients(p, q, constant, is_first, a, z, c, previous, cell):
        """The derivatives of a previous + z c for p, q and the constant."""
        if cell == 3:
            r, i = sigmoid(p), sigmoid(q)
            log_a = constant * r
            d_log_a = multiply_add(c * i, _input_scale(log_a, a, is_first)[1], a * previous)
            return d_log_a * log_a * sigmoid(-p), c * z * sigmoid(-q), d_log_a * r
        difference = c - previous  # as a + z = 1
        if cell == 2:
            small, large = _both_sigmoids(p)
            return -difference * z * large, ZERO, -difference * small
        # dz = a z d log(z / a) = -da
        slope = difference * a * z
        return (slope, ZERO, ZERO) if cell == 0 else (-slope * sigmoid(-p), slope * sigmoid(-q), ZERO)

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

    @inlined
    def _output_gate(x, cell):
        """silu(x), or gelu(x) for the RG-LRU, and its derivative."""
        if cell < 3:
            s = sigmoid(x)
            return x * s, s * multiply_add(x, ONE - s, ONE)
        # The normal distribution by Abramowitz & Stegun, 7.1.26: an absolute error of 1e-7.
        bell, t = exp(-HALF * x * x), ONE / multiply_add(_P, abs(x), ONE)
        tail = multiply_add(multiply_add(multiply_add(multiply_add(_P5, t, _P4), t, _P3), t, _P2), t, _P1)
        tail = tail * t * bell
        below = tail if x < ZERO else ONE - tail
        return x * below, multiply_add(x * _NORMAL, bell, below)


@functools.cache
def _forward_kernel(cell: int, activation: int, gated: bool) -> Callable:
    num_gates = _NUM_GATES[cell]

    @kernel
    def forward(projected, bias, h0, starts, lengths, is_empty, y, h, h_last, decay, stripe, first, last):
        """projected [B, T, P*R], bias [G, R], h0 [B, R] -> y, h [B, T, R], h_last, decay [B, R].

        starts is [B, T] or [0, 0], lengths and is_empty [B]. h is not written without an output gate; decay
        is not written if it is [0, 0].
        """
        time, width = y.shape[1], y.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            carry, bias_p, bias_q = h_last[row, low:high], bias[0, low:high], bias[num_gates - 1, low:high]
            constants = bias[-1, low:high]
            carry[:] = h0[row, low:high]
            for t in range(time):
                tokens, y_t = projected[row, t], y[row, t, low:high]
                gate_p, gate_q, u = (
                    tokens[low:high],
                    tokens[(num_gates - 1) * width + low :],
                    tokens[num_gates * width + low :],
                )
                is_start = starts.size > 0 and starts[row, t] != 0
                is_first = is_start or (t == 0 and is_empty[row] != 0)
                if is_start and t < lengths[row]:
                    carry[:] = ZERO
                    if decay.size > 0:
                        decay[row, low:high] = ZERO
                if t < lengths[row]:
                    for d in range(high - low):
                        p, q = (
                            load_input(gate_p, d) + load_input(bias_p, d),
                            load_input(gate_q, d) + load_input(bias_q, d),
                        )
                        a, z = _factors(p, q, load_input(constants, d), is_first, cell)
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
                            decay[row, low + d] *= _factors(p, q, load_input(constants, d), is_first, cell)[0]
                if gated:
                    o, h_t = tokens[(num_gates + 1) * width + low :], h[row, t, low:high]
                    for d in range(high - low):
                        value = load_state(carry, d)
                        store_output(h_t, d, value)
                        store_output(y_t, d, value * _output_gate(load_input(o, d), cell)[0])
                else:
                    for d in range(high - low):
                        store_output(y_t, d, load_state(carry, d))

    return forward


@functools.cache
def _backward_kernel(cell: int, activation: int, gated: bool) -> Callable:
    # Only numbers may be captured: numba would not find a kernel on disk that captures another kernel.
    num_gates = _NUM_GATES[cell]

    @kernel
    def backward(
        projected,
        bias,
        h0,
        starts,
        lengths,
        is_empty,
        h,
        grad_y,
        state,
        d_projected,
        d_bias,
        stripe,
        first,
        last,
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
            constants, d_constants = bias[-1, low:high], d_bias[row, -1, low:high]
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
                    o, h_t, d_o = tokens[offset:], h[row, t, low:high], d_tokens[offset:]
                    for d in range(high - low - 1, -1, -1):
                        value, slope = _output_gate(load_input(o, d), cell)
                        gradient = load_input(g_t, d)
                        store_output(d_o, d, gradient * load_input(h_t, d) * slope)
                        store_state(carry, d, multiply_add(gradient, value, load_state(carry, d)))
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
                is_first = is_start or (t == 0 and is_empty[row] != 0)
                previous = h[row, t - 1, low:high] if t > 0 else h0[row, low:high]
                for d in range(high - low - 1, -1, -1):
                    p, q, x = (
                        load_input(gate_p, d) + load_input(bias_p, d),
                        load_input(gate_q, d) + load_input(bias_q, d),
                        load_input(u, d),
                    )
                    constant, gradient = load_input(constants, d), load_state(carry, d)
                    a, z = _factors(p, q, constant, is_first, cell)
                    previous_h = ZERO if is_start else load_input(previous, d)
                    d_p, d_q, d_constant = _gate_gradients(
                        p, q, constant, is_first, a, z, _candidate(x, activation), previous_h, cell
                    )
                    store_output(d_u, d, gradient * z * _candidate_slope(x, activation))
                    store_output(d_gate_p, d, gradient * d_p)
                    store_state(d_bias_p, d, multiply_add(gradient, d_p, load_state(d_bias_p, d)))
                    if num_gates == 2:
                        store_output(d_gate_q, d, gradient * d_q)
                        store_state(d_bias_q, d, multiply_add(gradient, d_q, load_state(d_bias_q, d)))
                    if cell >= 2:
                        store_state(
                            d_constants, d, multiply_add(gradient, d_constant, load_state(d_constants, d))
                        )
                    store_state(carry, d, ZERO if is_start else gradient * a)

    return backward


def _boundary_arrays(inputs: CellInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(document starts, lengths, is_empty) for the kernels."""
    batch, time, _ = inputs.shape
    is_empty = inputs.is_empty
    is_empty = torch.zeros(batch, dtype=torch.bool, device="cpu") if is_empty is None else is_empty
    return *boundary_arrays(inputs.boundaries, batch, time), is_empty.contiguous()


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
