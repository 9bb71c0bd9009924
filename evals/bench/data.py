"""`minrnn bench data`: whether training waits for its data.

    minrnn          ChunkLoader, in this process or in worker processes: documents to chunks with positions
    prepared        the same, from the tokens that `minrnn prepare` wrote of the same documents
    encode_batch    the tokenizer alone, on the same documents in main memory: the upper limit for BPE
    raw read        reads the file of the documents: the upper limit for bytes, since a byte is a token
    datasets        load_dataset(streaming=True) -> map(tokenizer) -> map(group), as transformers' run_clm
    training step   the consumption of our model at --params: the demand
    quickstart      the shipped recipe, with its worker: the share of a step that it waits for data

All contenders of a section read the same text, with the same tokenizer, as documents of one length: short
(about 1,000 characters) or long (about a million); own stands for the corpus's own documents. Rates are in
tokens per second. A loader reads ahead after its turn: the next turn waits until that has ended, and as many
tokens as a loader can hold ready are taken before its clock starts. The default length of a chunk is that of
the recipe fineweb-350m; a shorter one costs more per token, since each chunk carries the position of every
lane.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...data import BYTES, ChunkLoader, CorpusSpec, Encoder, ReaderSpec, byte_tokenizer, cache_folder
from ...data.loader import READ_AHEAD_STEPS
from ...data.prepared.make import prepare
from ...data.read_ahead import GROUP_CHARACTERS
from ...pipeline.metrics import read_metrics
from ..output import si, table
from .command import Settings, parse_counts
from .data_texts import DOCUMENTS, texts_of, trained_bpe
from .measure import Timing, Turn, failure_reason, round_robin, when_idle
from .record import Record
from .train import TrainingWork, add_model_arguments, resolve_model

DESCRIPTION = """Time the data path, beside the tokenizer alone, the `datasets` library and the consumption of
a training step, with bytes and with a BPE of 32,000 tokens that is trained on the standard library (cached).
Prints tables, writes JSON and a plot."""
EXAMPLES = """
  minrnn bench data
  minrnn bench data --tokenizers bpe --documents long --workers 1,2,4
  minrnn bench data --corpus 'shards/*.jsonl' --documents own --lanes 16 --chunk 1024
