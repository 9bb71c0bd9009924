"""The kernels of cell and scan on the GPU: pre-activations in, outputs out; decay and input are in registers.

    projected [batch, time, P * width]  =  gate (minLSTM: forget, input) | candidate u [| output gate o]
    (a, b) = cell(gates + gate_bias, c(u))        h_t = a_t h_{t-1} + b_t        y = h silu(o), or h

`tiles_triton` describes how time and channels are spread over the chip, `minimal_coefficients_triton` the
formulas of the cells.

Bytes per element of [batch, time, width] in bf16, minGRU without an output gate: forward 6 (reads k, u,
writes h), backward 12 (reads k, u, h, g, writes dk, du). With an output gate: 10 (also reads o, writes y) and
16 (also reads o, writes do). If time is cut, a second pass reads 4 more (6 in the backward pass with an
output gate).

With G_t the total gradient at h_t and s_t = a_t G_t the gradient passed to t - 1 (0 at a document start),

    d(gates) = a z G_t (c(u) - h_{t-1}) * slopes        du = z c'(u) G_t        do = g_t h_t silu'(o)

Padding, and the part of a tile behind the end of time, is no special case: the gates are loaded as
infinities, for which (a, b) = (1, 0).
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (triton may be missing, and gives the functions it compiles another meaning)

from __future__ import annotations

from .minimal_coefficients_triton import coefficients, factors, gradients, silu
from .tiles_triton import (
    as_stored,
    combine_products,
    coordinates,
    end_of_full_tiles,
    first_backward_token,
    jit,
    load_previous_rows,
    load_rows,
    row_mask,
    scan_tile,
    tl,
    zero_if_reset,
)


@jit
def load_gates(
    source, step: tl.constexpr, channel_mask, t, time_step: tl.constexpr, limit, CELL: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gates' rows of a tile (minGRU: its one gate twice); behind `limit`, infinities: (a, z) = (1, 0)."""
    k_rows = load_rows(
        source,
        step,
        channel_mask,
        t,
        time_step,
        limit,
        float("-inf") if CELL == "mingru" else float("inf"),
        ROWS,
        MASKED,
    )
    q_rows = k_rows
    if CELL == "minlstm":
        q_rows = load_rows(
            source + WIDTH, step, channel_mask, t, time_step, limit, float("-inf"), ROWS, MASKED
        )
    return k_rows, q_rows


@jit
def load_biases(gate_bias, channel, channel_mask, CELL: tl.constexpr, WIDTH: tl.constexpr):
    """The gates' biases [1, channels], multiplied by log2(e)."""
    k_bias = tl.load(gate_bias + channel, mask=channel_mask, other=0.0) * 1.4426950408889634
    q_bias = k_bias
    if CELL == "minlstm":
        q_bias = tl.load(gate_bias + WIDTH + channel, mask=channel_mask, other=0.0) * 1.4426950408889634
    return k_bias, q_bias


@jit
def end_of_real_tokens(lengths, row, last):
    """The end of the real tokens of a chunk: where its padding begins, or the end of the chunk."""
    return last if lengths is None else tl.minimum(last, tl.load(lengths + row).to(tl.int32))


@jit
def load_starts(starts, t, time_step: tl.constexpr, limit, ROWS: tl.constexpr):
    """Flags [lanes, ROWS]: rows of a tile that start a document. Read one tile ahead to hide the latency."""
    time = t + time_step * tl.arange(0, ROWS)[None, :]
    return tl.load(starts + time, mask=(time >= 0) & (time < limit), other=0)


@jit
def as_bits(flags, ROWS: tl.constexpr):
    """[lanes, ROWS] -> [lanes, 1], row j in bit j."""
    return tl.sum(flags.to(tl.int32) << tl.arange(0, ROWS)[None, :], 1, keep_dims=True)


