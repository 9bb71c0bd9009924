"""Accuracy by distance on a synthetic task whose answers lie many tokens back (docs/synthetic.md).

    validation documents of the task, in pieces -> one copy for each cut: carried, and reset every N positions
      -> correct answers by distance, in powers of two

All cuts are rows of one pass. With bands, further passes reset only the channels of a band (bands.py).
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from tqdm import tqdm

from ...common.errors import UserError
from ...data import IGNORE_INDEX, Chunk, Task, TaskValidation, build_task
from ...data.synthetic.distance import NUM_DISTANCES, sums_by_distance
from ...models import MinRNNCache, MinRNNForCausalLM
from ...models.dtypes import at_least_fp32
from ..output import run_folder, table
from .bands import band_name, bands_of, memory_lengths, require_channels, reset_channels
from .positions import cut_starts

LANES = 16  # documents that are read together
Counts = np.ndarray
"""Answers, correct answers and nats by power of two of the distance: fp64 [rows, NUM_DISTANCES, 3]."""


def stream_task(arguments: argparse.Namespace) -> Task:
    """The task that `--corpus` and `--task` name. Options that `--task` lacks are those of MODEL's run, if it
    was trained on this task.

    Raises:
        UserError: there is no such task, its options are invalid, or its answers have no distances.
    """
    options = _run_options(arguments)
    if arguments.task is not None:
        try:
            given = yaml.safe_load(arguments.task)
        except yaml.YAMLError as error:
            raise UserError("--task", f"is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(given, dict):
            raise UserError("--task", f"must be options such as {{max_distance: 100000}}, not {given!r}")
        options |= given
    try:
        task = build_task(arguments.corpus, options)
    except UserError as error:
        raise error.with_keys({"data.corpus": "--corpus", "data.task": "--task"}) from None
    if not isinstance(task, Task) or not task.is_stream:
        message = f"{arguments.corpus} has no documents longer than a chunk; "
        raise UserError("--corpus", message + "those of synthetic/distant-key and distant-register are")
    return task


def _run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    run = run_folder(arguments.model)
    data = (yaml.safe_load((run / "config.yaml").read_text()) or {}).get("data", {}) if run else {}
    return dict(data.get("task") or {}) if data.get("corpus") == arguments.corpus else {}


def _documents(task: Task, rows_of_each: int, piece: int) -> Iterator[tuple[Chunk, int]]:
    """Pieces of the validation documents, each with its first position in the document; 0 begins others.

    Args:
        rows_of_each: copies of a document that are read at once.
        piece: tokens per forward pass, over all rows.
    """
    lanes = max(1, min(LANES, piece // rows_of_each))
    time = max(1, piece // (lanes * rows_of_each))
    first = 0
    for _, chunk in TaskValidation(task, 0, 1, lanes, piece=time).chunks():
        first = 0 if chunk.document_starts.any() else first
        yield chunk, first
        first += time


def count_answers(logits: torch.Tensor, chunk: Chunk) -> Counts:
    """Count the answers of a chunk.

    Args:
        logits: of its answers in each copy, [copies, answers, vocab_size].
    """
    scored = chunk.shift_labels != IGNORE_INDEX
    assert chunk.distances is not None
    distances = chunk.distances[scored]
    answers = torch.as_tensor(chunk.shift_labels[scored], device=logits.device)
    is_correct = (logits.argmax(-1) == answers).cpu().numpy()
    logits = at_least_fp32(logits)
    nats = F.cross_entropy(logits.flatten(0, 1), answers.repeat(len(logits)), reduction="none").view_as(
        logits[..., 0]
    )
    pairs = zip(is_correct, nats.cpu().numpy(), strict=True)
    return np.stack([sums_by_distance(distances, None, correct, loss) for correct, loss in pairs])


@torch.no_grad()
def read_task(
    model: MinRNNForCausalLM,
    task: Task,
    num_copies: int,
    piece: int,
    starts: Callable[[int, int], np.ndarray] | None = None,
    at_position: Callable[[MinRNNCache, int, int], None] | None = None,
    every: int | None = None,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Counts:
    """Read the validation documents of a task, each in several copies.

    Args:
        model: in eval mode.
        starts: where the state of each copy is reset between two positions, bool [copies, positions].
        at_position: called with the state, the position and the documents, before every `every`-th position
            of the documents but the first.
        piece: tokens per forward pass, over all rows.
    """
    counts = np.zeros((num_copies, NUM_DISTANCES, 3))
    cache = None
    for chunk, first in _documents(task, num_copies, piece):
        num_rows, time = chunk.input_ids.shape
        if first == 0:
            cache = MinRNNCache(model.config.num_hidden_layers)
        assert cache is not None
        edges = [0, *(i for i in range(1, time) if every and (first + i) % every == 0), time]
        for begin, end in itertools.pairwise(edges):
            if every and at_position and first + begin and (first + begin) % every == 0:
                at_position(cache, first + begin, num_rows)
            part = chunk.columns(lambda array, begin=begin, end=end: array[:, begin:end], 1)
            own = np.repeat(part.document_starts[None], num_copies, 0)  # [copies, rows, time]
            if starts is not None:
                own |= starts(first + begin, first + end)[:, None]
            scored = part.shift_labels != IGNORE_INDEX
            columns = np.flatnonzero(scored.any(0))
            output = model(
                input_ids=torch.as_tensor(np.tile(part.input_ids, (num_copies, 1)), device=model.device),
                document_starts=torch.as_tensor(own.reshape(-1, end - begin), device=model.device)
                if own.any()
                else None,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.as_tensor(columns, device=model.device),
            )
            if len(columns):
                logits = output.logits.unflatten(0, (num_copies, num_rows))
                is_answer = torch.as_tensor(scored[:, columns], device=model.device)
                counts += count_answers(logits[:, is_answer], part)
        on_progress(chunk.num_tokens * num_copies)
    return counts


def _summary(counts: np.ndarray) -> dict[str, float]:
    answers, correct, nats = counts.tolist()
    return {"accuracy": correct / answers, "nats": nats / answers}


def distance_rows(counts: Counts, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each power of two that has answers, then one for all: {"from", "to", "answers", "accuracy":
    {name: number}, "nats": {name: number}}.

    Args:
        names: of the copies.
    """
    rows: list[dict[str, Any]] = [
        {"from": 2**power, "to": 2 ** (power + 1), "counts": counts[:, power]}
        for power in np.flatnonzero(counts[0, :, 0]).tolist()
    ]
    rows.append({"from": rows[0]["from"], "to": rows[-1]["to"], "counts": counts.sum(1)})
    for row in rows:
        each = [_summary(own) for own in row["counts"]]
        row["answers"] = int(row.pop("counts")[0, 0])
        for kind in ("accuracy", "nats"):
            row[kind] = {name: own[kind] for name, own in zip(names, each, strict=True)}
    return rows


