"""What the Triton scans share: how a recurrence h_t = a_t h_{t-1} + b_t is spread over the chip, and how its pieces are joined.

    channels   a program owns one row of the batch and a block of neighbouring channels (64: one 128-byte line of bf16 a token)
    tiles      it walks through time in tiles of `lanes` x `rows` tokens, with the carried state in registers
    lanes      a warp each: a lane scans `rows` consecutive tokens of its own, two channels a thread, without a word to the others
    chunks     where batch x width is too small for the chip, time is cut too, and each chunk is a program

A tile is read in one burst, before anything is computed from it or stored: `rows` independent loads a thread
for each operand, at constant offsets (strides are compile-time constants: in registers they take a quarter
more instructions and twice the registers). So 16 to 64 KB are in flight a program, while a second program on
the same multiprocessor computes; Little's law asks for about 3 MB on an H200, or 25 KB a multiprocessor.
Tiles could also be fetched ahead through shared memory (`stages` = 2), which waits less and computes more.

Inside a tile each lane scans its tokens from 0, which gives its pair (A, H): the product of the decays and
the state it adds. The pairs are joined across lanes in order, h -> A h + H, and each lane scans once more
from the state that enters it. The second pass costs one multiply-add an element and gives the very numbers of
the loop from there on. A scan of a whole tile by associative_scan would combine pairs at every token, through
shuffles and shared memory.

Instructions per element of the minGRU's forward pass, as compiled for sm_90
(`minrnn figures kernels`; an H200 has time for 40 at its bandwidth):

    lanes, one burst             18      lanes, strides in registers          23
    lanes, fetched ahead         23      associative_scan over the tile       51 at best

Chunks are joined the same way, by three kernels: the first reads the coefficients and writes a pair for each
chunk; `combine_kernel` runs over the chunks and writes the state that enters each; the third is the kernel of
the one-pass case, started from there. All orders are fixed and nothing is atomic: the same shapes on the same
kind of machine give the same bits.

A document start drops the state. It must be selected away, since 0 * inf is NaN, so a stretch of time that
holds a start is marked by the product A = -1, which decays in [0, 1] cannot reach; a pair so marked ignores
what comes before it.

The backward pass is the same scan from the end: with s_t = a_t G_t, what t hands to t - 1, s_t = a_t s_{t+1}
+ a_t g_t and G_t = g_t + s_{t+1}. Here "first", "entering" and "after" mean the order of processing, which is
then from late to early.
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
# (triton may be missing, and gives the functions it compiles another meaning)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:  # optional: without triton the torch backend serves the GPU, and remote code loads all the same
    import triton
    import triton.language as tl
    from triton import knobs
except ImportError:
    triton = tl = knobs = None

jit: Any = (
    triton.jit if triton is not None else (lambda function: function)
)  # without triton nobody calls what it decorates
INTERPRETED = tl.constexpr(knobs.runtime.interpret) if knobs is not None else None


class Tile(NamedTuple):
    """What a program processes at once."""

    lanes: int
    """Stretches of time side by side, a warp each."""
    rows: int
    """Tokens of a lane; at most 32, since their document starts are the bits of an integer."""
    channels: int
    """Width of the block; a power of two."""
    stages: int = 1
    """More than 1: tiles are fetched this many ahead through shared memory (cp.async) instead of in one burst into registers."""

    @property
    def tokens(self) -> int:
        return self.lanes * self.rows


class Chunks(NamedTuple):
    """How time is cut: `number` programs of `length` tokens each, the last one perhaps shorter."""

    number: int
    length: int


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for anything else, so that the interpreter makes one pass."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def plan_chunks(
    batch: int, time: int, width: int, tile: Tile, multiprocessors: int, number: int | None = None
) -> Chunks:
    """One chunk where rows and channel blocks occupy the chip, else as many as make four waves of two programs a multiprocessor.

    Cutting time costs a second reading: a forward pass moves 10 bytes for 6. So one pass is right as long as
    it reaches 3/5 of the chip.

    Args:
        number: as many chunks instead (fewer where time is too short for them); for tests and tuning.
    """
    programs = max(batch * math.ceil(width / tile.channels), 1)
    if number is None:
        number = 1 if 5 * programs >= 3 * multiprocessors else 8 * multiprocessors // programs
    tiles = max(math.ceil(time / tile.tokens), 1)
    tiles_each = math.ceil(tiles / number)
    return Chunks(math.ceil(tiles / tiles_each), tiles_each * tile.tokens)


@dataclass(frozen=True)
class Launch:
    """One kernel call. What is launched is data, so that the same kernels can be compiled and counted where there is no GPU."""

    kernel: Any
    programs: int
    num_warps: int
    arguments: dict[str, Tensor | int | None] = field(repr=False)
    constants: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """How to compile.

        One step of the recurrence is one multiply-add, whatever this version of Triton does by default. And
        the assembler is told the registers that it may use while two programs fit on a multiprocessor:
        otherwise it saves some where there is no need, by waiting between loads.
        """
        return {
            "num_warps": self.num_warps,
            "enable_fp_fusion": True,
            "maxnreg": min(2**16 // (2 * 32 * self.num_warps), 255),
        }

    def run(self) -> None:
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if self.programs:
            with torch.cuda.device(device if device.type == "cuda" else -1):
                self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)


def run_all(launches: Sequence[Launch]) -> None:
    """Each in turn, on the current stream of its tensors' device."""
    for launch in launches:
        launch.run()


