"""`minrnn bench train`: speed of whole training steps in tokens per second, and their memory.

    step:  forward -> loss -> backward -> clip -> fused AdamW

A step uses bf16 autocast and weights in fp32, as pipeline/loop.py does.

All models have the same number of parameters and layers, read the same random bytes, and have the same loss
(ours gets its targets as shift_labels and carries its state from step to step, as in training). A step has a
fixed number of tokens, split into rows of one length; a greater length is one row. In that case ours runs
twice: whole, with the gradient through the whole row, as the peers do; and in chunks (`minrnn-chunked`) with
the state carried and the gradient cut at the chunk, as our training does, which bounds the memory. The ratio
to the machine's matrix product counts 6 floating-point operations per parameter and token for every model.

`--stream N` trains ours on one document of at least N tokens, one step per chunk, with the state carried
throughout.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...models.cache import MinRNNCache
from ...models.loss import next_token_loss
from ...pipeline.machine import keep_freed_memory, training_flops_per_token
from ..memory import current_memory, peak_memory, release_memory, reset_peak_memory, synchronize, tensor_bytes
from ..output import si, table
from .command import Settings, parse_counts
from .language_models import (
    FAMILIES,
    OTHER_OURS,
    OURS,
    Options,
    build,
    compute_logits,
    find_size,
    is_ours,
    kernel_names,
    limits,
)
from .language_models import OTHER_PEERS as OTHER_PEERS
from .language_models import PEERS as PEERS
from .measure import DTYPES, Stopwatch, Unavailable, ceiling_rows, default_ceilings, without_preparation
from .record import Record
from .worker import run_contest

DESCRIPTION = """Time a whole training step of ours and of language models with as many parameters, by length,
and measure the memory. Prints tables, writes JSON and a plot."""
EXAMPLES = """
  minrnn bench train                                    # 10.7M parameters, 6 layers, 4096 tokens a step
  minrnn bench train --peers llama,lstm --lengths 512,4096
  minrnn bench train --lengths none --stream 1000000    # ours on one document of a million tokens
  minrnn bench train --lengths none --loop 100          # overhead of checkpoints, logging, tracking and data
  minrnn bench train --device cuda --params 350M --layers 24 --tokens 65536 --lengths 512 --compile
