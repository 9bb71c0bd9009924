"""Shared device functions of the Triton scans: how h_t = a_t h_{t-1} + b_t is spread over the chip.

    channels   a program has one row of the batch and a block of 64 channels (one 128-byte line of bf16)
    tiles      it processes time in tiles of `lanes` x `rows` tokens, with the carried state in registers
    lanes      one warp each: a lane scans `rows` consecutive tokens, two channels per thread, independently
    chunks     if batch x width is too small for the chip, time is cut into chunks, one program each

A tile is read in one burst before anything is computed or stored: each thread issues `rows` independent loads
per operand, at constant offsets. (Strides are compile-time constants; in registers they take a quarter more
instructions and twice the registers.) So each program has 16 to 64 KB in flight while a second program on the
same multiprocessor computes. By Little's law an H200 needs about 3 MB in flight, 25 KB per multiprocessor.
Tiles can also be prefetched through shared memory (`stages` = 2), which waits less and computes more.

Inside a tile each lane scans its tokens from 0, which gives a pair (A, H): the product of the decays and the
state after the lane's tokens. The pairs are combined across lanes in order, h -> A h + H, and each lane scans
again from the state that enters it. The second pass costs one multiply-add per element and gives the same
numbers as the sequential loop. An associative_scan of a whole tile would combine pairs at every token,
through shuffles and shared memory.

Instructions per element of the minGRU's forward pass, as compiled for sm_90
(`minrnn figures kernels`; an H200 has time for 40 at its bandwidth):

    lanes, one burst             18      lanes, strides in registers          23
    lanes, prefetched            23      associative_scan over the tile       51 at best

Chunks are combined the same way, by three kernels. The first reads the coefficients and writes a pair per
chunk. `combine_kernel` runs over the chunks and writes the state that enters each chunk. The third is the
kernel of the one-pass case, started from these states. All orders are fixed and there are no atomics: the
same shapes on the same kind of machine give the same bits.

A document start drops the state. The state is selected away, because 0 * inf is NaN. A range of time that
contains a start is marked by the product A = -1, which decays in [0, 1] cannot reach; such a pair ignores
everything before it.

The backward pass is the same scan from the end. Token t passes s_t = a_t G_t to token t - 1, so s_t = a_t
s_{t+1} + a_t g_t and G_t = g_t + s_{t+1}. In the code, "first", "entering" and "after" refer to the order of
processing, which in the backward pass is from late to early.
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
# (triton may be missing, and gives the functions it compiles another meaning)

from __future__ import annotations

from typing import Any

try:  # optional: without triton the GPU uses the torch backend, and remote code still loads
    import triton
    import triton.language as tl
    from triton import knobs
except ImportError:
    triton = tl = knobs = None

# Without triton, decorated functions are never called.
jit: Any = triton.jit if triton is not None else (lambda function: function)
INTERPRETED = tl.constexpr(knobs.runtime.interpret) if knobs is not None else None


@jit
def coordinates(
    time, chunk_length, num_chunks, WIDTH: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr
):
    """The part of the problem that a program computes.

    Returns (row of the batch; first token of the chunk; end of the chunk; lane [LANES, 1]; channel [1,
    CHANNELS]; whether the channel exists; offset of the chunk's state in a tensor [batch, chunks, WIDTH]).

    Offsets of rows and tokens are int64, because tensors may have more than 2^31 elements.
    """
    num_blocks: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    chunk, row = (program // num_blocks) % num_chunks, (program // num_blocks // num_chunks).to(tl.int64)
    channel = (program % num_blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    first = chunk * chunk_length
    last = tl.minimum(first + chunk_length, time)
    return (
        row,
        first,
        last,
        tl.arange(0, LANES)[:, None],
        channel,
        channel < WIDTH,
        (row * num_chunks + chunk) * WIDTH + channel,
    )


@jit
def end_of_full_tiles(first, limit, tokens: tl.constexpr):
    """The end of the tiles of a chunk that need no mask; the tail behind them has a loop of its own.

    A masked load is conditional, and the assembler issues conditional loads one by one.
    """
    return first + tl.maximum(limit - first, 0) // tokens * tokens


@jit
def first_backward_token(first, last, lane, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Time of each lane's first row in a backward pass; it may be behind the end."""
    return first + tl.cdiv(last - first, LANES * ROWS) * (LANES * ROWS) - 1 - lane * ROWS


@jit
def row_mask(channel_mask, t, limit, MASKED: tl.constexpr):
    """Which elements of a row exist."""
    return (channel_mask & (t < limit)) if MASKED else channel_mask


@jit
def as_stored(value, pointer):
    """`value` in the dtype of the elements of `pointer`.

    fp64 is converted to bf16 by way of fp32, the only conversion that Triton's interpreter supports.
    """
    if value.dtype == tl.float64 and pointer.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@jit
def load_rows(
    source,
    step: tl.constexpr,
    channel_mask,
    t,
    time_step: tl.constexpr,
    limit,
    other: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile of one operand, as a tuple of ROWS blocks [lanes, channels].

    Row j is at source + j * step and belongs to time t + j * time_step. Elements outside of `channel_mask`,
    and with MASKED rows at or behind `limit`, are `other`.
    """
    rows = ()
    for j in tl.static_range(ROWS):
        mask = row_mask(channel_mask, t + j * time_step, limit, MASKED)
        rows = rows + (tl.load(source + j * step, mask=mask, other=other),)  # noqa: RUF005 (Triton has no unpacking)
    return rows


@jit
def load_previous_rows(
    source, step: tl.constexpr, channel_mask, t, limit, initial, ROWS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """The saved states before each row of a backward tile.

    Row j is at source - (j + 1) * step, or `initial` if that is before time 0. Tiles begin at multiples of
    ROWS, so only the last row of a lane can be at time 0.
    """
    rows = load_rows(source - step, -step, channel_mask, t, -1, limit + 1, 0.0, ROWS - 1, MASKED)
    mask = row_mask(channel_mask & (t >= ROWS), t - ROWS, limit, MASKED)
    oldest = tl.load(source - ROWS * step, mask=mask, other=0.0).to(initial.dtype)
    return rows + (tl.where(t == ROWS - 1, initial, oldest),)  # noqa: RUF005


@jit
def zero_if_reset(value, resets, j: tl.constexpr, RESETS: tl.constexpr):
    """0 if row j of a lane drops the state that enters it, otherwise `value`."""
    return tl.where((resets >> j) & 1 != 0, 0.0, value) if RESETS else value


@jit
def advance(state, decay, addend, resets, j: tl.constexpr, RESETS: tl.constexpr):
    """One step of the recurrence, row j of a lane. A dropped state is selected away: 0 * inf is NaN."""
    after = decay * state + addend
    return tl.where((resets >> j) & 1 != 0, addend, after) if RESETS else after


@jit
def combine_pairs(product1, state1, before_product1, before1, product2, state2, before_product2, before2):
    """Two neighbouring ranges as one. `before` is the pair of a range without its last lane."""
    return (
        product1 * product2,
        product2 * state1 + state2,
        product1 * before_product2,
        before_product2 * state1 + before2,
    )


@jit
def combine_products(product1, product2):
    """The product over two ranges; a negative product marks a range that drops the state."""
    return tl.where((product1 < 0) | (product2 < 0), -1.0, product1 * product2)


@jit
def combine_states(state1, product2, state2):
    """The state after two ranges, with the same mark."""
    return tl.where(product2 < 0, state2, product2 * state1 + state2)


@jit
def combine_pairs_with_resets(
    product1, state1, before_product1, before1, product2, state2, before_product2, before2
):
    """As `combine_pairs`, for ranges that may drop the state."""
    product, before_product = (
        combine_products(product1, product2),
        combine_products(product1, before_product2),
    )
    return (
        product,
        combine_states(state1, product2, state2),
        before_product,
        combine_states(state1, before_product2, before2),
    )


@jit
def scan_tile(
    decays,
    addends,
    resets,
    carry,
    lane,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    RESETS: tl.constexpr,
):
    """All states of a tile.

    Args:
        decays, addends: tuples of ROWS blocks [LANES, CHANNELS], in the order of processing.
        resets: [LANES, 1], bit j set where row j drops the state that enters it.
        carry: state that enters the tile, [1, CHANNELS].
        lane: 0 .. LANES - 1, [LANES, 1].

    Returns:
        Tuple of ROWS + 1 states [LANES, CHANNELS]: the state entering each row, and the last; the state after
        the tile [1, CHANNELS]; the product of all decays of the tile [1, CHANNELS], -1 where the state was
        dropped.
    """
    state = tl.where(lane == 0, carry, 0.0) + tl.zeros((LANES, CHANNELS), carry.dtype)
    product = tl.full((LANES, CHANNELS), 1.0, carry.dtype)
    for j in tl.static_range(ROWS):
        state = advance(state, decays[j], addends[j], resets, j, RESETS)
        product = product * decays[j]
    if RESETS:
        product = tl.where(resets != 0, -1.0, product)
    entering = carry
    if LANES > 1:  # the first lane has scanned from the carry already
        pairs = (
            product,
            state,
            tl.full((LANES, CHANNELS), 1.0, carry.dtype),
            tl.zeros((LANES, CHANNELS), carry.dtype),
        )
        if RESETS:
            product, state, _, before = tl.associative_scan(pairs, 0, combine_pairs_with_resets)
        else:
            product, state, _, before = tl.associative_scan(pairs, 0, combine_pairs)
        entering = tl.where(lane == 0, carry, before)
        state = tl.sum(tl.where(lane == LANES - 1, state, 0.0), 0, keep_dims=True)
        product = tl.sum(tl.where(lane == LANES - 1, product, 0.0), 0, keep_dims=True)
    states = (entering,)
    for j in tl.static_range(ROWS):
        states = states + (advance(states[j], decays[j], addends[j], resets, j, RESETS),)  # noqa: RUF005
    return states, state, product


@jit
def combine_kernel(
    states, products, initial, entering, final, decay, num_chunks, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """Combine chunks: pairs [batch, chunks, width], initial state -> state entering each chunk, final state.

    Reads ROWS chunks at once, because memory latency is the only cost here. REVERSE takes the last chunk
    first. `decay`, if not None, becomes the product over all of time.
    """
    num_blocks: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    channel = (tl.program_id(0) % num_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < WIDTH
    state = tl.load(initial + row * WIDTH + channel, mask=channel_mask, other=0.0)
    product = tl.full((CHANNELS,), 1.0, state.dtype)
    for first in tl.range(0, num_chunks, ROWS):
        state_rows, product_rows = (), ()
        for j in tl.static_range(ROWS):
            order = first + j + tl.zeros_like(channel)
            chunk = (num_chunks - 1 - order) if REVERSE else order
            mask, offset = channel_mask & (order < num_chunks), (row * num_chunks + chunk) * WIDTH + channel
            state_rows = state_rows + (tl.load(states + offset, mask=mask, other=0.0),)  # noqa: RUF005
            product_rows = product_rows + (tl.load(products + offset, mask=mask, other=1.0),)  # noqa: RUF005
        for j in tl.static_range(ROWS):
            order = first + j + tl.zeros_like(channel)
            chunk = (num_chunks - 1 - order) if REVERSE else order
            tl.store(
                entering + (row * num_chunks + chunk) * WIDTH + channel,
                state,
                mask=channel_mask & (order < num_chunks),
            )
            if RESETS:
                state = combine_states(state, product_rows[j], state_rows[j])
                product = combine_products(product, product_rows[j])
            else:
                state = product_rows[j] * state + state_rows[j]
                product = product * product_rows[j]
    tl.store(final + row * WIDTH + channel, state, mask=channel_mask)
    if decay is not None:
        tl.store(
            decay + row * WIDTH + channel,
            tl.where(product < 0, 0.0, product) if RESETS else product,
            mask=channel_mask,
        )