"""
PEERS = ("datasets",)
TRAINING, RAW, ALONE, QUICKSTART = "training step", "raw read", "encode_batch", "quickstart"
TOKENIZERS = (BYTES, "bpe")
LOGGED = 5  # steps of a line of the quickstart's metrics.jsonl
MAP_BATCH = 64  # documents that datasets tokenizes at a time
TRAINED = 512  # tokens of a lane in a step of the demand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model_arguments(parser)
    parser.add_argument(
        "--corpus", default="python-stdlib", help="as a recipe's data.corpus (default: %(default)s)"
    )
    parser.add_argument(
        "--documents", default="all", help="short, long, own, separated by commas (default: short,long)"
    )
    parser.add_argument("--tokenizers", default="all", help="bytes, bpe (default: both)")
    parser.add_argument("--lanes", type=int, default=8, help="rows of a chunk (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--workers", default="0,1,2", help="worker processes to try (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=1024, help="documents that are shuffled together (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=4_000_000, help="tokens taken in a turn (default: %(default)s)"
    )
    parser.add_argument(
        "--megabytes", type=int, default=32, help="text of the corpus to read (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="steps of the quickstart; 0 for none (default: %(default)s)"
    )


def resolve(arguments: argparse.Namespace, settings: Settings) -> None:
    """Parse the lists in the arguments, in place."""
    resolve_model(arguments, settings)
    workers = [word.strip() for word in arguments.workers.split(",")]
    arguments.workers = [0] * ("0" in workers) + parse_counts(
        settings, "--workers", ",".join(word for word in workers if word != "0")
    )
    arguments.documents = settings.choices("--documents", arguments.documents, tuple(DOCUMENTS), ("own",))
    arguments.tokenizers = settings.choices("--tokenizers", arguments.tokenizers, TOKENIZERS)
    for name in ("lanes", "chunk", "window", "tokens", "megabytes"):
        settings.at_least(f"--{name}", getattr(arguments, name), 1)
    settings.at_least("--steps", arguments.steps, 0)
    if 0 < arguments.steps < LOGGED:
        settings.errors.append(("--steps", f"must be 0 or at least {LOGGED}, not {arguments.steps}"))


@dataclass(frozen=True)
class Contest:
    """One tokenizer on documents of one length."""

    arguments: argparse.Namespace
    tokenizer_name: str
    tokenizer: Any
    """A `PreTrainedTokenizerFast`."""
    texts: list[str]
    file: Path
    """JSON lines with the texts."""

    @property
    def num_tokens(self) -> int:
        """Of a chunk."""
        return self.arguments.lanes * self.arguments.chunk

    def encoder(self) -> Encoder:
        return Encoder.from_tokenizer(self.tokenizer, self.tokenizer_name)

    def tokens_per_character(self) -> float:
        sample = "".join(self.texts[:1000])[:100_000]
        return (len(self.encoder()(sample)) - 1) / len(sample)


def run(arguments: argparse.Namespace, record: Record) -> None:
    """Measure all contenders, each tokenizer and length of documents in a rotation of its own."""
    demand = _measure({TRAINING: lambda: _training(arguments)}, arguments, TRAINING)[TRAINING]
    num_tokens = arguments.lanes * arguments.chunk
    record.add([_row("demand", TRAINING, demand, num_tokens)])
    with tempfile.TemporaryDirectory(prefix="minrnn-bench-") as folder:
        for documents in arguments.documents:
            texts = texts_of(arguments.corpus, documents, arguments.megabytes)
            file = Path(folder, f"{documents}.jsonl")
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            for name in arguments.tokenizers:
                tokenizer = byte_tokenizer() if name == BYTES else trained_bpe(cache_folder(None))
                rows = _run_contest(Contest(arguments, name, tokenizer, texts, file), documents)
                _add_ratio(rows, "of_demand", record.rows[0])
                record.add(rows)
                print(_table(rows, f"{name}, {documents} documents, {arguments.lanes} x {arguments.chunk}"))
    if arguments.steps:
        record.add([_waiting(arguments)])
        print(_waiting_line(record.rows[-1]))


def _run_contest(contest: Contest, documents: str) -> list[dict[str, Any]]:
    arguments, loaders = contest.arguments, []
    makers: dict[str, Callable[[], Turn]] = {
        f"{name}, {count} worker(s)": partial(_loader, contest, corpus, count, loaders)
        for name, corpus in (("minrnn", contest.file), ("prepared", _prepared(contest)))
        for count in arguments.workers
    }
    limit = RAW if contest.tokenizer_name == BYTES else ALONE
    makers[limit] = lambda: (_raw_read if limit == RAW else _encode_batch)(contest)
    if "datasets" in arguments.peers:
        makers["datasets"] = lambda: _taking(_datasets(contest), contest, 0)
    try:
        timings = _measure(makers, arguments, f"{contest.tokenizer_name}, {documents}")
    finally:
        for loader in loaders:
            loader.close()
    section = {"tokenizer": contest.tokenizer_name, "documents": documents}
    rows = [_row("data", name, timing, contest.num_tokens) | section for name, timing in timings.items()]
    for row, workers in zip(rows, arguments.workers * 2, strict=False):
        row["workers"] = workers
    for key, other in (("of_limit", limit), ("of_datasets", "datasets")):
        for reference in [row for row in rows if row["contender"] == other]:
            _add_ratio(rows, key, reference)
    return rows


def _measure(
    makers: dict[str, Callable[[], Turn]], arguments: argparse.Namespace, title: str
) -> dict[str, Timing]:
    turns: dict[str, Turn] = {}
    failed: dict[str, Timing] = {}
    for name, make in makers.items():
        try:
            turns[name] = when_idle(make())
        except Exception as error:
            failed[name] = Timing(reason=failure_reason(error))
    with tqdm(total=arguments.rounds * len(turns), desc=f"data, {title}", leave=False) as bar:
        timings = round_robin(turns, arguments.rounds, arguments.limit, bar) | failed
    return {name: timings[name] for name in makers}


def _row(section: str, contender: str, timing: Timing, num_tokens: int) -> dict[str, Any]:
    row = {"section": section, "contender": contender, "tokens_per_turn_step": num_tokens, **timing.row()}
    return row | ({"tokens_per_second": num_tokens / timing.median} if timing.seconds else {})


def _add_ratio(rows: list[dict[str, Any]], key: str, reference: dict[str, Any]) -> None:
    """Add each row's rate as a fraction of that of the reference."""
    for row in rows:
        if "tokens_per_second" in row and "tokens_per_second" in reference:
            row[key] = row["tokens_per_second"] / reference["tokens_per_second"]


