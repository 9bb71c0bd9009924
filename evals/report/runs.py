"""Makes a results file from run folders: `minrnn results RUN [RUN ...] --as NAME --out
evals/results/NAME.json`.

    config.yaml, metrics.jsonl of each run -> one `Seed` each
      -> runs that differ only in run.seed: one `Entry`
      -> `Results`, a JSON file

A run may be finished, stopped or in progress: the file holds what its metrics contain, and how many of its
steps that is.
"""

import argparse
import json
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open

from ...common.errors import UserError, one_line_message
from ...common.files import user_path, write_json
from ...common.names import did_you_mean, nearest_names
from ...common.output import warn
from ...data import is_labelled
from ...pipeline.config import SECTIONS
from ...pipeline.metrics import read_metrics
from ...pipeline.public import public_config
from ..record import commit, machine, versions
from .published import published

CURVE_POINTS = 100
KEPT_SECTIONS = ("model", "data", "batch", "optim", "train")
# Settings that change how a run is executed and reported, not what it computes.
IGNORED_SETTINGS = {
    "data.cache",
    "data.workers",
    "model.limits",
    "train.keep_checkpoints",
    "train.log_every",
    "train.peer_timeout",
    "train.prompts",
    "train.sample_tokens",
    "train.save_every",
    "train.save_in_background",
}


class Validation(BaseModel):
    """A validation line of metrics.jsonl: bits_per_byte for text, the remaining fields for tasks."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float | None = None
    accuracy: float | None = None
    accuracy_scaled: float | None = None
    chance: float | None = None
    by_length: dict[str, float] | None = None
    examples: int | None = None


class Curve(BaseModel):
    """Curves of at most CURVE_POINTS points each."""

    train: list[tuple[int, float]] = Field(min_length=1)
    """(step, mean training loss in nats since the previous point)"""
    validation: list[tuple[int, float, float | None]]
    """(step, validation loss in nats, accuracy of a task)"""


class Seed(BaseModel):
    """One run."""

    run: str
    """Name of the run's folder."""
    seed: int
    steps: int
    steps_asked: int
    tokens: int
    parameters: int | None
    """None if there is no checkpoint to read it from."""
    training_seconds: float | None
    """Including validations, without start-up; None if the lines lack times."""
    not_finite: int
    """Number of lines with a loss that is not finite; other fields ignore these lines."""
    best: Validation | None
    """The validation with the lowest loss."""
    final: Validation | None
    has_test: bool = False
    """The corpus has a test split, which is scored after the last step."""
    test: Validation | None = None
    """The score of the test split, after the last step; None if the corpus has none."""
    curve: Curve


class Entry(BaseModel):
    """Runs that differ only in run.seed."""

    config: dict[str, dict[str, Any]]
    """The sections KEPT_SECTIONS of the resolved recipe."""
    seeds: list[Seed]


class Results(BaseModel):
    """A results file."""

    kind: Literal["runs"] = "runs"
    experiment: str
    """A key of published.yaml, or any other name."""
    command: str
    commit: str | None
    time: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    entries: list[Entry]


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run."""
    return (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file()


def training_seconds(train: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]]) -> float | None:
    """Duration of steps and validations, from their lines; None if a line lacks its time."""
    if not all(line.get("tokens_per_second") for line in train) or not all(
        "seconds" in line for line in validations
    ):
        return None
    before = [0, *(line["tokens"] for line in train[:-1])]
    steps = sum(
        (line["tokens"] - tokens) / line["tokens_per_second"]
        for line, tokens in zip(train, before, strict=True)
    )
    return steps + sum(line["seconds"] for line in validations)


def num_parameters(run: Path) -> int | None:
    """Read from the newest weights of the run; None if there are none (a running run may be removing
    them).
    """
    checkpoints = sorted(run.glob("checkpoints/step-*/model.safetensors"))[-1:]
    weights = checkpoints or list(run.glob("model/model.safetensors"))
    if not weights:
        return None
    try:
        with safe_open(str(weights[0]), "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return None


def _thin_out(lines: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) at no more than CURVE_POINTS steps; each loss is the mean since the previous point."""
    size = max(1, math.ceil(len(lines) / CURVE_POINTS))
    groups = [lines[i : i + size] for i in range(0, len(lines), size)]
    return [
        (group[-1]["step"], round(sum(line["loss"] for line in group) / len(group), 5)) for group in groups
    ]


