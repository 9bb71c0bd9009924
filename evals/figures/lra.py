"""`minrnn figures lra`: trains classifiers on the tasks of Long Range Arena, at sizes that a CPU takes.

    lra.yaml -> a run for each name and seed, in a process of its own
      -> evals/results/runs-lra-NAME.json and .png, written after each run: all seeds of the name so far

The runs are those of `minrnn train`: the next call reads finished ones and resumes stopped ones. A run that
the time limit stops is scored on the test split at the step that it reached.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ...common.errors import UserError
from ...common.files import user_path
from ...common.names import did_you_mean, nearest_names
from ...pipeline.checkpoint import checkpoint_paths
from ...pipeline.options import new_parser
from ..output import RESULTS, table
from ..report import runs as results
from ..report.compare import pool
from ..report.pictures import learning_curves
from ..report.published import published
from ..report.sources import read_file

GRID = Path(__file__).with_name("lra.yaml")
DESCRIPTION = """Train classifiers on the tasks of Long Range Arena at sizes that a CPU takes, and ListOps at
the published size for the time that is left. Call it again to go on."""
EPILOG = """examples:
  minrnn figures lra --imdb imdb/ --cifar10 cifar10/ --minutes 600
  minrnn figures lra --only listops --minutes 120"""


def command_of(run: dict[str, Any], folder: Path, seed: int, folders: dict[str, Path | None]) -> list[str]:
    """The command that trains a run of lra.yaml; names of local data sets are replaced by their folders."""
    settings = {"run.dir": folder, "run.seed": seed, "tracking.uri": "null", **run["settings"]}
    words = [sys.executable, "-m", "minrnn.launch.cli", "train", "--config", run["recipe"]]
    for key, value in settings.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        for name, path in folders.items():
            text = text.replace(f"folder: {name}", f"folder: {path}")
        words += [f"--{key}", text]
    return words


def train(command: list[str], folder: Path, seconds: float) -> bool:
    """Train or resume a run. After this many seconds it is stopped with SIGTERM, on which it saves, and then
    scored at the step that it reached.

    Returns:
        Whether it ended without an error.
    """
    process = subprocess.Popen(command)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if not (steps := steps_done(folder)):
        return True
    return subprocess.run([*command, "--train.steps", str(steps)], check=False).returncode == 0


def steps_done(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 without one."""
    paths = checkpoint_paths(folder / "checkpoints")
    return int(paths[0].name.removeprefix("step-")) if paths else 0


def write_results(name: str, recipe: str, folders: Sequence[Path]) -> None:
    """Write the results file and the curves of the runs of one name that exist."""
    out = RESULTS / f"runs-lra-{name}.json"
    results.main([*map(str, folders), "--as", experiment_of(recipe), "--out", str(out)])
    by_experiment, _ = pool([read_file(out, lambda source: None)])
    learning_curves(by_experiment[experiment_of(recipe)], out.with_suffix(".png"))


def draw_comparison(names: Sequence[str], recipe: str, picture: Path) -> None:
    """Draw the curves of several names of one recipe in one picture, if all have results."""
    files = [RESULTS / f"runs-lra-{name}.json" for name in names]
    if all(file.exists() for file in files):
        by_experiment, _ = pool([read_file(file, lambda source: None) for file in files])
        learning_curves(by_experiment[experiment_of(recipe)], picture)


def experiment_of(recipe: str) -> str:
    """The name of a recipe's task in published.yaml."""
    return recipe.replace("pathx", "path-x")


def summary(grid: dict[str, Any], runs: Path) -> list[dict[str, Any]]:
    """A row for each name of the grid, then one for each published task that was not run, with the reason."""
    rows: list[dict[str, Any]] = []
    for name, run in grid.items():
        folders = [folder for seed in run["seeds"] if steps_done(folder := runs / f"{name}-{seed}")]
        seeds = [results.read_run(folder)[1] for folder in folders]
        scores = [
            f"{100 * seed.test.accuracy:.1f}"
            for seed in seeds
            if seed.test and seed.test.accuracy is not None
        ]
        steps = ", ".join(f"{seed.steps:,}" for seed in seeds)
        rows.append({"name": name, "steps": steps or "-", "accuracy": ", ".join(scores) or "-"})
        if not seeds:
            rows[-1]["reason"] = "not run yet"
    for name, experiment in published().experiments.items():
        if experiment.group == "lra" and experiment.not_run:
            rows.append({"name": name, "reason": f"not run: {experiment.not_run}"})
    return rows


COLUMNS = {
    "run": lambda row: row["name"],
    "steps": lambda row: row["steps"],
    "test accuracy, %": lambda row: row["accuracy"],
}


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn figures lra", DESCRIPTION, EPILOG)
    parser.add_argument("--imdb", type=user_path, help="folder with IMDb's parquet files (default: no Text)")
    parser.add_argument("--cifar10", type=user_path, help="folder with CIFAR-10's (default: no Image)")
    parser.add_argument("--runs", type=user_path, default=Path("runs/lra"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of lra.yaml (default: all)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=240,
        help="when training stops (default: %(default)s); the test of the last run comes after that",
    )
    return parser


def read_grid(names: Sequence[str] | None) -> dict[str, Any]:
    """The runs of lra.yaml with these names (all by default).

    Raises:
        UserError: names that it does not have.
    """
    grid = yaml.safe_load(GRID.read_text())["runs"]
    errors = [
        f"there is no {name} ({did_you_mean(nearest_names(name, grid), otherwise=', '.join(grid))})"
        for name in names or ()
        if name not in grid
    ]
    if errors:
        raise UserError.from_list([("--only", error) for error in errors])
    return {name: grid[name] for name in names or grid}


def main(argv: list[str]) -> None:
    """Train what there is time for, write the results files, and print the table.

    Raises:
        UserError: an unknown name; or some runs failed, after the others were trained.
    """
    arguments = _parser().parse_args(argv)
    grid = read_grid(arguments.only)
    deadline = time.monotonic() + 60 * arguments.minutes
    data = {"IMDB": arguments.imdb, "CIFAR10": arguments.cifar10}
    failures = []
    for name, run in grid.items():
        needed = [key for key in data if f"folder: {key}" in str(run["settings"])]
        if any(data[key] is None for key in needed):
            print(f"{name} is left out: it needs --{needed[0].lower()}", file=sys.stderr)
            continue
        folders = [arguments.runs / f"{name}-{seed}" for seed in run["seeds"]]
        for seed, folder in zip(run["seeds"], folders, strict=True):
            left = deadline - time.monotonic()
            if left > 0 and not train(command_of(run, folder, seed, data), folder, left):
                failures.append((folder.name, "failed; its messages are above"))
            if existing := [folder for folder in folders if steps_done(folder)]:
                write_results(name, run["recipe"], existing)
    for picture, names in yaml.safe_load(GRID.read_text()).get("pictures", {}).items():
        if names_trained := [name for name in names if name in grid]:
            draw_comparison(names, grid[names_trained[0]]["recipe"], RESULTS / f"runs-lra-{picture}.png")
    print(table(summary(grid, arguments.runs), COLUMNS, "Long Range Arena"))
    if failures:
        raise UserError.from_list(failures)
