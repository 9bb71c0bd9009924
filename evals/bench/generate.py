"""`minrnn bench generate`: time and memory of decoding after a context, and the speed of reading it.

    prefill   tokens per second while a context is read: at most --read tokens, ours in pieces of --prefill
    decode    seconds of one step (one token per row) after a context; the most likely token is fed back

Ours reads every context of up to --read-ours tokens (all rows together). For longer ones, and for recurrent
peers beyond --read, the state is one after fewer tokens, which has the same size and cost. Llama decodes from
random keys and values, as many as the context has tokens. `context_read` in a row is the number of tokens
that were read before decoding. Weights are in --dtype, without autocast (which would cast them at every
step). Finally ours decodes after all contexts in one rotation (section "contexts"), since rotations that are
minutes apart differ by more than the contexts do.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...pipeline.machine import keep_freed_memory
from ..memory import current_memory, peak_memory, release_memory, reset_peak_memory, synchronize, tensor_bytes
from ..output import si, table
from .command import Settings, parse_counts
from .decoders import Decoder, make_decoder
from .language_models import FAMILIES, Options, build, is_ours, kernel_names
from .language_models import PEERS as PEERS
from .measure import DTYPES, Stopwatch, ceiling_rows, default_ceilings, without_preparation
from .record import Record
from .train import add_model_arguments, resolve_model
from .worker import run_contest

DESCRIPTION = """Time reading a context and decoding after it, for ours and for language models with as many
parameters, and measure the memory. Prints tables, writes JSON and a plot."""
EXAMPLES = """
  minrnn bench generate                          # contexts from 1,024 to 1,048,576 tokens, batches 1 and 16
  minrnn bench generate --contexts 1024,16384 --batches 1 --peers llama
  minrnn bench generate --device cuda --dtype bf16 --params 350M --layers 24 --cuda-graphs