def with_contiguous_channels(x: Tensor) -> Tensor:
    """x [batch, time, width] as the kernels read it: any strides but the last, which is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


@jit
def coordinates(
    time, chunk_length, num_chunks, WIDTH: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Where a program works.

    Returns (row of the batch; first token of the chunk; the one behind its last; lane [LANES, 1]; channel [1,
    CHANNELS]; whether there is such a channel; place of the chunk's state in a tensor [batch, chunks,
    WIDTH]).

    What is multiplied by a row or a token is int64: tensors may have more than 2^31 elements.
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
def whole_tiles(first, limit, tokens: tl.constexpr):
    """Where those tiles of a chunk end that need no mask; the tail behind them has a loop of its own.

    For a masked load is a conditional one, and the assembler issues those one by one.
    """
    return first + tl.maximum(limit - first, 0) // tokens * tokens


@jit
def latest_token(first, last, lane, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Where a backward pass begins: the time of each lane's first row, perhaps behind the end."""
    return first + tl.cdiv(last - first, LANES * ROWS) * (LANES * ROWS) - 1 - lane * ROWS


@jit
def inside(live, t, limit, MASKED: tl.constexpr):
    """Which elements of a row there are."""
    return (live & (t < limit)) if MASKED else live


@jit
def as_stored(value, pointer):
    """`value` in the dtype of what `pointer` points to; fp64 becomes bf16 by way of fp32, since Triton's interpreter knows no other."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@jit
def load_rows(
    source,
    step: tl.constexpr,
    live,
    t,
    time_step: tl.constexpr,
    limit,
    other: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile of one operand, as a tuple of ROWS blocks [lanes, channels]: row j is at source + j * step and belongs to time t + j * time_step.

    Channels that are not `live`, and with MASKED rows at or behind `limit`, are `other`.
    """
    rows = ()
    for j in tl.static_range(ROWS):
        mask = inside(live, t + j * time_step, limit, MASKED)
        rows = rows + (tl.load(source + j * step, mask=mask, other=other),)  # noqa: RUF005 (Triton has no unpacking)
    return rows


