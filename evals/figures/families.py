"""`minrnn figures families`: trains all kinds of models on one text, with equal parameters and equal tokens.

    grid (families.yaml) -> speed of each model, from a few steps
                         -> a short run per learning rate, and the best rate
                         -> a full run per seed -> table, evals/results/families-NAME.json

Runs that a time limit leaves out are listed with the time that they would take. The next call goes on where
this one stopped: finished runs are read, a stopped run resumes. A run whose result is in the results file
(`--out`) is not repeated either, if grid and held-out text are the same, so another machine can go on from
the file alone. Several calls may share a folder of runs if each trains other models (`--models`); a last call
with `--minutes 0 --measure-speed`, on a machine that does nothing else, then writes the table of all.
"""

import hashlib
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ...common.errors import UserError
from ...common.files import user_path, write_json, write_text
from ...data import CorpusSpec, open_source
from ...data.sources import Position
from ...pipeline.metrics import read_metrics
from ...pipeline.options import new_parser
from ..output import RESULTS, out_errors, table
from ..record import command_line, commit, machine, versions
from .families_table import COLUMNS, Model, curve, draw_curves, summary

GRID = Path(__file__).with_name("families.yaml")
PROBE_STEPS = 12
DESCRIPTION = """Train all kinds of models on one text, with equal parameters, equal tokens and tuned learning
rates, and compare their bits per byte and their speed. Call it again to go on."""