"""
GRAPH = " (CUDA graph)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model_arguments(parser)
    parser.add_argument(
        "--contexts",
        default="1024,2048,16384,131072,1048576",
        help="tokens before the first new one (default: %(default)s)",
    )
    parser.add_argument("--batches", default="1,16", help="rows that decode together (default: %(default)s)")
    parser.add_argument(
        "--prefill",
        type=int,
        default=8192,
        help="tokens, over all rows, that ours reads at once (default: %(default)s)",
    )
    parser.add_argument(
        "--read",
        type=int,
        default=16_384,
        help="tokens, over all rows, on which a prefill is timed (default: %(default)s)",
    )
    parser.add_argument(
        "--read-ours",
        type=int,
        default=2**20,
        help="longest contexts, over all rows, that ours reads completely (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=16, help="tokens to decode in a turn, per row (default: %(default)s)"
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="measure each contender also with its step captured in a CUDA graph",
    )


def resolve(arguments: argparse.Namespace, settings: Settings) -> None:
    """Parse the lists in the arguments, in place."""
    resolve_model(arguments, settings)
    arguments.contexts = parse_counts(settings, "--contexts", arguments.contexts)
    arguments.batches = parse_counts(settings, "--batches", arguments.batches)
    for name in ("prefill", "read", "read_ours", "steps"):
        settings.at_least(f"--{name.replace('_', '-')}", getattr(arguments, name), 1)
    if arguments.cuda_graphs and not arguments.device.startswith("cuda"):
        settings.errors.append(("--cuda-graphs", "is for --device cuda"))


# --- A contender


class DecodingWork:
    """One model that reads a context and decodes; see `worker.Work`."""

    def __init__(self, spec: Mapping[str, Any]):
        torch.set_num_threads(spec["threads"])
        keep_freed_memory()
        self.device, self.steps, self.batch = torch.device(spec["device"]), spec["steps"], spec["batch"]
        torch.manual_seed(spec["seed"])
        options = Options(spec["layers"], compiled=spec["compile"])
        model, size, count = build(spec["family"], spec["params"], options, self.device)
        model.to(DTYPES[spec["dtype"]]).eval()
        self.weights_bytes = tensor_bytes(model.parameters())
        self.decoder = make_decoder(
            spec["family"], torch.compile(model) if spec["compile"] else model, self.batch, self.steps + 8
        )
        self.token = torch.zeros(self.batch, 1, dtype=torch.long, device=self.device)
        self.info = {
            "parameters": count,
            "width": size[0],
            "fine": size[1],
            "kernels": kernel_names(spec["family"], spec["compile"]),
        }
        with torch.inference_mode():
            # memory that libraries allocate once (compilers, thread pools) is not counted
            self.decoder.read(self.token.expand(-1, 8))
            self.decoder.reset()
            release_memory(self.device)
            self.memory_before = current_memory(self.device) - self.weights_bytes
            self.info |= self._read(spec)
            release_memory(self.device)  # memory of the prefill is not part of decoding
            self.decoder.set_fake_state(spec["context"])
            self.info |= {"weights_bytes": self.weights_bytes, "state_bytes": self.decoder.state_bytes()}
            self.graph = capture(self.decoder, self.token) if spec["graph"] else None

    def _read(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Read the context up to the limit for this family; returns tokens per second and peak memory."""
        ours, rows, context = is_ours(spec["family"]), self.batch, spec["context"]
        is_complete = ours and rows * context <= spec["read_ours"]
        length = context if is_complete else max(1, min(context, spec["read"] // rows))
        piece = max(1, min(length, spec["prefill"] // rows)) if ours else length
        tokens = torch.randint(256, (rows, piece), device=self.device)
        self.decoder.read(tokens)  # warm-up
        self.decoder.reset()
        reset_peak_memory(self.device)
        synchronize(self.device)
        start = time.perf_counter()
        for first in range(0, length, piece):
            self.decoder.read(tokens[:, : min(piece, length - first)])
        synchronize(self.device)
        rate = rows * length / (time.perf_counter() - start)
        peak = peak_memory(self.device) - self.memory_before
        return {"context_read": length, "prefill_tokens_per_second": rate, "prefill_peak_bytes": peak}

    def turn(self) -> dict[str, float]:
        """Measure the seconds per step (one token per row) and the peak memory, including weights and
        state.
        """
        own = self.weights_bytes + self.decoder.state_bytes()
        others = current_memory(self.device) - self.memory_before - own if self.device.type == "cuda" else 0
        reset_peak_memory(self.device)
        with torch.inference_mode():
            self._decode(2)
            synchronize(self.device)
            start = time.perf_counter()
            self._decode(self.steps)
            synchronize(self.device)
        return {
            "seconds": (time.perf_counter() - start) / self.steps,
            "peak_bytes": peak_memory(self.device) - self.memory_before - others,
        }

    def _decode(self, num_steps: int) -> None:
        self.decoder.rewind()
        for _ in range(num_steps):
            if self.graph is not None:
                self.graph.replay()
            else:
                self.token = self.decoder.step(self.token)


def capture(decoder: Decoder, token: Tensor) -> torch.cuda.CUDAGraph:
    """Capture one step as a graph that reads and writes `token` and the current state."""

    def step() -> None:
        before = decoder.state_tensors()
        next_token = decoder.step(token)
        for old, new in zip(before, decoder.state_tensors(), strict=True):
            if old is not new:
                old.copy_(new)
        decoder.set_state_tensors(before)
        token.copy_(next_token)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # allocations and autotuning of the first use must not be captured
            step()
    torch.cuda.current_stream().wait_stream(stream)
    decoder.rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def build_work(spec: Mapping[str, Any]) -> DecodingWork:
    """Build the contender of a spec."""
    return DecodingWork(spec)


# --- The bench


def run(arguments: argparse.Namespace, record: Record) -> None:
    """Measure every batch and context, then ours after all contexts in one rotation."""
    for batch in arguments.batches:
        for context in arguments.contexts:
            rows, ceilings = measure_context(batch, context, arguments)
            record.data["ceilings"][f"batch {batch}, context {context}"] = ceilings
            record.add(rows)
            title = (
                f"decoding {batch} row(s) after {context:,} tokens, {arguments.dtype} on {arguments.device}"
            )
            print(_table(rows, title))
        if len(arguments.contexts) > 1:
            for family in arguments.cells:
                rows = measure_contexts(family, batch, arguments)
                record.add(rows)
                setting = f"{arguments.dtype} on {arguments.device}"
                print(_table(rows, f"decoding {batch} row(s), all contexts in one rotation, {setting}"))


def _spec(
    family: str, batch: int, context: int, arguments: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    names = (
        "params",
        "layers",
        "dtype",
        "device",
        "threads",
        "seed",
        "compile",
        "prefill",
        "read",
        "read_ours",
        "steps",
    )
    common = {"module": "generate", "family": family, "batch": batch, "context": context, "graph": False}
    return {**common, **{name: getattr(arguments, name) for name in names}, **more}


def measure_contexts(family: str, batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one of our families after every context, measured in one rotation.

    `of_shortest` is the time relative to that after the shortest context.
    """
    shortest = min(arguments.contexts)
    specs = {
        f"{family} after {context:,}": _spec(family, batch, context, arguments)
        for context in arguments.contexts
    }
    rounds = 4 * arguments.rounds
    with tqdm(total=rounds * len(specs), desc="generate, contexts in turn", leave=False) as bar:
        timings, infos = run_contest(specs, rounds, arguments.limit, arguments.device == "cpu", {}, bar)
    rows = [
        {
            "section": "contexts",
            "contender": name,
            "context": spec["context"],
            "batch": batch,
            **infos.get(name, {}),
            **timings[name].row(),
        }
        for name, spec in specs.items()
    ]
    base = next(row.get("median_seconds") for row in rows if row["context"] == shortest)
    for row in rows:
        if base and row.get("median_seconds"):
            row |= {
                "of_shortest": row["median_seconds"] / base,
                "tokens_per_second": batch / row["median_seconds"],
            }
    return rows


def measure_context(
    batch: int, context: int, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of all contenders after one context, and the ceilings of the same rotation."""
    device = torch.device(arguments.device)
    families = [*arguments.cells, *arguments.peers]
    specs = {family: _spec(family, batch, context, arguments) for family in families}
    if arguments.cuda_graphs:
        specs |= {family + GRAPH: _spec(family, batch, context, arguments, graph=True) for family in families}
    ceilings = default_ceilings(device, DTYPES[arguments.dtype], tiny=context <= 256)
    clocks = {
        name: Stopwatch(without_preparation(ceiling.function), device, arguments.min_seconds)
        for name, ceiling in ceilings.items()
    }
    with tqdm(
        total=arguments.rounds * (len(specs) + len(clocks)),
        desc=f"generate, {batch} x {context}",
        leave=False,
    ) as bar:
        timings, infos = run_contest(
            specs, arguments.rounds, arguments.limit, device.type == "cpu", clocks, bar
        )
    rows: list[dict[str, Any]] = []
    for name in specs:
        row = {
            "section": "generate",
            "contender": name,
            "context": context,
            "batch": batch,
            **infos.get(name, {}),
            **timings[name].row(),
        }
        if timings[name].seconds:
            row["tokens_per_second"] = batch / timings[name].median
        rows.append(row)
    first = next((row.get("tokens_per_second") for row in rows if is_ours(row["contender"])), None)
    for row in rows:
        if first and "tokens_per_second" in row:
            row["of_ours"] = row["tokens_per_second"] / first
    return rows, ceiling_rows(timings, ceilings)


def _table(rows: list[dict[str, Any]], title: str) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: row["contender"],
        "parameters": lambda row: f"{row['parameters']:,}",
        "ms/step": lambda row: f"{1e3 * row['median_seconds']:.3g}",
        "tokens/s": lambda row: si(row["tokens_per_second"]),
        "of ours": lambda row: f"{row['of_ours']:.2f}" if "of_ours" in row else "",
        "state": lambda row: si(row["state_bytes"], "B"),
        "peak memory": lambda row: si(row["peak_bytes"], "B"),
        "prefill tokens/s": lambda row: si(row["prefill_tokens_per_second"]),
        "read": lambda row: f"{row['context_read']:,}",
    }
    return table(rows, columns, title)


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw time per step and memory by context, one line per contender, for the first batch size."""
    left, right = figure.subplots(1, 2)
    rows = [row for row in rows if row["section"] == "generate" and row["batch"] == rows[0]["batch"]]
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted(
            (row["context"], 1e3 * row["median_seconds"], row["peak_bytes"] / 1e9)
            for row in rows
            if row["contender"] == name
        )
        contexts, milliseconds, memory = zip(*points, strict=True)
        family = name.removesuffix(GRAPH)
        left.loglog(contexts, milliseconds, marker="o", label=name.replace(family, FAMILIES[family].title))
        right.loglog(contexts, memory, marker="o")
    left.set_ylabel("ms a step")
    right.set_ylabel("peak memory (GB)")
    for axes in (left, right):
        axes.set_xlabel("context (tokens)")
    if rows:
        left.set_title(f"batch {rows[0]['batch']}", fontsize=9)
        left.legend(fontsize=7)