@jit
def load_previous_rows(
    source, step: tl.constexpr, live, t, limit, initial, ROWS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """The saved states before each row of a backward tile: row j is at source - (j + 1) * step, and `initial` where that is before time 0.

    Tiles begin at multiples of ROWS, so only the last row of a lane can be at time 0.
    """
    rows = load_rows(source - step, -step, live, t, -1, limit + 1, 0.0, ROWS - 1, MASKED)
    mask = inside(live & (t >= ROWS), t - ROWS, limit, MASKED)
    oldest = tl.load(source - ROWS * step, mask=mask, other=0.0).to(initial.dtype)
    return rows + (tl.where(t == ROWS - 1, initial, oldest),)  # noqa: RUF005


@jit
def dropped(value, resets, j: tl.constexpr, RESETS: tl.constexpr):
    """0 where row j of a lane drops the state that enters it, else `value`."""
    return tl.where((resets >> j) & 1 != 0, 0.0, value) if RESETS else value


@jit
def advance(state, decay, addend, resets, j: tl.constexpr, RESETS: tl.constexpr):
    """The recurrence, one step: row j of a lane. A dropped state is selected away, not multiplied by 0, which NaN and infinities survive."""
    after = decay * state + addend
    return tl.where((resets >> j) & 1 != 0, addend, after) if RESETS else after


@jit
def join_pairs(product1, state1, before_product1, before1, product2, state2, before_product2, before2):
    """Two neighbouring stretches as one. `before` is the pair of a stretch without its last lane: what enters that lane."""
    return (
        product1 * product2,
        product2 * state1 + state2,
        product1 * before_product2,
        before_product2 * state1 + before2,
    )


@jit
def join_products(product1, product2):
    """The product of two stretches, where a negative one says that the stretch begins anew."""
    return tl.where((product1 < 0) | (product2 < 0), -1.0, product1 * product2)


@jit
def join_states(state1, product2, state2):
    """The state after two stretches, likewise."""
    return tl.where(product2 < 0, state2, product2 * state1 + state2)


@jit
def join_pairs_with_resets(
    product1, state1, before_product1, before1, product2, state2, before_product2, before2
):
    """As `join_pairs`, with stretches that begin anew."""
    product, before_product = join_products(product1, product2), join_products(product1, before_product2)
    return (
        product,
        join_states(state1, product2, state2),
        before_product,
        join_states(state1, before_product2, before2),
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
        Tuple of ROWS + 1 states [LANES, CHANNELS]: the one entering each row, and the last; the state after
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
    if LANES > 1:  # the first lane has scanned from the carry, so no other joint needs it
        pairs = (
            product,
            state,
            tl.full((LANES, CHANNELS), 1.0, carry.dtype),
            tl.zeros((LANES, CHANNELS), carry.dtype),
        )
        if RESETS:
            product, state, _, before = tl.associative_scan(pairs, 0, join_pairs_with_resets)
        else:
            product, state, _, before = tl.associative_scan(pairs, 0, join_pairs)
        entering = tl.where(lane == 0, carry, before)
        state = tl.sum(tl.where(lane == LANES - 1, state, 0.0), 0, keep_dims=True)
        product = tl.sum(tl.where(lane == LANES - 1, product, 0.0), 0, keep_dims=True)
    states = (entering,)
    for j in tl.static_range(ROWS):
        states = states + (advance(states[j], decays[j], addends[j], resets, j, RESETS),)  # noqa: RUF005
    return states, state, product


@jit
def combine_kernel(
    states, products, initial, entering, final, decay, num_chunks, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    REVERSE: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """The joints between chunks: from pairs [batch, chunks, width] and the initial state to the state entering each chunk, and the final one.

    Reads ROWS chunks at once, since nothing but the latency of memory costs here. REVERSE takes the last
    chunk first. `decay`, if it is there, becomes the product over all of time.
    """
    num_blocks: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    channel = (tl.program_id(0) % num_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < WIDTH
    state = tl.load(initial + row * WIDTH + channel, mask=live, other=0.0)
    total = tl.full((CHANNELS,), 1.0, state.dtype)
    for first in tl.range(0, num_chunks, ROWS):
        state_rows, product_rows = (), ()
        for j in tl.static_range(ROWS):
            order = first + j + tl.zeros_like(channel)
            chunk = (num_chunks - 1 - order) if REVERSE else order
            mask, place = live & (order < num_chunks), (row * num_chunks + chunk) * WIDTH + channel
            state_rows = state_rows + (tl.load(states + place, mask=mask, other=0.0),)  # noqa: RUF005
            product_rows = product_rows + (tl.load(products + place, mask=mask, other=1.0),)  # noqa: RUF005
        for j in tl.static_range(ROWS):
            order = first + j + tl.zeros_like(channel)
            chunk = (num_chunks - 1 - order) if REVERSE else order
            tl.store(
                entering + (row * num_chunks + chunk) * WIDTH + channel,
                state,
                mask=live & (order < num_chunks),
            )
            if RESETS:
                state = join_states(state, product_rows[j], state_rows[j])
                total = join_products(total, product_rows[j])
            else:
                state = product_rows[j] * state + state_rows[j]
                total = total * product_rows[j]
    tl.store(final + row * WIDTH + channel, state, mask=live)
    if decay is not None:
        tl.store(
            decay + row * WIDTH + channel, tl.where(total < 0, 0.0, total) if RESETS else total, mask=live
        )


def cut_launch(
    kernel, arguments: dict, constants: dict, shape: tuple[int, int, int], tile: Tile, chunks: Chunks
) -> Launch:
    """A kernel over all chunks of all rows and blocks of channels of [batch, time, width]."""
    batch, time, width = shape
    arguments = arguments | {"time": time, "chunk_length": chunks.length, "num_chunks": chunks.number}
    constants = constants | {
        "WIDTH": width,
        "LANES": tile.lanes,
        "ROWS": tile.rows,
        "CHANNELS": tile.channels,
        "STAGES": tile.stages,
    }
    constants["TAIL"] = int(constants.get("TAIL", 0) or time % tile.tokens != 0)
    programs = batch * chunks.number * math.ceil(width / tile.channels)
    return Launch(kernel, programs, tile.lanes, arguments, constants)


def pass_launches(
    launch: Callable[[Tensor | None, Tensor | None, Tensor | None, bool], Launch],
    chunks: Chunks,
    initial: Tensor,
    final: Tensor,
    decay: Tensor | None,
    *,
    reverse: bool,
    resets: bool,
) -> list[Launch]:
    """One pass, or the three of summaries, joints and replay.

    Args:
        launch: (entering, final, decay, write) -> a kernel over all chunks, that starts from `entering` (0 if
            None), fills `final` and `decay` where they are not None, and with `write` the outputs over time.
        initial: the state before everything, [batch, width].
        final, decay: [batch, width], filled with the state after everything and the product of decays.
    """
    if chunks.number == 1:
        return [launch(initial, final, decay, True)]
    batch, width = final.shape
    states, products, entering = (final.new_empty(batch, chunks.number, width) for _ in range(3))
    arguments = {
        "states": states,
        "products": products,
        "initial": initial,
        "entering": entering,
        "final": final,
        "decay": decay,
    }
    arguments["num_chunks"] = chunks.number
    channels = 32  # a warp each: what counts is that many programs wait for memory at once
    rows = min(triton.next_power_of_2(chunks.number), 16)
    constants = {"WIDTH": width, "CHANNELS": channels, "ROWS": rows, "REVERSE": reverse, "RESETS": resets}
    joints = Launch(combine_kernel, batch * math.ceil(width / channels), 1, arguments, constants)
    return [launch(None, states, products, False), joints, launch(entering, None, None, True)]