class Driver:
    """Trains the models of a grid, each run in a process of its own.

    Args:
        grid: content of families.yaml.
        corpus: the text, for `data.corpus`.
        validation: another text, of which pieces are held out.
        runs: folder of the runs.
        deadline: of `time.monotonic`, when no further run begins.
        run_limit: seconds; a model whose short run would take longer is not trained.
        measure_speed: measure the speed of models again.
    """

    def __init__(
        self,
        grid: dict[str, Any],
        corpus: str,
        validation: str,
        runs: Path,
        deadline: float,
        run_limit: float,
        measure_speed: bool = False,
    ):
        self.grid, self.corpus, self.runs = grid, corpus, runs
        self.commits: set[str] = set()
        self.validation = runs / "validation.jsonl"
        if not self.validation.exists():
            write_pieces(validation, corpus, self.validation, **grid["validation"])
        self.validation_hash = text_hash(self.validation)
        self.deadline, self.run_limit, self.measure_speed = deadline, run_limit, measure_speed
        batch = grid["recipe"]["batch"]
        self.tokens_per_step = batch["readers"] * batch["lanes"] * batch["chunk"]
        self.models = [Model(name, fields) for name, fields in grid["models"].items()]

    def restore(self, results: dict[str, Any]) -> None:
        """Take over the results of finished runs from a results file of the same grid and held-out text.

        Speed is measured again, since the file may be another machine's.
        """
        settings = ("tokens", "tuning_tokens", "recipe", "validation")
        is_same = all(results["grid"][name] == self.grid[name] for name in settings)
        if not is_same or results.get("validation_hash") != self.validation_hash:
            return
        rows = {row["model"]: row for row in results["rows"]}
        for model in self.models:
            row = rows.get(model.name)
            if row is None or row["fields"] != model.fields:
                continue
            rates = [f"{rate:g}" for rate in self.grid["learning_rates"]]
            tuning = {rate: value for rate, value in row["tuning"].items() if rate in rates}
            model.tuning = {rate: math.inf if value is None else value for rate, value in tuning.items()}
            if len(model.tuning) == len(rates) and row.get("learning_rate") == float(model.best_rate):
                seeds = [seed for seed in map(str, self.grid["seeds"]) if seed in row["final"]]
                model.final = {seed: row["final"][seed] for seed in seeds}
                model.curves = {seed: [tuple(point) for point in row["curves"][seed]] for seed in seeds}
        self.commits |= set(results["commits_of_runs"])

    def steps(self, tokens: int) -> int:
        """Steps that read this many tokens or a little more."""
        return math.ceil(tokens / self.tokens_per_step)

    def folder(self, model: Model, name: str) -> Path:
        """Of a run of the model."""
        return self.runs / model.name.replace(" ", "-") / name

    def train(self, model: Model, name: str, steps: int, eval_every: int, **options: Any) -> Path | None:
        """Train or resume a run; None if it failed, with the reason in the model."""
        folder = self.folder(model, name)
        recipe = {**self.grid["recipe"], "model": {**self.grid["recipe"]["model"], **model.fields}}
        recipe["data"] = {**recipe["data"], "corpus": self.corpus, "validation": str(self.validation)}
        recipe["run"] = {"dir": str(folder)}
        recipe["train"] = {**recipe["train"], "steps": steps, "eval_every": eval_every}
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.parent / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "minrnn.launch.cli", "train", "--config", str(path)]
        command += [
            word for key, value in options.items() for word in (f"--{key.replace('__', '.')}", str(value))
        ]
        print(f"{model.name}: {name}, {steps:,} steps", file=sys.stderr, flush=True)
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if "rror" in line] or ["it failed"]
            model.failure = lines[-1].strip()[:200]
            return None
        write_json(folder / "origin.json", {"commit": commit()})
        return folder

    def bits_per_byte(
        self, model: Model, name: str, tokens: int, checks: int, **options: Any
    ) -> float | None:
        """Of a run's end: of the finished run, or of one that is trained now.

        Args:
            checks: number of validations.

        Returns:
            infinity if the run fails; None if there is no time for it.
        """
        folder, steps = self.folder(model, name), self.steps(tokens)
        if not _is_finished(folder, steps):
            if not self.has_time(model, tokens):
                return None
            if self.train(model, name, steps, math.ceil(steps / checks), **options) is None:
                return math.inf
        self.commits.add(json.loads((folder / "origin.json").read_text())["commit"])
        return _lines(folder, "validation")[-1]["bits_per_byte"]

    def probe(self, model: Model) -> None:
        """Measure the speed of a few steps, or read what was measured."""
        folder = self.folder(model, "probe")
        if self.measure_speed:
            shutil.rmtree(folder, ignore_errors=True)
        is_finished = _is_finished(folder, PROBE_STEPS)
        if not is_finished and not self.train(model, "probe", PROBE_STEPS, PROBE_STEPS, train__log_every=1):
            model.reason = model.failure
            return
        rates = [line["tokens_per_second"] for line in _lines(folder, "train")]
        model.tokens_per_second = statistics.median(rates[len(rates) // 2 :])
        model.settings = _settings(folder)
        if model.seconds(self.grid["tuning_tokens"]) > self.run_limit:
            model.reason = "a short run is longer than --run-minutes"

    def tune(self, model: Model) -> None:
        """A short run for each learning rate."""
        for rate in self.grid["learning_rates"]:
            if model.reason:
                return
            if f"{rate:g}" in model.tuning:  # from the results file
                continue
            name, tokens = f"lr-{rate:g}", self.grid["tuning_tokens"]
            value = self.bits_per_byte(model, name, tokens, checks=1, optim__lr=rate)
            if value is not None:
                model.tuning[f"{rate:g}"] = value
        if model.tuning and all(map(math.isinf, model.tuning.values())):
            model.reason = model.failure

    def finish(self, model: Model, seed: int) -> None:
        """A full run with the best learning rate."""
        is_tuned = len(model.tuning) == len(self.grid["learning_rates"])
        if model.reason or not is_tuned or str(seed) in model.final:
            return
        options = {"optim__lr": model.best_rate, "run__seed": seed}
        value = self.bits_per_byte(model, f"full-{seed}", self.grid["tokens"], checks=10, **options)
        if value is not None and math.isfinite(value):
            model.final[str(seed)] = value
            model.curves[str(seed)] = curve(_lines(self.folder(model, f"full-{seed}"), "validation"))

    def has_time(self, model: Model, tokens: int) -> bool:
        """Whether a run would end before the deadline."""
        return time.monotonic() + model.seconds(tokens) < self.deadline

    def work(self) -> Iterator[None]:
        """All runs, the fast models first; yields after each model's part."""
        for model in self.models:
            self.probe(model)
            yield
        by_speed = sorted(self.models, key=lambda model: -(model.tokens_per_second or 0))
        for model in by_speed:
            if model.tokens_per_second is not None:
                self.tune(model)
                yield
        for seed in self.grid["seeds"]:
            for model in by_speed:
                self.finish(model, seed)
                yield


def _documents(corpus: str) -> Iterator[str]:
    """The texts of a corpus that are not empty."""
    source = open_source(CorpusSpec(corpus))
    for shard in range(source.num_shards):
        yield from (document.text for document in source.read(shard, Position()) if document.text)


def write_pieces(validation: str, corpus: str, path: Path, documents: int, characters: int) -> None:
    """Write the middle of the first documents of a text as JSON lines, which are quick to validate on.

    Raises:
        UserError: one of these documents is in the corpus too.
    """
    texts = list(itertools.islice(_documents(validation), documents))
    if any(text in texts for text in _documents(corpus)):
        raise UserError("--validation", f"a document of {validation} is in {corpus} too")
    begins = [max(0, (len(text) - characters) // 2) for text in texts]
    pieces = [text[begin : begin + characters] for text, begin in zip(texts, begins, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps({"text": piece}) + "\n" for piece in pieces))


def text_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line.get("kind") == kind]


def _is_finished(folder: Path, steps: int) -> bool:
    """Whether the run was trained to its last step and exported."""
    return (folder / "origin.json").exists() and _lines(folder, "train")[-1]["step"] == steps


def _settings(folder: Path) -> dict[str, Any]:
    """Precision, parameters and limits of a run."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return {
        "precision": config["train"]["precision"],
        "sizes": config["model"].get("sizes"),
        "limits": config["model"].get("limits", []),
    }


def read_grid(path: Path, names: Sequence[str] | None) -> dict[str, Any]:
    """The grid, with these models only (all by default).

    Raises:
        UserError: a model that the grid does not have.
    """
    grid = yaml.safe_load(path.read_text())
    if unknown := [name for name in names or () if name not in grid["models"]]:
        raise UserError("--models", f"{unknown[0]!r} is none of {', '.join(grid['models'])}")
    grid["models"] = {name: grid["models"][name] for name in names or grid["models"]}
    return grid


def main(argv: list[str]) -> None:
    """Train what there is time for, print the table, and write the results file."""
    epilog = (
        "example:\n  minrnn figures families --corpus 'books/*-0000[0-6]-*' --validation 'books/*-00007-*'"
    )
    parser = new_parser("minrnn figures families", DESCRIPTION, epilog)
    parser.add_argument("--corpus", required=True, help="the text, as data.corpus")
    parser.add_argument("--validation", required=True, help="a text that --corpus does not contain")
    parser.add_argument("--name", default="books", help="of the text, for the results file (default: books)")
    parser.add_argument(
        "--grid", type=user_path, default=GRID, help="a file like evals/figures/families.yaml"
    )
    parser.add_argument(
        "--measure-speed", action="store_true", help="measure the speed of all models again, before all runs"
    )
    parser.add_argument("--models", nargs="+", help="names in the grid (default: all)")
    parser.add_argument("--runs", type=user_path, help="folder of the runs (default: runs/families-NAME)")
    parser.add_argument("--minutes", type=float, default=120, help="no run begins that ends later")
    parser.add_argument("--run-minutes", type=float, default=10, help="limit of a short run")
    parser.add_argument("--out", type=user_path, help="default: evals/results/families-NAME.json")
    arguments = parser.parse_args(argv)
    out = arguments.out or RESULTS / f"families-{arguments.name}.json"
    if errors := out_errors(out):
        raise UserError.from_list(errors)
    grid = read_grid(arguments.grid, arguments.models)
    driver = Driver(
        grid,
        arguments.corpus,
        arguments.validation,
        arguments.runs or Path("runs") / f"families-{arguments.name}",
        time.monotonic() + 60 * arguments.minutes,
        60 * arguments.run_minutes,
        arguments.measure_speed,
    )
    if out.exists():
        driver.restore(json.loads(out.read_text()))
    record = {
        "command": command_line("minrnn figures families", argv),
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "grid": grid,
        "validation_hash": driver.validation_hash,
    }
    rows: list[dict[str, Any]] = []
    for _ in driver.work():
        rows = [summary(model, grid) for model in driver.models]
        origin = {**record, "commits_of_runs": sorted(driver.commits)}
        write_json(out, {"kind": "families", "text": arguments.name, **origin, "rows": rows})
    draw_curves(rows, out.with_suffix(".png"))
    print(table(rows, COLUMNS, f"{arguments.name}, {grid['tokens']:,} tokens"))