"""
CHUNKED = "minrnn-chunked"
LOOP_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "": lambda row: row["contender"],
    "s/step": lambda row: f"{row['median_seconds']:.4f}",
    "overhead": lambda row: f"{100 * row['overhead']:+.2f} %" if "overhead" in row else "",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options on the models' size, which several benchmarks share."""
    parser.add_argument(
        "--params", default="10.7M", help="parameters of every model, within 2%% (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=6, help="layers of every model (default: %(default)s)")
    parser.add_argument(
        "--cells",
        default="minrnn",
        help=f"which of our models: {', '.join(OURS)}, or minrnn-CELL (default: %(default)s)",
    )
    text = (
        "of autocast in training, of weights and activations in decoding; "
        "auto: the faster here (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help=text)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile for all models, warmed up outside the clock"
    )


def resolve_model(arguments: argparse.Namespace, settings: Settings) -> None:
    """Parse the options of `add_model_arguments`, in place."""
    text = str(arguments.params)
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1)
    try:
        arguments.params = round(float(text.rstrip("kMG")) * factor)
    except ValueError:
        settings.errors.append(("--params", f"{text!r} is not a number such as 10.7M or 350000000"))
        arguments.params = 1
    settings.at_least("--params", arguments.params, 1)
    settings.at_least("--layers", arguments.layers, 1)
    arguments.cells = settings.choices("--cells", arguments.cells, OURS, OTHER_OURS)
    if not settings.errors:
        for family in arguments.cells:
            try:
                find_size(family, arguments.params, arguments.layers)
            except Unavailable as error:
                settings.errors.append(("--params", f"{error}; change --params or --layers"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step (default: %(default)s)")
    parser.add_argument(
        "--lengths", default="512,4096,16384,65536", help="lengths of a row, or none (default: %(default)s)"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=4096,
        help=f"tokens that {CHUNKED} and --stream read at once (default: %(default)s)",
    )
    parser.add_argument(
        "--stream",
        type=int,
        default=0,
        help="tokens of one document that ours trains on; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--loop",
        type=int,
        default=0,
        help="steps of the quickstart, alone and in the training loop; 0 for none (default: %(default)s)",
    )


def resolve(arguments: argparse.Namespace, settings: Settings) -> None:
    """Parse the lists in the arguments, in place."""
    resolve_model(arguments, settings)
    arguments.lengths = parse_counts(settings, "--lengths", arguments.lengths)
    for name in ("tokens", "chunk"):
        settings.at_least(f"--{name}", getattr(arguments, name), 1)
    settings.at_least("--stream", arguments.stream, 0)
    settings.at_least("--loop", arguments.loop, 0)


# --- A contender


class TrainingWork:
    """One model that takes training steps; see `worker.Work`.

    A turn takes one step outside the clock (its memory may have been returned in between), then steps for
    about `min_seconds`, and returns the memory that it does not keep.
    """

    def __init__(self, spec: Mapping[str, Any]):
        torch.set_num_threads(spec["threads"])
        keep_freed_memory()
        self.device, self.dtype = torch.device(spec["device"]), DTYPES[spec["dtype"]]
        self.min_seconds = spec["min_seconds"]
        self.batch, self.length, self.chunk = spec["batch"], spec["length"], spec["chunk"]
        self.is_ours = is_ours(spec["family"])
        if self.device.type == "cpu" and not spec.get("rehearsal"):
            # memory that libraries allocate once (compilers, thread pools) is not counted
            TrainingWork({**spec, "rehearsal": True, "batch": 1, "length": min(64, self.length)}).step()
        release_memory(self.device)
        self.memory_before = current_memory(self.device)
        torch.manual_seed(spec["seed"])
        options = Options(spec["layers"], compiled=spec["compile"])
        self.model, size, count = build(spec["family"], spec["params"], options, self.device)
        self.run_model: Any = torch.compile(self.model) if spec["compile"] else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
        tokens = torch.randint(
            256, (self.batch, self.length + 1), generator=torch.Generator().manual_seed(spec["seed"])
        ).to(self.device)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.state: MinRNNCache | None = None
        self.info = {
            "parameters": count,
            "width": size[0],
            "fine": size[1],
            "kernels": kernel_names(spec["family"], spec["compile"]),
            "limits": limits(self.model),
        }

    def step(self) -> None:
        """Take one step: forward and backward over the row, perhaps in chunks, then the update."""
        self.optimizer.zero_grad()
        for start in range(0, self.length, self.chunk):
            piece = slice(start, start + self.chunk)
            self._loss(self.inputs[:, piece], self.targets[:, piece]).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Nats per token of the whole step."""
        num_items = self.batch * self.length
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if not self.is_ours:
                return next_token_loss(compute_logits(self.run_model, inputs), targets, num_items)
            options = {"past_key_values": self.state, "use_cache": True, "skip_logits": True}
            output = self.run_model(
                input_ids=inputs, shift_labels=targets, num_items_in_batch=num_items, **options
            )
        self.state = output.past_key_values.detach_()
        return output.loss

    def turn(self) -> dict[str, float]:
        """Measure the seconds per step and the peak memory above that before the model was built."""
        others = 0
        if self.device.type == "cuda":
            others = current_memory(self.device) - self.memory_before - self.resident_bytes()
        reset_peak_memory(self.device)
        step = without_preparation(self.step)
        seconds = Stopwatch(step, self.device, self.min_seconds)()["seconds"]
        peak = peak_memory(self.device) - self.memory_before - others
        self.optimizer.zero_grad()
        release_memory(self.device)
        return {"seconds": seconds, "peak_bytes": peak}

    def resident_bytes(self) -> int:
        """Bytes of weights, gradients, moments, data and state, which stay between turns."""
        parameters = list(self.model.parameters())
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        layers = [] if self.state is None else self.state.layers
        carried = [tensor for layer in layers for tensor in (layer.recurrent, layer.conv)]
        return tensor_bytes(
            [*parameters, *(p.grad for p in parameters), *moments, *carried, self.inputs, self.targets]
        )


class StreamWork(TrainingWork):
    """Ours on one document: a turn is `steps_per_turn` steps of one chunk, each from the state of the
    previous one.
    """

    def __init__(self, spec: Mapping[str, Any]):
        super().__init__({**spec, "batch": 1, "length": spec["chunk"]})
        self.steps_per_turn = spec["steps_per_turn"]
        self.generator = torch.Generator().manual_seed(spec["seed"])

    def turn(self) -> dict[str, float]:
        """Measure the seconds per step, page faults included; a growing peak would show a leak."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.steps_per_turn):
            tokens = torch.randint(256, (1, self.length + 1), generator=self.generator).to(self.device)
            self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            self.step()
        synchronize(self.device)
        seconds = (time.perf_counter() - start) / self.steps_per_turn
        return {"seconds": seconds, "peak_bytes": peak_memory(self.device) - self.memory_before}


def build_work(spec: Mapping[str, Any]) -> TrainingWork:
    """Build the contender of a spec."""
    return StreamWork(spec) if spec.get("steps_per_turn") else TrainingWork(spec)


# --- The bench


def run(arguments: argparse.Namespace, record: Record) -> None:
    """Measure every length, then the stream, then the loop."""
    device = torch.device(arguments.device)
    for length in arguments.lengths:
        rows, ceilings = measure_length(length, arguments, device)
        record.data["ceilings"][f"length {length}"] = ceilings
        record.add(rows)
        batch = max(1, arguments.tokens // length)
        setting = f"{arguments.params:,} parameters, {arguments.dtype} on {device.type}"
        print(_table(rows, f"training, {batch} x {length:,} tokens a step, {setting}"))
    if arguments.stream:
        for family in arguments.cells:
            rows = measure_stream(family, arguments)
            record.add(rows)
            document = f"one document of {arguments.stream:,} tokens"
            print(_table(rows, f"training on {document}, {arguments.chunk:,} at once"))
    if arguments.loop:
        from .loop import measure_loop  # imports the training code, which the other sections do not need

        rows = measure_loop(arguments)
        record.add(rows)
        title = f"the quickstart's step, alone and in the training loop, {arguments.loop} at a time"
        print(table(rows, LOOP_COLUMNS, title))


def _spec(family: str, arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    names = ("params", "layers", "dtype", "device", "threads", "seed", "min_seconds", "compile")
    return {"module": "train", "family": family, **{name: getattr(arguments, name) for name in names}, **more}


def measure_length(
    length: int, arguments: argparse.Namespace, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of all contenders at one length, and the ceilings of the same rotation."""
    batch = max(1, arguments.tokens // length)
    families = [*arguments.cells, *arguments.peers]
    specs = {
        family: _spec(family, arguments, batch=batch, length=length, chunk=length) for family in families
    }
    if length > arguments.chunk and "minrnn" in families:
        specs[CHUNKED] = _spec("minrnn", arguments, batch=batch, length=length, chunk=arguments.chunk)
    ceilings = default_ceilings(device, DTYPES[arguments.dtype], tiny=batch * length <= 1024)
    clocks = {
        name: Stopwatch(without_preparation(ceiling.function), device, arguments.min_seconds)
        for name, ceiling in ceilings.items()
    }
    with tqdm(
        total=arguments.rounds * (len(specs) + len(clocks)), desc=f"train, length {length}", leave=False
    ) as bar:
        timings, infos = run_contest(
            specs, arguments.rounds, arguments.limit, device.type == "cpu", clocks, bar
        )
    measured = ceiling_rows(timings, ceilings)
    matmul = measured["matmul"].get("rate")
    rows: list[dict[str, Any]] = []
    for name in specs:
        row = {
            "section": "train",
            "contender": name,
            "length": length,
            "batch": batch,
            **infos.get(name, {}),
            **timings[name].row(),
        }
        if timings[name].seconds:
            rate = batch * length / timings[name].median
            row["tokens_per_second"] = rate
            row["matmul_fraction"] = (
                rate * training_flops_per_token(row["parameters"]) / matmul if matmul else None
            )
        rows.append(row)
    first = next((row.get("tokens_per_second") for row in rows if is_ours(row["contender"])), None)
    for row in rows:
        if first and "tokens_per_second" in row:
            row["of_ours"] = row["tokens_per_second"] / first
    return rows, measured


def measure_stream(family: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row: ours on the whole document."""
    num_steps = -(-arguments.stream // arguments.chunk)
    num_turns = min(20, num_steps)
    spec = _spec(family, arguments, chunk=arguments.chunk, steps_per_turn=-(-num_steps // num_turns))
    with tqdm(total=num_turns, desc=f"train, one document of {arguments.stream}", leave=False) as bar:
        timings, infos = run_contest(
            {family: spec}, num_turns, float("inf"), arguments.device == "cpu", {}, bar
        )
    timing = timings[family]
    num_read = num_turns * spec["steps_per_turn"] * arguments.chunk
    row = {
        "section": "stream",
        "contender": family,
        "document": arguments.stream,
        "chunk": arguments.chunk,
        **infos.get(family, {}),
        **timing.row(),
    }
    if timing.seconds:
        row |= {
            "tokens_read": num_read,
            "tokens_per_second": len(timing.seconds) * arguments.chunk / sum(timing.seconds),
        }
    return [row]


def _table(rows: list[dict[str, Any]], title: str) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: row["contender"],
        "parameters": lambda row: f"{row['parameters']:,}",
        "s/step": lambda row: f"{row['median_seconds']:.3g}",
        "tokens/s": lambda row: si(row["tokens_per_second"]),
        "of ours": lambda row: f"{row['of_ours']:.2f}" if "of_ours" in row else "",
        "of matmul": lambda row: f"{row['matmul_fraction']:.3f}" if row.get("matmul_fraction") else "",
        "peak memory": lambda row: si(row["peak_bytes"], "B"),
    }
    return table(rows, columns, title)


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draw tokens per second and memory by length, one line per contender."""
    left, right = figure.subplots(1, 2)
    rows = [row for row in rows if row["section"] == "train"]
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted(
            (row["length"], row["tokens_per_second"], row["peak_bytes"])
            for row in rows
            if row["contender"] == name
        )
        lengths, rates, peaks = zip(*points, strict=True)
        title = FAMILIES[name].title if name in FAMILIES else "minGRU (ours), in chunks"
        left.loglog(lengths, rates, marker="o", label=title)
        right.loglog(lengths, [peak / 1e9 for peak in peaks], marker="o", label=title)
    left.set_ylabel("tokens/s")
    right.set_ylabel("peak memory (GB)")
    for axes in (left, right):
        axes.set_xlabel("length (tokens)")
    if rows:
        left.legend(fontsize=7)
