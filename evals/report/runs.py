"""One results file from run folders: `minrnn results RUN [RUN ...] --as NAME --out evals/results/NAME.json`.

    config.yaml, metrics.jsonl of each run -> a `Seed` each -> runs that differ in run.seed only: one `Entry` -> `Results`, a JSON file

A run may be finished, stopped, or still going: what its metrics hold counts, and the file says how many of its steps that are.
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

from ...common.errors import UserError
from ...common.files import user_path, write_json
from ...common.names import did_you_mean, nearest_names
from ...common.output import warn
from ...pipeline.config import SECTIONS
from ...pipeline.metrics import read_metrics
from ...pipeline.public import public_config
from ..record import commit, machine, versions
from .published import published

CURVE_POINTS = 100
KEPT_SECTIONS = ("model", "data", "batch", "optim", "train")
# Settings that say how a run is run and reported, not what it computes.
WITHOUT_EFFECT = {
    *(
        "data.workers",
        "train.log_every",
        "train.save_every",
        "train.keep_checkpoints",
        "train.save_in_background",
    ),
    *("train.peer_timeout", "train.prompts", "train.sample_tokens"),
}


class Validation(BaseModel):
    """A validation line of metrics.jsonl: of text with bits_per_byte, of a task with the rest."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float | None = None
    accuracy: float | None = None
    accuracy_scaled: float | None = None
    chance: float | None = None
    by_length: dict[str, float] | None = None


class Curve(BaseModel):
    """At most CURVE_POINTS points each."""

    train: list[tuple[int, float]] = Field(min_length=1)
    """(step, mean loss in nats since the point before)"""
    validation: list[tuple[int, float, float | None]]
    """(step, loss in nats, accuracy of a task)"""


class Seed(BaseModel):
    """One run."""

    run: str
    """Name of its folder."""
    seed: int
    steps: int
    steps_asked: int
    tokens: int
    parameters: int | None
    """None where no checkpoint was left."""
    training_seconds: float | None
    """With validations, without the start; None where the lines do not say."""
    not_finite: int
    """Lines whose loss was no number; they count nowhere else."""
    best: Validation | None
    """The validation with the lowest loss."""
    final: Validation | None
    curve: Curve


class Entry(BaseModel):
    """Runs that differ in run.seed only."""

    config: dict[str, dict[str, Any]]
    """The sections KEPT_SECTIONS of the resolved recipe."""
    seeds: list[Seed]


class Results(BaseModel):
    """A results file."""

    kind: Literal["runs"] = "runs"
    experiment: str
    """A key of published.yaml, or a name of one's own."""
    command: str
    commit: str | None
    time: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    entries: list[Entry]


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run."""
    return (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file()


def training_seconds(train: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]]) -> float | None:
    """Of steps and validations, from their lines; None where a line does not say."""
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
    """From the newest weights that the run left, if any can be read (a run that goes on may just be removing them)."""
    found = sorted(run.glob("checkpoints/step-*/model.safetensors"))[-1:] or list(
        run.glob("model/model.safetensors")
    )
    if not found:
        return None
    try:
        with safe_open(str(found[0]), "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError):
        return None


def _thinned(lines: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) at no more than CURVE_POINTS steps; each loss is the mean since the point before."""
    size = max(1, math.ceil(len(lines) / CURVE_POINTS))
    groups = [lines[i : i + size] for i in range(0, len(lines), size)]
    return [
        (group[-1]["step"], round(sum(line["loss"] for line in group) / len(group), 5)) for group in groups
    ]


def _spread(validations: Sequence[Validation]) -> list[tuple[int, float, float | None]]:
    """At most CURVE_POINTS of them, first and last included."""
    count = min(len(validations), CURVE_POINTS)
    picked = [validations[round(i * (len(validations) - 1) / max(count - 1, 1))] for i in range(count)]
    return [(line.step, round(line.loss, 5), line.accuracy) for line in picked]


