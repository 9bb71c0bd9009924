"""`minrnn bench data`: whether training waits for its data.

    raw read        reads every file of the corpus once: the upper limit, since a byte is a token
    minrnn          ChunkLoader, in this process or in worker processes: documents to chunks with positions
    datasets        IterableDataset -> map(tokenizer) -> map(group), as transformers' run_clm, same tokenizer
    training step   the consumption of our model at --params: the demand

All rates are in tokens per second, by default on the interpreter's standard library. A worker reads ahead
during the turns of others, so chunks that are ready are taken before the clock starts.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..output import si, table
from .command import Settings, parse_counts
from .measure import Timing, Turn, Unavailable, failure_reason, round_robin
from .record import Record
from .train import TrainingWork, add_model_arguments, resolve_model

DESCRIPTION = """Time the data path, compared with the disk, with the `datasets` library, and with the
consumption of a training step. Prints a table, writes JSON and a plot."""
EXAMPLES = """
  minrnn bench data
  minrnn bench data --corpus 'shards/*.jsonl' --lanes 16 --chunk 1024 --workers 0,1,2
"""
PEERS = ("datasets",)
TRAINING, RAW = "training step", "raw read"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model_arguments(parser)
    parser.add_argument(
        "--corpus", default="python-stdlib", help="as a recipe's data.corpus (default: %(default)s)"
    )
    parser.add_argument("--lanes", type=int, default=8, help="rows of a chunk (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--workers", default="0,1", help="worker processes to try (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=256, help="documents that are shuffled together (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="chunks taken in a turn (default: %(default)s)"
    )


def resolve(arguments: argparse.Namespace, settings: Settings) -> None:
    """Parse the lists in the arguments, in place."""
    resolve_model(arguments, settings)
    workers = [word.strip() for word in arguments.workers.split(",")]
    arguments.workers = [0] * ("0" in workers) + parse_counts(
        settings, "--workers", ",".join(word for word in workers if word != "0")
    )
    for name in ("lanes", "chunk", "window", "steps"):
        settings.at_least(f"--{name}", getattr(arguments, name), 1)


def run(arguments: argparse.Namespace, record: Record) -> None:
    """Measure all contenders in one rotation."""
    num_tokens = arguments.lanes * arguments.chunk
    closers: list[Callable[[], None]] = []
    turns: dict[str, Turn] = {}
    failed: dict[str, str] = {}
    makers: dict[str, Callable[[], Turn]] = {RAW: lambda: _raw_read(arguments, num_tokens)}
    makers |= {f"minrnn, {n} worker(s)": _loader_maker(arguments, n, closers) for n in arguments.workers}
    makers |= {"datasets": lambda: _datasets(arguments)} if "datasets" in arguments.peers else {}
    makers |= {TRAINING: lambda: _training(arguments)}
    for name, make in makers.items():
        try:
            turns[name] = make()
        except Exception as error:
            failed[name] = failure_reason(error)
    try:
        with tqdm(total=arguments.rounds * len(turns), desc=f"data, {arguments.corpus}", leave=False) as bar:
            timings = round_robin(turns, arguments.rounds, arguments.limit, bar)
    finally:
        for close in closers:
            close()
    timings |= {name: Timing(reason=reason) for name, reason in failed.items()}
    rates = {name: num_tokens / timing.median for name, timing in timings.items() if timing.seconds}
    rows: list[dict[str, Any]] = []
    for name in makers:
        row = {
            "section": "data",
            "contender": name,
            "tokens_per_turn_step": num_tokens,
            **timings[name].row(),
        }
        if name in rates:
            row["tokens_per_second"] = rates[name]
            row |= {
                f"of_{key}": rates[name] / rates[other]
                for key, other in (("demand", TRAINING), ("raw_read", RAW))
                if other in rates
            }
        rows.append(row)
    record.add(rows)
    print(
        _table(rows, f"data path, {arguments.corpus}, {arguments.lanes} x {arguments.chunk} tokens at a time")
    )


def _raw_read(arguments: argparse.Namespace, num_tokens: int) -> Turn:
    """Read every file; returns the seconds for as many bytes as a chunk has tokens."""
    from ...data.corpus import CorpusSpec, open_source
    from ...data.sources import TextFiles

    source = open_source(CorpusSpec(arguments.corpus))
    if not isinstance(source, TextFiles):
        raise Unavailable(f"{arguments.corpus} is not made of text files, whose bytes are tokens")
    files: list[Path] = source.paths

    def turn() -> dict[str, float]:
        start = time.perf_counter()
        num_bytes = sum(len(path.read_bytes()) for path in files)
        return {"seconds": (time.perf_counter() - start) * num_tokens / num_bytes}

    return turn


def _loader_maker(
    arguments: argparse.Namespace, workers: int, closers: list[Callable[[], None]]
) -> Callable[[], Turn]:
    """A function that makes a turn of our loader, as training uses it."""

    def make() -> Turn:
        from ...data import BYTES, ChunkLoader, CorpusSpec, Encoder, ReaderSpec, byte_tokenizer

        encoder = Encoder.from_tokenizer(byte_tokenizer(), BYTES)
        spec = ReaderSpec(
            CorpusSpec(arguments.corpus),
            "documents",
            encoder,
            1,
            arguments.lanes,
            arguments.chunk,
            arguments.window,
            arguments.seed,
        )
        loader = ChunkLoader(spec, [0], [None], workers)
        closers.append(loader.close)
        return _taking(iter(loader), arguments.steps)

    return make


def _taking(items: Iterator[Any], num_steps: int) -> Turn:
    """A turn that takes items; those that may be ready are taken before the clock starts."""

    def turn() -> dict[str, float]:
        for _ in itertools.islice(items, 8):
            pass
        start = time.perf_counter()
        for _ in itertools.islice(items, num_steps):
            pass
        return {"seconds": (time.perf_counter() - start) / num_steps}

    return turn


def _datasets(arguments: argparse.Namespace) -> Turn:
    """A turn of `datasets`: documents, tokenized and cut by two batched maps as in run_clm, then stacked to
    chunks.
    """
    from datasets import IterableDataset

    from ...data import CorpusSpec, byte_tokenizer, open_source
    from ...data.sources import Position

    tokenizer, source = byte_tokenizer(), open_source(CorpusSpec(arguments.corpus))
    length = arguments.chunk

    def documents() -> Iterator[dict[str, str]]:
        for shard in range(source.num_shards):
            for document in source.read(shard, Position()):
                if document.text is not None:
                    yield {"text": document.text}

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            "input_ids": tokenizer(batch["text"], return_attention_mask=False, return_token_type_ids=False)[
                "input_ids"
            ]
        }

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(itertools.chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]}

    dataset: Any = IterableDataset.from_generator(documents)
    dataset = dataset.map(encode, batched=True, batch_size=64, remove_columns=["text"]).map(
        group, batched=True, batch_size=64
    )

    def chunks() -> Iterator[torch.Tensor]:
        rows: list[list[int]] = []
        while True:
            for row in dataset:
                rows.append(row["input_ids"])
                if len(rows) == arguments.lanes:
                    yield torch.tensor(rows)
                    rows = []

    return _taking(chunks(), arguments.steps)


def _training(arguments: argparse.Namespace) -> Turn:
    """A turn of training steps of our default model, on chunks of this size."""
    names = ("params", "layers", "dtype", "device", "threads", "seed", "min_seconds", "compile")
    spec = {"family": "minrnn", **{name: getattr(arguments, name) for name in names}}
    work = TrainingWork(
        {**spec, "batch": arguments.lanes, "length": arguments.chunk, "chunk": arguments.chunk}
    )
    return lambda: {"seconds": work.turn()["seconds"]}


def _table(rows: list[dict[str, Any]], title: str) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: row["contender"],
        "tokens/s": lambda row: si(row["tokens_per_second"]),
        "of the demand": lambda row: f"{row['of_demand']:.3g}" if "of_demand" in row else "",
        "of raw read": lambda row: f"{row['of_raw_read']:.3g}" if "of_raw_read" in row else "",
    }
    return table(rows, columns, title)


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw a bar for each contender."""
    axes = figure.subplots()
    axes.barh([row["contender"] for row in rows], [row["tokens_per_second"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("tokens/s")