def _sample_evenly(validations: Sequence[Validation]) -> list[tuple[int, float, float | None]]:
    """At most CURVE_POINTS validations, including the first and the last."""
    count = min(len(validations), CURVE_POINTS)
    picked = [validations[round(i * (len(validations) - 1) / max(count - 1, 1))] for i in range(count)]
    return [(line.step, round(line.loss, 5), line.accuracy) for line in picked]


def _read_config(run: Path) -> tuple[dict[str, dict[str, Any]], int, int]:
    """The kept sections of a run's config.yaml, its seed and its number of steps.

    Raises:
        UserError: the file is not one that a run writes.
    """
    try:
        values = yaml.safe_load((run / "config.yaml").read_text())
        config = {name: public_config(values[name]) for name in KEPT_SECTIONS}
        seed, steps = values["run"]["seed"], values["train"]["steps"]
        for key in ("data.corpus", "batch.readers", "batch.lanes"):
            section, name = key.split(".")
            if name not in config[section]:
                raise KeyError(key)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(str(run), f"config.yaml is not what a run writes ({reason})") from None
    return config, seed, steps


def read_run(run: Path) -> tuple[dict[str, dict[str, Any]], Seed]:
    """The settings of a run, and its results so far.

    Raises:
        UserError: the path is not a run's folder, or the run has no step yet.
    """
    if not is_run(run):
        raise UserError(
            str(run), "is no run: config.yaml or metrics.jsonl is missing; name the folder that run.dir said"
        )
    config, seed, steps = _read_config(run)
    try:
        result = _read_seed(run, seed, steps)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        message = f"metrics.jsonl is not what a run writes ({one_line_message(error)})"
        raise UserError(str(run), message) from None
    if result is None:
        raise UserError(
            str(run), "metrics.jsonl holds no step yet; wait for the first, or leave this run out"
        )
    return config, result.model_copy(update={"has_test": is_labelled(config["data"]["corpus"])})


def _read_seed(run: Path, seed: int, steps: int) -> Seed | None:
    """The results in a run's metrics.jsonl; None before its first step."""
    lines = [
        line
        for line in read_metrics(run / "metrics.jsonl")
        if line.get("kind") in ("train", "validation", "test")
    ]
    finite = [
        line for line in lines if isinstance(line.get("loss"), float | int) and math.isfinite(line["loss"])
    ]
    train = [line for line in finite if line["kind"] == "train"]
    validation_lines = [line for line in finite if line["kind"] == "validation"]
    test_lines = [line for line in finite if line["kind"] == "test"]
    validations = [Validation(**line) for line in validation_lines]
    if not train:
        return None
    seconds = training_seconds(train, validation_lines + test_lines)
    return Seed(
        run=run.resolve().name,
        seed=seed,
        steps=train[-1]["step"],
        steps_asked=steps,
        tokens=train[-1]["tokens"],
        parameters=num_parameters(run),
        training_seconds=None if seconds is None else round(seconds, 1),
        not_finite=len(lines) - len(finite),
        best=min(validations, key=lambda line: line.loss, default=None),
        final=validations[-1] if validations else None,
        test=Validation(**test_lines[-1]) if test_lines else None,
        curve=Curve(train=_thin_out(train), validation=_sample_evenly(validations)),
    )


