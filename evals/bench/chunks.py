"""`minrnn bench chunks`: gradients through K chunks of a text (`batch.backprop_chunks`), speed and memory.

    step:  backprop_through_chunks over K chunks -> clip -> fused AdamW

A step reads K chunks of one row, with the state carried from step to step. What should grow with K is the
states that are kept, one for each chunk, and the text itself. The chunks are computed forward twice, so the
rate may fall to three quarters of that of K = 1. Steps of more than `LONG` tokens are measured once.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...models.backprop import backprop_through_chunks
from ..memory import peak_memory, reset_peak_memory, synchronize, tensor_bytes
from ..output import si, table
from .command import Settings, parse_counts
from .record import Record
from .train import TrainingWork, add_model_arguments, resolve_model
from .worker import run_contest

DESCRIPTION = """Time training steps whose gradients go through 1 to 1,024 chunks of a text, and measure their
memory. Prints a table, writes JSON and a plot."""
EXAMPLES = """
  minrnn bench chunks                                   # 10.7M parameters, up to 1,048,576 tokens in a step
  minrnn bench chunks --counts 1,16 --chunk 4096 --cells minrnn-hgrn
"""
PEERS: tuple[str, ...] = ()
LONG = 65_536  # tokens of a step that is measured more than once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model_arguments(parser)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a chunk (default: %(default)s)")
    parser.add_argument(
        "--counts", default="1,8,64,1024", help="numbers of chunks of a step (default: %(default)s)"
    )


def resolve(arguments: argparse.Namespace, settings: Settings) -> None:
    """Parse the lists in the arguments, in place."""
    resolve_model(arguments, settings)
    settings.at_least("--chunk", arguments.chunk, 1)
    arguments.counts = parse_counts(settings, "--counts", arguments.counts)


class ChunksWork(TrainingWork):
    """Our model that takes steps of several chunks; see `worker.Work`."""

    def __init__(self, spec: Mapping[str, Any]):
        super().__init__({**spec, "batch": 1, "length": spec["chunk"] * spec["count"]})

    def step(self) -> None:
        """Forward and backward through all chunks, then the update."""
        self.optimizer.zero_grad()
        pieces = zip(self.inputs.split(self.chunk, 1), self.targets.split(self.chunk, 1), strict=True)
        chunks = [{"input_ids": inputs, "shift_labels": targets} for inputs, targets in pieces]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            _, self.state = backprop_through_chunks(self.run_model, chunks, self.state)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def turn(self) -> dict[str, float]:
        """Measure the seconds per step, and the peak memory above that before the model was built."""
        if self.length <= LONG:
            self.step()
        reset_peak_memory(self.device)
        synchronize(self.device)
        start, num_steps = time.perf_counter(), 0
        while not num_steps or time.perf_counter() - start < self.min_seconds:
            self.step()
            synchronize(self.device)
            num_steps += 1
        seconds = (time.perf_counter() - start) / num_steps
        state = 0 if self.state is None else tensor_bytes(self.state.tensors())
        peak = peak_memory(self.device) - self.memory_before
        return {"seconds": seconds, "peak_bytes": peak, "state_bytes": state}


def build_work(spec: Mapping[str, Any]) -> ChunksWork:
    """Build the contender of a spec."""
    return ChunksWork(spec)


def run(arguments: argparse.Namespace, record: Record) -> None:
    """Measure every number of chunks, those of one model in rotation."""
    for family in arguments.cells:
        rows = measure(family, arguments)
        record.add(rows)
        title = f"gradients through chunks of {arguments.chunk:,} tokens, {family}, {arguments.dtype}"
        print(table(rows, COLUMNS, title))


def measure(family: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of chunks."""
    names = ("params", "layers", "dtype", "device", "threads", "seed", "min_seconds", "compile", "chunk")
    common = {"module": "chunks", "family": family, **{name: getattr(arguments, name) for name in names}}
    specs = {f"{count} chunks": {**common, "count": count} for count in arguments.counts}
    is_long = {name: spec["count"] * spec["chunk"] > LONG for name, spec in specs.items()}
    timings, infos = {}, {}
    for rounds, limit, long in ((arguments.rounds, arguments.limit, False), (1, float("inf"), True)):
        own = {name: spec for name, spec in specs.items() if is_long[name] is long}
        if not own:
            continue
        with tqdm(total=rounds * len(own), desc=f"chunks, {family}", leave=False) as bar:
            measured = run_contest(own, rounds, limit, arguments.device == "cpu", {}, bar)
        timings, infos = timings | measured[0], infos | measured[1]
    rows: list[dict[str, Any]] = []
    for name, spec in specs.items():
        row = {"section": "chunks", "contender": name, "cell": family, "count": spec["count"]}
        row |= {"chunk": arguments.chunk, **infos.get(name, {}), **timings[name].row()}
        if timings[name].seconds:
            row["tokens_per_second"] = spec["count"] * arguments.chunk / timings[name].median
        rows.append(row)
    first = rows[0]
    for row in rows:
        if "seconds" in first and "seconds" in row:
            row["of_first"] = row["tokens_per_second"] / first["tokens_per_second"]
            row["more_bytes"] = row["peak_bytes"] - first["peak_bytes"]
            # K states and the gradient of one are kept, and the inputs and targets of all chunks.
            row["expected_more_bytes"] = (row["count"] - first["count"]) * (
                row["state_bytes"] + 2 * 8 * arguments.chunk
            )
    return rows


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "": lambda row: row["contender"],
    "tokens": lambda row: f"{row['count'] * row['chunk']:,}",
    "s/step": lambda row: f"{row['median_seconds']:.3g}",
    "tokens/s": lambda row: si(row["tokens_per_second"]),
    "of first": lambda row: f"{row['of_first']:.2f}" if "of_first" in row else "",
    "peak memory": lambda row: si(row["peak_bytes"], "B"),
    "more than first": lambda row: si(row["more_bytes"], "B") if row.get("more_bytes") else "",
    "states and text": lambda row: si(row["expected_more_bytes"], "B") if row.get("more_bytes") else "",
}


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw tokens per second and memory by the number of chunks, one line per cell."""
    left, right = figure.subplots(1, 2)
    for cell in dict.fromkeys(row["cell"] for row in rows):
        own = [row for row in rows if row["cell"] == cell and "seconds" in row]
        tokens = [row["count"] * row["chunk"] for row in own]
        left.semilogx(tokens, [row["tokens_per_second"] for row in own], marker="o", label=cell)
        right.semilogx(tokens, [row["peak_bytes"] / 1e9 for row in own], marker="o", label=cell)
    left.set_ylabel("tokens/s")
    right.set_ylabel("peak memory (GB)")
    for axes in (left, right):
        axes.set_xlabel("tokens that gradients go through")
        axes.set_ylim(bottom=0)
    left.legend(fontsize=7)