@jit
def forward_kernel(
    projected, gate_bias, entering, starts, lengths, y, h, final, decay, time, chunk_length, num_chunks,
    projected_row, STEP: tl.constexpr, CELL: tl.constexpr, ACTIVATION: tl.constexpr,
    OUTPUT_GATE: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, STAGES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One chunk of one row and block of channels.

    Each of `entering`, `starts`, `lengths`, (`y`, `h`), `final` and `decay` may be None.

    projected: rows of the batch projected_row elements apart, tokens STEP; y, h [batch, time, WIDTH]; the
    others [batch, chunks, WIDTH].
    """
    candidate_offset: tl.constexpr = WIDTH * (2 if CELL == "minlstm" else 1)
    c_other: tl.constexpr = float("-inf") if ACTIVATION == "g" else 0.0  # where c is 0
    resets_possible: tl.constexpr = starts is not None
    row, first, last, lane, channel, channel_mask, state_offset = coordinates(
        time, chunk_length, num_chunks, WIDTH, LANES, CHANNELS
    )
    limit = end_of_real_tokens(lengths, row, last)
    full_end, t = end_of_full_tiles(first, limit, LANES * ROWS), first + lane * ROWS
    source = projected + row * projected_row + t.to(tl.int64) * STEP + channel
    target = row * time * WIDTH + t.to(tl.int64) * WIDTH + channel
    k_bias, q_bias = load_biases(gate_bias, channel, channel_mask, CELL, WIDTH)
    carry, product, resets = tl.zeros((1, CHANNELS), tl.float32), tl.full((1, CHANNELS), 1.0, tl.float32), 0
    if entering is not None:
        carry = tl.load(entering + state_offset, mask=channel_mask, other=0.0)
    if resets_possible:
        starts += row * time
        resets = as_bits(load_starts(starts, t, 1, limit, ROWS), ROWS)
    for tail in tl.static_range(0, TAIL + 1):
        for _ in tl.range(
            full_end if tail else first, last if tail else full_end, LANES * ROWS, num_stages=STAGES
        ):
            k_rows, q_rows = load_gates(source, STEP, channel_mask, t, 1, limit, CELL, WIDTH, ROWS, tail)
            u_rows = load_rows(
                source + candidate_offset, STEP, channel_mask, t, 1, limit, c_other, ROWS, tail
            )
            if OUTPUT_GATE and y is not None:
                o_rows = load_rows(
                    source + candidate_offset + WIDTH, STEP, channel_mask, t, 1, last, 0.0, ROWS, tail
                )
            if resets_possible:
                upcoming = load_starts(starts, t + LANES * ROWS, 1, limit, ROWS)
            decays, addends = (), ()
            for j in tl.static_range(ROWS):
                a, b = coefficients(k_rows[j], q_rows[j], u_rows[j], k_bias, q_bias, CELL, ACTIVATION)
                decays, addends = decays + (a,), addends + (b,)  # noqa: RUF005
            states, carry, tile_product = scan_tile(
                decays, addends, resets, carry, lane, LANES, CHANNELS, ROWS, resets_possible
            )
            product = combine_products(product, tile_product) if resets_possible else product * tile_product
            if y is not None:
                for j in tl.static_range(ROWS):
                    out, mask = states[j + 1], row_mask(channel_mask, t + j, last, tail)
                    if OUTPUT_GATE:
                        tl.store(h + target + j * WIDTH, as_stored(out, h), mask=mask)
                        gate, _ = silu(o_rows[j].to(tl.float32))
                        out = out * gate
                    tl.store(y + target + j * WIDTH, as_stored(out, y), mask=mask)
            if resets_possible:
                resets = as_bits(upcoming, ROWS)
            t += LANES * ROWS
            source += LANES * ROWS * STEP
            target += LANES * ROWS * WIDTH
    if final is not None:
        tl.store(final + state_offset, carry, mask=channel_mask)
    if decay is not None:
        if resets_possible and entering is not None:  # the product itself instead of a chunk's mark
            product = tl.where(product < 0, 0.0, product)
        tl.store(decay + state_offset, product, mask=channel_mask)


@jit
def backward_kernel(
    projected, gate_bias, h0, starts, lengths, h, grad_y, entering, d_projected, d_gate_bias, final, decay,
    time, chunk_length, num_chunks, projected_row, h_row, grad_row, STEP: tl.constexpr, H_STEP: tl.constexpr,
    GRAD_STEP: tl.constexpr, CELL: tl.constexpr, ACTIVATION: tl.constexpr, OUTPUT_GATE: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    STAGES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The same from late to early, on s_t.

    Without `d_projected`, only the pair of the chunk is computed, from the gates and the gradient.

    d_projected: contiguous, laid out as `projected`; d_gate_bias: each program's sum, [batch, chunks, gates,
    WIDTH].
    """
    num_gates: tl.constexpr = 2 if CELL == "minlstm" else 1
    candidate_offset: tl.constexpr = WIDTH * num_gates
    c_other: tl.constexpr = float("-inf") if ACTIVATION == "g" else 0.0
    out_step: tl.constexpr = WIDTH * (num_gates + (2 if OUTPUT_GATE else 1))
    resets_possible: tl.constexpr = starts is not None
    row, first, last, lane, channel, channel_mask, state_offset = coordinates(
        time, chunk_length, num_chunks, WIDTH, LANES, CHANNELS
    )
    limit = end_of_real_tokens(lengths, row, last)
    full_end, t = (
        end_of_full_tiles(first, limit, LANES * ROWS),
        first_backward_token(first, last, lane, LANES, ROWS),
    )
    source = projected + row * projected_row + t.to(tl.int64) * STEP + channel
    grad_source = grad_y + row * grad_row + t.to(tl.int64) * GRAD_STEP + channel
    h_source = h + row * h_row + t.to(tl.int64) * H_STEP + channel
    target = (
        d_projected + row * time * out_step + t.to(tl.int64) * out_step + channel
        if d_projected is not None
        else source
    )
    k_bias, q_bias = load_biases(gate_bias, channel, channel_mask, CELL, WIDTH)
    initial = tl.load(h0 + row * WIDTH + channel, mask=channel_mask, other=0.0)
    carry, product, resets = tl.zeros((1, CHANNELS), tl.float32), tl.full((1, CHANNELS), 1.0, tl.float32), 0
    dk_sum, dq_sum = tl.zeros((LANES, CHANNELS), tl.float32), tl.zeros((LANES, CHANNELS), tl.float32)
    if entering is not None:
        carry = tl.load(entering + state_offset, mask=channel_mask, other=0.0)
    if resets_possible:
        starts += row * time
        resets = as_bits(load_starts(starts, t, -1, limit, ROWS), ROWS)
    for tail in tl.static_range(TAIL, -1, -1):
        for _ in tl.range(
            full_end if tail else first, last if tail else full_end, LANES * ROWS, num_stages=STAGES
        ):
            k_rows, q_rows = load_gates(source, -STEP, channel_mask, t, -1, limit, CELL, WIDTH, ROWS, tail)
            grad_rows = load_rows(grad_source, -GRAD_STEP, channel_mask, t, -1, last, 0.0, ROWS, tail)
            if OUTPUT_GATE:
                o_rows = load_rows(
                    source + candidate_offset + WIDTH, -STEP, channel_mask, t, -1, last, 0.0, ROWS, tail
                )
            if d_projected is not None:
                u_rows = load_rows(
                    source + candidate_offset, -STEP, channel_mask, t, -1, limit, c_other, ROWS, tail
                )
                previous = load_previous_rows(h_source, H_STEP, channel_mask, t, last, initial, ROWS, tail)
                if OUTPUT_GATE:
                    latest = load_rows(h_source, -H_STEP, channel_mask, t, -1, last, 0.0, 1, tail)
            if resets_possible:
                upcoming = load_starts(starts, t - LANES * ROWS, -1, limit, ROWS)
            decays, addends, grads = (), (), ()
            for j in tl.static_range(ROWS):
                a, _, _, _ = factors(k_rows[j], q_rows[j], k_bias, q_bias, CELL)
                grad = grad_rows[j].to(tl.float32)
                if OUTPUT_GATE:
                    gate, _ = silu(o_rows[j].to(tl.float32))
                    grad = grad * gate
                addend = zero_if_reset(a * grad, resets, j, resets_possible)
                decays, addends, grads = decays + (a,), addends + (addend,), grads + (grad,)  # noqa: RUF005
            states, carry, tile_product = scan_tile(
                decays, addends, resets, carry, lane, LANES, CHANNELS, ROWS, resets_possible
            )
            product = combine_products(product, tile_product) if resets_possible else product * tile_product
            if d_projected is not None:
                for j in tl.static_range(ROWS):
                    out, mask = target - j * out_step, row_mask(channel_mask, t - j, last, tail)
                    previous_state = zero_if_reset(previous[j].to(tl.float32), resets, j, resets_possible)
                    dk, dq, du = gradients(
                        k_rows[j],
                        q_rows[j],
                        u_rows[j],
                        k_bias,
                        q_bias,
                        grads[j] + states[j],
                        previous_state,
                        CELL,
                        ACTIVATION,
                    )
                    if tail:  # 0 even if the state is not finite
                        is_real = t - j < limit
                        dk, dq, du = (
                            tl.where(is_real, dk, 0.0),
                            tl.where(is_real, dq, 0.0),
                            tl.where(is_real, du, 0.0),
                        )
                    dk_sum += dk
                    tl.store(out, as_stored(dk, d_projected), mask=mask)
                    if CELL == "minlstm":
                        dq_sum += dq
                        tl.store(out + WIDTH, as_stored(dq, d_projected), mask=mask)
                    tl.store(out + candidate_offset, as_stored(du, d_projected), mask=mask)
                    if OUTPUT_GATE:
                        state = latest[0] if j == 0 else previous[j - 1]
                        _, slope = silu(o_rows[j].to(tl.float32))
                        do = grad_rows[j].to(tl.float32) * state.to(tl.float32) * slope
                        tl.store(out + candidate_offset + WIDTH, as_stored(do, d_projected), mask=mask)
            if resets_possible:
                resets = as_bits(upcoming, ROWS)
            t -= LANES * ROWS
            source -= LANES * ROWS * STEP
            grad_source -= LANES * ROWS * GRAD_STEP
            h_source -= LANES * ROWS * H_STEP
            target -= LANES * ROWS * out_step
    if final is not None:
        tl.store(final + state_offset, carry, mask=channel_mask)
    if decay is not None:
        tl.store(decay + state_offset, product, mask=channel_mask)
    if d_projected is not None:
        bias_target = d_gate_bias + state_offset + (state_offset // WIDTH) * ((num_gates - 1) * WIDTH)
        tl.store(bias_target, tl.sum(dk_sum, 0, keep_dims=True), mask=channel_mask)
        if CELL == "minlstm":
            tl.store(bias_target + WIDTH, tl.sum(dq_sum, 0, keep_dims=True), mask=channel_mask)
