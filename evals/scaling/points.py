"""The points of a fit: (family, parameters, tokens, loss) of each run, from a CSV, from runs or from a sweep.

A CSV has the columns family, parameters, tokens and loss, and may have flops (of training) and run (rows with
the same value are resampled together). A folder is a run, a sweep, or holds them.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from ...common.errors import UserError
from ...common.names import did_you_mean, nearest_names

Count = Literal["all", "without_embeddings", "blocks_and_head"]
COUNTS: tuple[Count, ...] = ("all", "without_embeddings", "blocks_and_head")
REQUIRED, OPTIONAL = ("family", "parameters", "tokens", "loss"), ("flops", "run")
LOSS = "loss"
PLAN = "sweep.json"  # in a sweep's folder
MAX_ERRORS = 10  # broken rows that are listed
# Two runs with different values of these do not have comparable losses.
SAME_DATA = (
    *("data.corpus", "data.task", "data.subset", "data.split", "data.revision", "data.text_field"),
    *("data.template", "data.filter", "data.join", "data.order", "data.tokenizer", "data.hold_out"),
    *("data.validation", "data.validation_subset", "data.validation_split", "data.validation_revision"),
    *("data.validation_fraction", "data.validation_tokens"),
)


@dataclass(frozen=True)
class Point:
    """One run at its end."""

    family: str
    parameters: float
    tokens: float
    loss: float
    """NaN if it diverged."""
    run: str
    """Points of the same run are resampled together."""
    flops: float | None = None
    """Of training; None if not known."""
    data: dict[str, Any] = field(default_factory=dict, compare=False)
    """The settings in SAME_DATA; empty for a row of a CSV."""


@dataclass(frozen=True)
class Points:
    """The points of one family, as arrays [P]."""

    family: str
    parameters: NDArray[np.float64]
    tokens: NDArray[np.float64]
    losses: NDArray[np.float64]
    flops: NDArray[np.float64] | None
    runs: list[str]

    @property
    def compute(self) -> NDArray[np.float64]:
        """FLOPs of training: as counted, else 6 N D."""
        return 6 * self.parameters * self.tokens if self.flops is None else self.flops

    def without(self, left_out: NDArray[np.bool_]) -> "Points":
        """The points that are not left out."""
        keep = ~left_out
        flops = None if self.flops is None else self.flops[keep]
        runs = [run for run, is_kept in zip(self.runs, keep, strict=True) if is_kept]
        return Points(self.family, self.parameters[keep], self.tokens[keep], self.losses[keep], flops, runs)


@dataclass(frozen=True)
class PointSet:
    """All that a path holds."""

    families: list[Points]
    unit: str
    """Of the losses; LOSS for those of a CSV, which does not say."""
    notes: list[str]
    """What was left out."""


def read_points(path: Path, count: Count, leave_out_failed: bool) -> PointSet:
    """The points of a CSV file or of a folder.

    Args:
        count: which parameters of a run are counted; a CSV has its own numbers.
        leave_out_failed: leave out runs that diverged or failed.

    Raises:
        UserError: the path holds no points, rows are broken, runs diverged or failed, or runs differ in
            corpus or tokenizer.
    """
    if path.is_dir():
        points, unit, notes = _of_folder(path, count, leave_out_failed)
    else:
        points, unit, notes = _of_csv(path), LOSS, []
    diverged = [point for point in points if not math.isfinite(point.loss)]
    if diverged and not leave_out_failed:
        names = ", ".join(point.run for point in diverged)
        message = (
            f"{len(diverged)} of {len(points)} runs diverged: {names}; --leave-out-failed fits the others"
        )
        raise UserError(str(path), message)
    if diverged:
        notes.append(f"{len(diverged)} diverged: {', '.join(point.run for point in diverged)}")
    points = [point for point in points if math.isfinite(point.loss)]
    if not points:
        raise UserError(str(path), "holds no finished runs" if path.is_dir() else "holds no points")
    _check_same_data(path, points)
    names = dict.fromkeys(point.family for point in points)
    return PointSet([_gathered(name, points) for name in names], unit, notes)


def _gathered(family: str, points: list[Point]) -> Points:
    own = [point for point in points if point.family == family]
    flops = [point.flops for point in own if point.flops is not None]
    return Points(
        family,
        *(
            np.array([getattr(point, name) for point in own], float)
            for name in ("parameters", "tokens", "loss")
        ),
        flops=np.array(flops, float) if len(flops) == len(own) else None,
        runs=[point.run for point in own],
    )


def _check_same_data(path: Path, points: list[Point]) -> None:
    """Refuse runs whose losses are not of the same text and tokens."""
    errors = []
    for key in SAME_DATA:
        values = dict.fromkeys(json.dumps(point.data[key]) for point in points if key in point.data)
        if len(values) > 1:
            errors.append((key, f"differs between the runs in {path}: {', '.join(values)}; fit them apart"))
    if errors:
        raise UserError.from_list(errors)


# --- CSV


def _of_csv(path: Path) -> list[Point]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(str(path), f"is no CSV file: {error}") from None
    header = [name.strip() for name in rows[0]] if rows else []
    if missing := [name for name in REQUIRED if name not in header]:
        similar = did_you_mean(
            nearest_names(missing[0], header), "its first line must name the columns, separated by commas"
        )
        message = f"has no column {', '.join(missing)} ({similar})"
        raise UserError(str(path), message)
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(str(path), f"names a column twice: {', '.join(repeated)}")
    points, errors = [], []
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        point = _of_row(header, [cell.strip() for cell in row], number)
        (errors if isinstance(point, str) else points).append(point)
    if errors:
        more = [f"{len(errors) - MAX_ERRORS} more"] if len(errors) > MAX_ERRORS else []
        raise UserError(str(path), "; ".join([*errors[:MAX_ERRORS], *more]))
    return points


def _of_row(header: list[str], row: list[str], number: int) -> Point | str:
    """A point, or what is wrong with the row."""
    if len(row) != len(header):
        return f"line {number} has {len(row)} values for {len(header)} columns"
    cells = dict(zip(header, row, strict=True))
    values: dict[str, float | None] = {}
    for name in ("parameters", "tokens", "loss", "flops"):
        text = cells.get(name, "")
        if name == "flops" and not text:
            values[name] = None
            continue
        try:
            values[name] = float(text)
        except ValueError:
            return f"line {number}: {name} is {text!r}, not a number"
        value = float(text)
        has_diverged = name == "loss" and not math.isfinite(value)
        if not has_diverged and not 0 < value < math.inf:
            return f"line {number}: {name} is {text}, not a positive number"
    if not cells["family"]:
        return f"line {number} names no family"
    run = cells.get("run") or f"line {number}"
    return Point(cells["family"], run=run, **values)  # pyright: ignore[reportArgumentType]


# --- Runs and sweeps


def _of_folder(path: Path, count: Count, leave_out_failed: bool) -> tuple[list[Point], str, list[str]]:
    points: list[Point] = []
    units, unfinished, failed = set(), [], []
    for folder, entry in _runs_in(path):
        if (folder.parent.parent / "failed" / f"{folder.name}.json").exists():
            failed.append(folder.name)
            continue
        end = last_validation(folder)
        if end is None:
            unfinished.append(folder.name)
            continue
        point, unit = _of_run(folder, entry, end, count)
        points.append(point)
        units.add(unit)
    if not points and not unfinished and not failed:
        raise UserError(str(path), "holds no runs (folders with config.yaml and metrics.jsonl) and no sweep")
    if failed and not leave_out_failed:
        message = f"{len(failed)} runs failed: {', '.join(failed)}; --leave-out-failed fits the others"
        raise UserError(str(path), message)
    if len(units) > 1:
        raise UserError(str(path), f"runs report {' and '.join(sorted(units))}; fit them apart")
    notes = [f"{len(failed)} failed: {', '.join(failed)}"] if failed else []
    notes += [f"{len(unfinished)} not finished: {', '.join(unfinished)}"] if unfinished else []
    return points, units.pop() if units else "", notes


def _runs_in(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each run at or below a path, sorted, with its entry in the sweep's plan; {} outside of a sweep."""
    if (path / "config.yaml").exists():
        yield path, {}
        return
    plan = path / PLAN
    if plan.exists():
        for entry in json.loads(plan.read_text())["runs"]:
            yield path / "runs" / entry["name"], entry
        return
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith("."):
            yield from _runs_in(folder)