def settings(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"optim.lr": ...}: the settings that are equal in runs that differ only in their seed.

    Settings that are newer than a run have their defaults. Of a task's folder, the name counts.
    """
    flat = {
        f"{section}.{name}": value for section, fields in config.items() for name, value in fields.items()
    }
    for section in config:
        for name, field in SECTIONS[section].model_fields.items():
            flat.setdefault(f"{section}.{name}", field.get_default(call_default_factory=True))
    task = dict(flat.get("data.task") or {})
    if task.get("folder"):
        task["folder"] = Path(task["folder"]).name
    return {key: value for key, value in flat.items() if key not in IGNORED_SETTINGS} | {"data.task": task}


def group_runs(runs: Sequence[Path]) -> list[Entry]:
    """Read runs, and group those that differ only in their seed.

    Raises:
        UserError: every run that cannot be read, or that has the settings and the seed of another run.
    """
    entries: dict[str, Entry] = {}
    errors = []
    for run in runs:
        try:
            config, seed = read_run(run)
        except UserError as error:
            errors += error.errors
            continue
        entry = entries.setdefault(
            json.dumps(settings(config), sort_keys=True), Entry(config=config, seeds=[])
        )
        if same := [other.run for other in entry.seeds if other.seed == seed.seed]:
            errors.append(
                (str(run), f"has the settings and the seed ({seed.seed}) of {same[0]}; leave one of them out")
            )
        entry.seeds.append(seed)
    if errors:
        raise UserError.from_list(errors)
    for entry in entries.values():
        entry.seeds.sort(key=lambda seed: seed.seed)
    return list(entries.values())


def check_corpora(name: str, entries: Sequence[Entry], key: str) -> None:
    """Check that runs listed under a published name have its task.

    Raises:
        UserError: under `key`, each run of another task; or the published experiment takes no runs.
    """
    experiment = published().experiments.get(name)
    if experiment is None:
        return
    if experiment.metric in (None, "lm_eval"):
        reason = "lm-eval's files are read as they are" if experiment.metric else "it is for reference only"
        raise UserError(key, f"{name} takes no runs ({reason}); choose another name")
    wrong = [(entry, entry.config["data"]["corpus"]) for entry in entries if experiment.corpora]
    wrong = [(entry.seeds[0].run, corpus) for entry, corpus in wrong if corpus not in experiment.corpora]
    if wrong:
        corpora = " or ".join(experiment.corpora)
        raise UserError.from_list(
            (
                (key, f"{name} is about {corpora}, but {run} has {corpus}; choose another name")
                for run, corpus in wrong
            )
        )


def collect(runs: Sequence[Path], name: str, command: str) -> Results:
    """Make the content of a results file.

    Raises:
        UserError: runs cannot be read, or do not belong to the experiment.
    """
    entries = group_runs(runs)
    check_corpora(name, entries, "--as")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Results(
        experiment=name,
        command=command,
        commit=commit(),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=machine(device),
        versions=versions(),
        entries=entries,
    )


def main(argv: list[str]) -> None:
    """Run `minrnn results`.

    Raises:
        UserError: runs cannot be read, or do not belong to the named experiment.
    """
    parser = argparse.ArgumentParser(
        "minrnn results",
        description="Make a results file from folders of runs, for minrnn report.",
    )
    parser.add_argument(
        "runs",
        type=user_path,
        nargs="+",
        metavar="RUN",
        help="folders of runs; runs that differ only in run.seed become one entry",
    )
    parser.add_argument(
        "--as",
        dest="name",
        required=True,
        metavar="NAME",
        help=f"one of {', '.join(published().experiments)}; or any other name",
    )
    parser.add_argument("--out", type=user_path, help="JSON file to write (default: evals/results/NAME.json)")
    arguments = parser.parse_args(argv)
    out = arguments.out or Path("evals", "results", f"{arguments.name}.json")
    names = [Path(run).name if run.is_absolute() else str(run) for run in arguments.runs]
    command = shlex.join(["minrnn", "results", *names, "--as", arguments.name])
    if out.suffix != ".json":
        raise UserError("--out", f"{out} must end in .json")
    results = collect(arguments.runs, arguments.name, command)
    if arguments.name not in published().experiments:
        near = nearest_names(arguments.name, published().experiments, cutoff=0.75)
        hint = f" ({did_you_mean(near)})" if near else ""
        warn(f"--as: nothing is published as {arguments.name}{hint}; the report will show it by itself")
    write_json(out, results.model_dump())
    for entry in results.entries:
        steps = ", ".join(
            f"{seed.seed} ({seed.steps:,} of {seed.steps_asked:,} steps)" for seed in entry.seeds
        )
        model = entry.config["model"]
        print(f"{model.get('family') or model.get('cell')}, {entry.config['data']['corpus']}: seeds {steps}")
    print(f"{out} written")