def measure_task(
    model: MinRNNForCausalLM, task: Task, cuts: Sequence[int], edges: Sequence[int], piece: int
) -> dict[str, Any]:
    """Accuracy by distance with the state carried and cut, and with each band reset at every cut.

    Args:
        cuts: positions after which the state is reset.
        edges: of the bands, in tokens; none leaves the bands out.
    """
    rows: list[int | None] = [None, *cuts]
    names = ["carried", *map(str, cuts)]
    with tqdm(desc="carried and cut", unit="tok", unit_scale=True) as bar:
        counts = read_task(
            model,
            task,
            len(rows),
            piece,
            starts=lambda first, last: cut_starts(first, last, rows),
            on_progress=bar.update,
        )
    result: dict[str, Any] = {"chance": task.chance, "distance": distance_rows(counts, names)}
    if edges:
        result["bands"] = _measure_bands(model, task, cuts, edges, piece)
    return result


def _measure_bands(
    model: MinRNNForCausalLM, task: Task, cuts: Sequence[int], edges: Sequence[int], piece: int
) -> list[dict[str, Any]]:
    require_channels(model)
    example = task.example(np.random.default_rng(0), task.max_train_length)[0]
    bands, masks = bands_of(memory_lengths(model, example), edges)
    masks = masks.to(model.device)

    def reset(cache: MinRNNCache, position: int, num_rows: int) -> None:
        reset_channels(model, cache, masks.repeat_interleave(num_rows, 0))

    rows = []
    for cut in cuts:
        with tqdm(desc=f"bands, cut every {cut:,}", unit="tok", unit_scale=True) as bar:
            counts = read_task(
                model, task, len(bands), piece, at_position=reset, every=cut, on_progress=bar.update
            )
        for band, own in zip(bands, counts.sum(1), strict=True):
            rows.append({"cut": cut, **band, **_summary(own)})
    return rows


def task_tables(result: dict[str, Any]) -> str:
    """The results of `measure_task` as text."""
    names = list(result["distance"][0]["accuracy"])
    columns: dict[str, Any] = {
        "distance": lambda row: f"{row['from']:,} to {row['to'] - 1:,}",
        "answers": lambda row: f"{row['answers']:,}",
    }
    for name in names:
        title = name if name == "carried" else f"cut {int(name):,}"
        columns[title] = lambda row, name=name: f"{100 * row['accuracy'][name]:.1f}"
    title = f"accuracy (%) by distance of the answer; chance {100 * result['chance']:.1f}; last row: all"
    text = table(result["distance"], columns, title)
    if "bands" in result:
        band_columns: dict[str, Any] = {
            "memory length": band_name,
            "cut": lambda row: f"{row['cut']:,}",
            "channels": lambda row: f"{row['channels']:,}",
            "accuracy": lambda row: f"{100 * row['accuracy']:.1f}",
            "nats": lambda row: f"{row['nats']:.4f}",
        }
        text += "\n" + table(result["bands"], band_columns, "channels of a band reset at every cut")
    return text


def draw_task(result: dict[str, Any], title: str, path: Path) -> None:
    """Draw the accuracy by distance, a curve for each cut."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ...pipeline.pictures import save_figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = result["distance"][:-1]
    distances = [(row["from"] * row["to"]) ** 0.5 for row in rows]
    for name in rows[0]["accuracy"]:
        label = "state carried" if name == "carried" else f"cut every {int(name):,}"
        axes.plot(distances, [100 * row["accuracy"][name] for row in rows], marker="o", label=label)
    axes.axhline(100 * result["chance"], color="tab:gray", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="distance of the answer (tokens)", ylabel="accuracy (%)", title=title, ylim=(-3, 103))
    axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    save_figure(figure, path)


def task_summary(corpus: str, task: Task) -> dict[str, Any]:
    """The task for the results: its name and all options."""
    return {"name": corpus, **dataclasses.asdict(task)}


def check_vocabulary(corpus: str, task: Task, tokenizer: Any) -> None:
    """Refuse a model whose tokens are not those of the task.

    Raises:
        UserError: as said.
    """
    if tokenizer.get_vocab() != task.tokenizer().get_vocab():
        message = f"was not trained on {corpus} with these options: its tokens are others"
        raise UserError("MODEL", f"{message}; --task sets num_values and num_noise")