def last_validation(folder: Path) -> dict[str, Any] | None:
    """The validation after a run's last step; None if it is not finished."""
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not config.exists() or not metrics.exists() or not (folder / ".finished").exists():
        return None
    steps = yaml.safe_load(config.read_text())["train"]["steps"]
    end = None
    for line in metrics.read_text().splitlines():
        if '"validation"' in line:
            entry = json.loads(line)
            end = entry if entry["kind"] == "validation" and entry["step"] == steps else end
    return end


def held_out_loss(folder: Path) -> float | None:
    """The loss of a run's last validation: bits per byte where they are known, else nats per token. Infinite
    if it is not finite; None if the run is not finished."""
    end = last_validation(folder)
    if end is None:
        return None
    loss = end.get("bits_per_byte", end["loss"])
    return loss if math.isfinite(loss) else math.inf


def _of_run(folder: Path, entry: dict[str, Any], end: dict[str, Any], count: Count) -> tuple[Point, str]:
    """The point of a finished run, and the unit of its loss."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    is_known = entry and entry.get("trial") is None  # a plan has no sizes of settings that a search draws
    size = entry if is_known else _size(folder)
    data = {key: config["data"].get(key.removeprefix("data.")) for key in SAME_DATA}
    in_bits = "bits_per_byte" in end
    point = Point(
        family=entry.get("family") or _family_of(config["model"]),
        parameters=size["parameters"][count],
        tokens=end["tokens"],
        loss=end["bits_per_byte"] if in_bits else end["loss"],
        run=entry.get("trunk") or folder.name,  # branches of one stable run have common noise
        flops=size["flops_per_token"] * end["tokens"],
        data=data,
    )
    return point, "bits per byte" if in_bits else "nats per token"


def _family_of(model: dict[str, Any]) -> str:
    """The name of a run's model in a fit: its family; of minrnn its cell, attention, and its preset if not
    default."""
    family = model.get("family", "minrnn")
    if family != "minrnn":
        return family
    attention = " + attention" if model.get("attention_every") else ""
    return model["cell"] + attention + ("" if model["preset"] == "default" else f" ({model['preset']})")


def _size(folder: Path) -> dict[str, Any]:
    """Parameters and FLOPs of a run's model."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    vocab_size = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    settings = {
        "model": config["model"],
        "data": config["data"],
        "batch": {"chunk": config["batch"]["chunk"]},
    }
    return _model_size(json.dumps(settings), vocab_size)


@cache
def _model_size(settings: str, vocab_size: int) -> dict[str, Any]:
    """As `flops.model_size`, once for each model."""
    from ...pipeline.flops import model_size
    from ...pipeline.recipe import build_recipe

    return model_size(build_recipe(json.loads(settings)), vocab_size).to_json()