def _raw_read(contest: Contest) -> Turn:
    """Read the file; returns the seconds for as many bytes as a chunk has tokens."""

    def turn() -> dict[str, float]:
        start = time.perf_counter()
        num_bytes = len(contest.file.read_bytes())
        return {"seconds": (time.perf_counter() - start) * contest.num_tokens / num_bytes}

    return turn


def _encode_batch(contest: Contest) -> Turn:
    """Tokenize documents of about as many tokens as others take in a turn."""
    size = contest.arguments.tokens / contest.tokens_per_character()
    ends = itertools.accumulate(map(len, contest.texts))
    texts = [text for text, end in zip(contest.texts, ends, strict=True) if end - len(text) < size]
    backend = contest.tokenizer.backend_tokenizer

    def turn() -> dict[str, float]:
        start = time.perf_counter()
        num_tokens = sum(map(len, backend.encode_batch(texts, add_special_tokens=False)))
        return {"seconds": (time.perf_counter() - start) * contest.num_tokens / num_tokens}

    return turn


def _prepared(contest: Contest) -> Path:
    """The folder of the contest's documents as tokens."""
    folder = contest.file.with_name(f"{contest.file.stem}-{contest.tokenizer_name}")
    prepare(CorpusSpec(str(contest.file)), contest.tokenizer, contest.tokenizer_name, folder, workers=0)
    return folder


def _loader(contest: Contest, corpus: Path, workers: int, loaders: list[ChunkLoader]) -> Turn:
    """A turn of our loader, as training uses it."""
    arguments = contest.arguments
    shape = (arguments.lanes, arguments.chunk, arguments.window, arguments.seed)
    spec = ReaderSpec(CorpusSpec(str(corpus)), "documents", contest.encoder(), 1, *shape)
    loader = ChunkLoader(spec, [0], [None], workers)
    loaders.append(loader)
    characters = statistics.mean(map(len, contest.texts)) * arguments.window
    num_groups = 1 + max(workers, 1)
    ready = num_groups * min(characters, GROUP_CHARACTERS) * contest.tokens_per_character()
    return _taking(loader, contest, int(ready) // contest.num_tokens + 2 * READ_AHEAD_STEPS)


def _taking(items: Iterable[Any], contest: Contest, num_ready: int) -> Turn:
    """A turn that takes chunks; those that may be ready are taken before the clock starts."""
    iterator = iter(items)
    count = max(1, contest.arguments.tokens // contest.num_tokens)

    def turn() -> dict[str, float]:
        for _ in itertools.islice(iterator, num_ready):
            pass
        start = time.perf_counter()
        for _ in itertools.islice(iterator, count):
            pass
        return {"seconds": (time.perf_counter() - start) / count}

    return turn


def _datasets(contest: Contest) -> Iterator[torch.Tensor]:
    """Chunks from `datasets`: documents, tokenized and cut by two batched maps as in run_clm, stacked."""
    from datasets import load_dataset

    tokenizer, length = contest.tokenizer, contest.arguments.chunk
    options = {"return_attention_mask": False, "return_token_type_ids": False}

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], **options)["input_ids"]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(itertools.chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]}

    dataset: Any = load_dataset("json", data_files=str(contest.file), split="train", streaming=True)
    dataset = dataset.map(encode, batched=True, batch_size=MAP_BATCH, remove_columns=["text"])
    dataset = dataset.map(group, batched=True, batch_size=MAP_BATCH)

    def rows() -> Iterator[list[int]]:
        while True:
            yield from (row["input_ids"] for row in dataset)

    endless = rows()
    while True:
        yield torch.tensor(list(itertools.islice(endless, contest.arguments.lanes)))


