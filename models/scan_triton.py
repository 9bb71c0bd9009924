"""The scan on the GPU: h_t = a_t h_{t-1} + b_t in one pass over memory, or two if batch x width is too small.

`tiles_triton` describes how time and channels are spread over the chip. This file has the forward and the
backward kernel, and their launches:

    one pass                         from h0 to h, h_last
    summaries, combination, replay   (A, H) of each chunk; `combine_kernel`; from its entering state to h

Elements of [batch, time, width] moved: forward reads a, b and writes h; backward reads a, h, g and writes da,
db. The summaries read two more (a, b; a, g). Arithmetic and carry are fp32, or fp64 if an operand is;
everything is widened in registers and rounded once, on the way out.
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (triton may be missing, and gives the functions it compiles another meaning)

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import accumulate_dtype
from .launches_triton import (
    Launch,
    Tile,
    chunked_launch,
    num_multiprocessors,
    pass_launches,
    plan_chunks,
    run_all,
    with_contiguous_channels,
)
from .tiles_triton import (
    as_stored,
    coordinates,
    end_of_full_tiles,
    first_backward_token,
    jit,
    load_previous_rows,
    load_rows,
    row_mask,
    scan_tile,
    tl,
)


@jit
def forward_kernel(
    a, b, entering, h, final, decay, time, chunk_length, num_chunks, a_row, b_row, A_STEP: tl.constexpr,
    B_STEP: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, STAGES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One chunk of one row and block of channels; each of `entering`, `h`, `final` and `decay` may be None.

    a, b: rows of the batch a_row and b_row elements apart, tokens A_STEP and B_STEP; h is contiguous; the
    others are [batch, chunks, WIDTH].
    """
    row, first, last, lane, channel, channel_mask, state_offset = coordinates(
        time, chunk_length, num_chunks, WIDTH, LANES, CHANNELS
    )
    full_end, t = end_of_full_tiles(first, last, LANES * ROWS), first + lane * ROWS
    a_source, b_source = (
        a + row * a_row + t.to(tl.int64) * A_STEP + channel,
        b + row * b_row + t.to(tl.int64) * B_STEP + channel,
    )
    target = row * time * WIDTH + t.to(tl.int64) * WIDTH + channel
    dtype: tl.constexpr = entering.dtype.element_ty if final is None else final.dtype.element_ty
    carry = tl.zeros((1, CHANNELS), dtype)
    if entering is not None:
        carry = tl.load(entering + state_offset, mask=channel_mask, other=0.0)
    product = tl.full((1, CHANNELS), 1.0, dtype)
    for tail in tl.static_range(0, TAIL + 1):
        for _ in tl.range(
            full_end if tail else first, last if tail else full_end, LANES * ROWS, num_stages=STAGES
        ):
            a_rows = load_rows(a_source, A_STEP, channel_mask, t, 1, last, 1.0, ROWS, tail)
            b_rows = load_rows(b_source, B_STEP, channel_mask, t, 1, last, 0.0, ROWS, tail)
            decays, addends = (), ()
            for j in tl.static_range(ROWS):
                decays, addends = decays + (a_rows[j].to(dtype),), addends + (b_rows[j].to(dtype),)  # noqa: RUF005
            states, carry, tile_product = scan_tile(
                decays, addends, 0, carry, lane, LANES, CHANNELS, ROWS, False
            )
            product = product * tile_product
            if h is not None:
                for j in tl.static_range(ROWS):
                    tl.store(
                        h + target + j * WIDTH,
                        as_stored(states[j + 1], h),
                        mask=row_mask(channel_mask, t + j, last, tail),
                    )
            t += LANES * ROWS
            a_source += LANES * ROWS * A_STEP
            b_source += LANES * ROWS * B_STEP
            target += LANES * ROWS * WIDTH
    if final is not None:
        tl.store(final + state_offset, carry, mask=channel_mask)
    if decay is not None:
        tl.store(decay + state_offset, product, mask=channel_mask)