def read_run(run: Path) -> tuple[dict[str, dict[str, Any]], Seed]:
    """The settings of a run, and what it reached.

    Raises:
        UserError: no folder of a run, or nothing in it yet.
    """
    if not is_run(run):
        raise UserError(
            str(run), "is no run: config.yaml or metrics.jsonl is missing; name the folder that run.dir said"
        )
    try:
        values = yaml.safe_load((run / "config.yaml").read_text())
        config = {name: public_config(values[name]) for name in KEPT_SECTIONS}
        seed, steps_asked = values["run"]["seed"], values["train"]["steps"]
        if missing := [
            key
            for key in ("data.corpus", "batch.readers", "batch.lanes")
            if key.split(".")[1] not in config[key.split(".")[0]]
        ]:
            raise KeyError(missing[0])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        told = (
            f"config.yaml is not what a run writes ({type(error).__name__}: {' '.join(str(error).split())})"
        )
        raise UserError(str(run), told) from None
    try:
        lines = [
            line
            for line in read_metrics(run / "metrics.jsonl")
            if line.get("kind") in ("train", "validation")
        ]
        finite = [
            line
            for line in lines
            if isinstance(line.get("loss"), float | int) and math.isfinite(line["loss"])
        ]
        train = [line for line in finite if line["kind"] == "train"]
        validation_lines = [line for line in finite if line["kind"] == "validation"]
        validations = [Validation(**line) for line in validation_lines]
        reached = (
            _seed(run, seed, steps_asked, lines, train, validation_lines, validations) if train else None
        )
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        told = f"metrics.jsonl is not what a run writes ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise UserError(str(run), told) from None
    if reached is None:
        raise UserError(
            str(run), "metrics.jsonl holds no step yet; wait for the first, or leave this run out"
        )
    return config, reached


def _seed(
    run: Path,
    seed: int,
    steps_asked: int,
    lines: list[dict[str, Any]],
    train: list[dict[str, Any]],
    validation_lines: list[dict[str, Any]],
    validations: list[Validation],
) -> Seed:
    seconds = training_seconds(train, validation_lines)
    return Seed(
        run=run.resolve().name,
        seed=seed,
        steps=train[-1]["step"],
        steps_asked=steps_asked,
        tokens=train[-1]["tokens"],
        parameters=num_parameters(run),
        training_seconds=None if seconds is None else round(seconds, 1),
        not_finite=len(lines) - len(train) - len(validation_lines),
        best=min(validations, key=lambda line: line.loss, default=None),
        final=validations[-1] if validations else None,
        curve=Curve(train=_thinned(train), validation=_spread(validations)),
    )


def settings(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"optim.lr": ...}: what two runs have in common that differ in their seed only. A setting newer than a run has its default."""
    flat = {
        f"{section}.{name}": value for section, fields in config.items() for name, value in fields.items()
    }
    for section in config:
        for name, field in SECTIONS[section].model_fields.items():
            flat.setdefault(f"{section}.{name}", field.get_default(call_default_factory=True))
    return {key: value for key, value in flat.items() if key not in WITHOUT_EFFECT}


def entries_of(runs: Sequence[Path]) -> list[Entry]:
    """The runs, those that differ in their seed only together.

    Raises:
        UserError: every run that cannot be read, or that has the settings and the seed of another.
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
    """Runs of another task have no place under the name of a published one.

    Raises:
        UserError: under `key`, for each such run, or where nothing of ours compares.
    """
    experiment = published().experiments.get(name)
    if experiment is None:
        return
    if experiment.metric in (None, "lm_eval"):
        told = "lm-eval's files are read as they are" if experiment.metric else "it is for reference only"
        raise UserError(key, f"{name} takes no runs ({told}); choose another name")
    wrong = [(entry, entry.config["data"]["corpus"]) for entry in entries if experiment.corpora]
    wrong = [(entry.seeds[0].run, corpus) for entry, corpus in wrong if corpus not in experiment.corpora]
    if wrong:
        wanted = " or ".join(experiment.corpora)
        raise UserError.from_list(
            (
                (key, f"{name} is about {wanted}, but {run} has {corpus}; choose another name")
                for run, corpus in wrong
            )
        )


def collect(runs: Sequence[Path], name: str, command: str) -> Results:
    """Everything a results file holds.

    Raises:
        UserError: runs that cannot be read, or that are not about the named experiment.
    """
    entries = entries_of(runs)
    check_corpora(name, entries, "--as")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    where = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Results(
        experiment=name,
        command=command,
        commit=commit(),
        time=now,
        machine=where,
        versions=versions(),
        entries=entries,
    )


def main(argv: list[str]) -> None:
    """`minrnn results ...`

    Raises:
        UserError: runs that cannot be read, or do not fit the name.
    """
    parser = argparse.ArgumentParser(
        "minrnn results",
        description="One results file from folders of runs, for minrnn report.",
    )
    parser.add_argument(
        "runs",
        type=user_path,
        nargs="+",
        metavar="RUN",
        help="folders of runs; those that differ in run.seed only are one entry",
    )
    parser.add_argument(
        "--as",
        dest="name",
        required=True,
        metavar="NAME",
        help=f"one of {', '.join(published().experiments)}; or a name of its own",
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
        print(f"{entry.config['model'].get('cell')}, {entry.config['data']['corpus']}: seeds {steps}")
    print(f"{out} written")