def _training(arguments: argparse.Namespace) -> Turn:
    """A turn of training steps of our default model, with these lanes, on chunks of at most TRAINED tokens;
    its seconds are those of a whole chunk."""
    names = ("params", "layers", "dtype", "device", "threads", "seed", "min_seconds", "compile")
    spec = {"family": "minrnn", **{name: getattr(arguments, name) for name in names}}
    length = min(arguments.chunk, TRAINED)  # a step takes time in proportion to its tokens
    work = TrainingWork({**spec, "batch": arguments.lanes, "length": length, "chunk": length})
    return lambda: {"seconds": work.turn()["seconds"] * arguments.chunk / length}


def _waiting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the quickstart for some steps, twice; how long those of the second time took and waited."""
    from .loop import LoopWork

    names = ("seed", "device", "dtype")
    work = LoopWork(
        {"loop": arguments.steps, "family": "loop", **{name: getattr(arguments, name) for name in names}}
    )
    work.turn()
    warm = work.run.step
    work.turn()
    work.run.close("KILLED")
    entries = read_metrics(work.run.output.folder.path / "metrics.jsonl")
    lines = [entry for entry in entries if entry["kind"] == "train" and entry["step"] > warm]
    num_tokens = work.run.recipe.batch.tokens_per_step
    seconds = [num_tokens / line["tokens_per_second"] for line in lines]
    waited = [line["data_seconds"] for line in lines]
    row = {"section": "waiting", "contender": QUICKSTART, **Timing(seconds).row()}
    return row | {"data_seconds": statistics.mean(waited), "waiting": sum(waited) / sum(seconds)}


def _waiting_line(row: dict[str, Any]) -> str:
    milliseconds = (1000 * row[name] for name in ("median_seconds", "data_seconds"))
    step, waited = (f"{value:.2f} ms" for value in milliseconds)
    return f"the quickstart's step takes {step} and waits {waited} for data: {row['waiting']:.2%}"


def _table(rows: list[dict[str, Any]], title: str) -> str:
    def ratio(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[key]:.3g}" if key in row else ""

    def per_worker(row: dict[str, Any]) -> str:
        return si(row["tokens_per_second"] / max(row["workers"], 1)) if "workers" in row else ""

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: row["contender"],
        "tokens/s": lambda row: si(row["tokens_per_second"]),
        "a worker": per_worker,
        "of the limit": ratio("of_limit"),
        "of datasets": ratio("of_datasets"),
        "of the demand": ratio("of_demand"),
    }
    return table(rows, columns, title)


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw a panel for each tokenizer and length of documents: a bar for each contender, and the demand."""
    demand = [row for row in rows if row["section"] == "demand"]
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["section"] == "data":
            panels.setdefault(f"{row['tokenizer']}, {row['documents']} documents", []).append(row)
    num_rows, num_columns = max(-(-len(panels) // 2), 1), min(max(len(panels), 1), 2)
    figure.set_size_inches(12, 1 + 3.2 * num_rows)
    all_axes = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False).flat
    for axes, (title, of_panel) in zip(all_axes, panels.items(), strict=False):
        bars = axes.barh(
            [row["contender"] for row in of_panel], [row["tokens_per_second"] for row in of_panel]
        )
        axes.bar_label(bars, [si(row["tokens_per_second"]) for row in of_panel], padding=3, fontsize=8)
        for row in demand:
            axes.axvline(row["tokens_per_second"], color="C3", linestyle="--", label=row["contender"])
        axes.set(title=title, xlabel="tokens/s", xscale="log")
        axes.margins(x=0.15)
        axes.invert_yaxis()
    if demand and panels:
        figure.axes[0].legend(fontsize=8)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