@jit
def backward_kernel(
    a, h, h0, grad_h, entering, da, db, final, decay, time, chunk_length, num_chunks, a_row, h_row, grad_row,
    A_STEP: tl.constexpr, H_STEP: tl.constexpr, GRAD_STEP: tl.constexpr, WIDTH: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The same from late to early, on s_t = a_t s_{t+1} + a_t g_t. Without `da`, only the chunk's pair."""
    row, first, last, lane, channel, channel_mask, state_offset = coordinates(
        time, chunk_length, num_chunks, WIDTH, LANES, CHANNELS
    )
    full_end, t = (
        end_of_full_tiles(first, last, LANES * ROWS),
        first_backward_token(first, last, lane, LANES, ROWS),
    )
    a_source, grad_source = (
        a + row * a_row + t.to(tl.int64) * A_STEP + channel,
        grad_h + row * grad_row + t.to(tl.int64) * GRAD_STEP + channel,
    )
    h_source = h + row * h_row + t.to(tl.int64) * H_STEP + channel
    target = row * time * WIDTH + t.to(tl.int64) * WIDTH + channel
    initial = tl.load(h0 + row * WIDTH + channel, mask=channel_mask, other=0.0)
    dtype: tl.constexpr = h0.dtype.element_ty
    carry = tl.zeros((1, CHANNELS), dtype)
    if entering is not None:
        carry = tl.load(entering + state_offset, mask=channel_mask, other=0.0)
    product = tl.full((1, CHANNELS), 1.0, dtype)
    for tail in tl.static_range(TAIL, -1, -1):
        for _ in tl.range(
            full_end if tail else first, last if tail else full_end, LANES * ROWS, num_stages=STAGES
        ):
            a_rows = load_rows(a_source, -A_STEP, channel_mask, t, -1, last, 1.0, ROWS, tail)
            grad_rows = load_rows(grad_source, -GRAD_STEP, channel_mask, t, -1, last, 0.0, ROWS, tail)
            if da is not None:
                previous = load_previous_rows(h_source, H_STEP, channel_mask, t, last, initial, ROWS, tail)
            decays, addends = (), ()
            for j in tl.static_range(ROWS):
                decays = decays + (a_rows[j].to(dtype),)  # noqa: RUF005
                addends = addends + (decays[j] * grad_rows[j].to(dtype),)  # noqa: RUF005
            states, carry, tile_product = scan_tile(
                decays, addends, 0, carry, lane, LANES, CHANNELS, ROWS, False
            )
            product = product * tile_product
            if da is not None:
                for j in tl.static_range(ROWS):
                    state_grad, mask = (
                        grad_rows[j].to(dtype) + states[j],
                        row_mask(channel_mask, t - j, last, tail),
                    )
                    tl.store(db + target - j * WIDTH, as_stored(state_grad, db), mask=mask)
                    tl.store(
                        da + target - j * WIDTH, as_stored(state_grad * previous[j].to(dtype), da), mask=mask
                    )
            t -= LANES * ROWS
            a_source -= LANES * ROWS * A_STEP
            grad_source -= LANES * ROWS * GRAD_STEP
            h_source -= LANES * ROWS * H_STEP
            target -= LANES * ROWS * WIDTH
    if final is not None:
        tl.store(final + state_offset, carry, mask=channel_mask)
    if decay is not None:
        tl.store(decay + state_offset, product, mask=channel_mask)


def choose_tile(time: int, num_bytes: int, backward: bool) -> Tile:
    """The largest tile, for `num_bytes` read per element, with which two programs share a multiprocessor."""
    if time == 1:  # a token of decoding
        return Tile(lanes=1, rows=1, channels=64)
    if not backward:
        return Tile(lanes=8, rows=16 if num_bytes <= 8 else 4, channels=64)
    return Tile(lanes=8 if num_bytes <= 8 else 4, rows=8 if num_bytes <= 12 else 4, channels=64)


def forward_launches(
    a: Tensor,
    b: Tensor,
    h0: Tensor,
    return_decay: bool,
    tile: Tile | None = None,
    num_chunks: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The outputs of `forward`, not yet computed, and the launches that compute them.

    Tests and tuning can force a tile and a number of chunks.
    """
    batch, time, width = b.shape
    dtype = accumulate_dtype(a, b)
    tile = tile or choose_tile(time, a.itemsize + b.itemsize, backward=False)
    chunks = plan_chunks(batch, time, width, tile, num_multiprocessors(b.device), num_chunks)
    a, b = with_contiguous_channels(a), with_contiguous_channels(b)
    h, h_last = b.new_empty(batch, time, width), b.new_empty(batch, width, dtype=dtype)
    decay = torch.empty_like(h_last) if return_decay else h_last.new_empty(0)

    def launch(entering: Tensor | None, final: Tensor | None, decay: Tensor | None, write: bool) -> Launch:
        arguments = {
            "a": a,
            "b": b,
            "entering": entering,
            "h": h if write else None,
            "final": final,
            "decay": decay,
        }
        arguments |= {"a_row": a.stride(0), "b_row": b.stride(0)}
        return chunked_launch(
            forward_kernel,
            arguments,
            {"A_STEP": a.stride(1), "B_STEP": b.stride(1)},
            (batch, time, width),
            tile,
            chunks,
        )

    initial = h0.to(dtype).contiguous()
    return (h, h_last, decay), pass_launches(
        launch, chunks, initial, h_last, decay if return_decay else None, reverse=False, resets=False
    )


def backward_launches(
    a: Tensor,
    h: Tensor,
    h0: Tensor,
    grad_h: Tensor,
    grad_last: Tensor,
    tile: Tile | None = None,
    num_chunks: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """As `forward_launches`, for `backward`."""
    batch, time, width = h.shape
    dtype = accumulate_dtype(a, h)
    tile = tile or choose_tile(time, a.itemsize + h.itemsize + grad_h.itemsize, backward=True)
    chunks = plan_chunks(batch, time, width, tile, num_multiprocessors(h.device), num_chunks)
    a, h, grad_h, h0 = (
        with_contiguous_channels(a),
        with_contiguous_channels(h),
        with_contiguous_channels(grad_h),
        h0.to(dtype).contiguous(),
    )
    da, db, dh0 = a.new_empty(batch, time, width), h.new_empty(batch, time, width), torch.empty_like(h0)

    def launch(entering: Tensor | None, final: Tensor | None, decay: Tensor | None, write: bool) -> Launch:
        arguments = {
            "a": a,
            "h": h,
            "h0": h0,
            "grad_h": grad_h,
            "entering": entering,
            "final": final,
            "decay": decay,
        }
        arguments |= {"da": da if write else None, "db": db if write else None}
        arguments |= {"a_row": a.stride(0), "h_row": h.stride(0), "grad_row": grad_h.stride(0)}
        steps = {"A_STEP": a.stride(1), "H_STEP": h.stride(1), "GRAD_STEP": grad_h.stride(1)}
        return chunked_launch(backward_kernel, arguments, steps, (batch, time, width), tile, chunks)

    initial = grad_last.to(dtype).contiguous()
    return (da, db, dh0), pass_launches(launch, chunks, initial, dh0, None, reverse=True, resets=False)


def forward(a: Tensor, b: Tensor, h0: Tensor, return_decay: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan.linear_scan`: (h, h_last, decay); decay [batch, width] is empty without `return_decay`."""
    outputs, launches = forward_launches(a, b, h0, return_decay)
    run_all(launches)
    return outputs


def backward(
    a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan`: (da, db, dh0)."""
    outputs, launches = backward_launches(a, h, h0, grad_h, grad_last)
    run_all(launches)
    return outputs
