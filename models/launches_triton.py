"""Launches of the Triton scans: tile sizes, chunks of time, and the order of the kernels.

`tiles_triton` describes tiles, lanes and chunks.
"""

# pyright: reportOptionalMemberAccess=false
# (triton may be missing)

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tiles_triton import combine_kernel, triton


class Tile(NamedTuple):
    """The tokens and channels that a program processes at once."""

    lanes: int
    """Ranges of time that are scanned in parallel, one warp each."""
    rows: int
    """Tokens of a lane; at most 32, because their document starts are the bits of an integer."""
    channels: int
    """Width of the block; a power of two."""
    stages: int = 1
    """If greater than 1, tiles are prefetched this many ahead through shared memory (cp.async)."""

    @property
    def tokens(self) -> int:
        return self.lanes * self.rows


class Chunks(NamedTuple):
    """How time is cut: `number` programs of `length` tokens each; the last one may be shorter."""

    number: int
    length: int


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for anything else, so that the interpreter makes one pass."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def plan_chunks(
    batch: int, time: int, width: int, tile: Tile, multiprocessors: int, number: int | None = None
) -> Chunks:
    """One chunk if rows and channel blocks occupy the chip, otherwise several.

    Several are enough for four waves of two programs per multiprocessor.

    Cutting time costs a second read: a forward pass moves 10 bytes instead of 6. So one pass is faster as
    long as it occupies 3/5 of the chip.

    Args:
        number: use this number of chunks (fewer if time is too short); for tests and tuning.
    """
    programs = max(batch * math.ceil(width / tile.channels), 1)
    if number is None:
        number = 1 if 5 * programs >= 3 * multiprocessors else 8 * multiprocessors // programs
    tiles = max(math.ceil(time / tile.tokens), 1)
    tiles_each = math.ceil(tiles / number)
    return Chunks(math.ceil(tiles / tiles_each), tiles_each * tile.tokens)


@dataclass(frozen=True)
class Launch:
    """One kernel call, as data, so that the same kernels can be compiled and analysed without a GPU."""

    kernel: Any
    programs: int
    num_warps: int
    arguments: dict[str, Tensor | int | None] = field(repr=False)
    constants: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options.

        One step of the recurrence is one multiply-add, whatever Triton's default. `maxnreg` is the number of
        registers with which two programs fit on a multiprocessor; without it the assembler uses fewer, and
        waits between loads.
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
    """Run the launches in order, on the current stream of their tensors' device."""
    for launch in launches:
        launch.run()


def with_contiguous_channels(x: Tensor) -> Tensor:
    """x [batch, time, width] with stride 1 in the last dimension; the other strides are arbitrary."""
    return x if x.stride(-1) == 1 else x.contiguous()


def chunked_launch(
    kernel, arguments: dict, constants: dict, shape: tuple[int, int, int], tile: Tile, chunks: Chunks
) -> Launch:
    """The launch of a kernel over all chunks, rows and channel blocks of [batch, time, width]."""
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
    """The launch of one pass, or the three launches of summaries, combination and replay.

    Args:
        launch: (entering, final, decay, write) -> a launch over all chunks that starts from `entering` (0 if
            None), fills `final` and `decay` if not None, and with `write` the outputs over time.
        initial: the state before the first token, [batch, width].
        final, decay: [batch, width], filled with the state after the last token and the product of decays.
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
    channels = 32  # one warp per program, so that many programs wait for memory at once
    rows = min(triton.next_power_of_2(chunks.number), 16)
    constants = {"WIDTH": width, "CHANNELS": channels, "ROWS": rows, "REVERSE": reverse, "RESETS": resets}
    combine = Launch(combine_kernel, batch * math.ceil(width / channels), 1, arguments, constants)
    return [launch(None, states, products, False), combine, launch(entering, None, None, True)]
