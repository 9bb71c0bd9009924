"""`minrnn figures lra`: trains classifiers on the tasks of Long Range Arena, at sizes that a CPU takes.

    lra.yaml -> a run for each name and seed, in a process of its own -> evals/results/runs-lra-NAME.json

The runs are those of `minrnn train`: the next call goes on where this one stopped. The last run, ListOps at
the published size, takes what time is left; its results file says how many steps that were.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from ...common.errors import UserError
from ...common.files import user_path
from ...pipeline.options import new_parser
from ..output import RESULTS
from ..report import runs as results
from ..report.runs import is_run

GRID = Path(__file__).with_name("lra.yaml")
DESCRIPTION = """Train classifiers on the tasks of Long Range Arena at sizes that a CPU takes, and ListOps at
the published size for the time that is left. Call it again to go on."""
EPILOG = "example:\n  minrnn figures lra --imdb imdb/ --cifar10 cifar10/ --minutes 240"


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


def train(command: list[str], seconds: float) -> bool:
    """Run a command; after this many seconds stop it with SIGTERM, on which it saves. Whether it finished.

    Raises:
        UserError: it failed.
    """
    process = subprocess.Popen(command)
    try:
        status = process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        return False
    if status != 0:
        raise UserError("figures lra", f"a run ended with status {status}: {' '.join(command)}")
    return True


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn figures lra", DESCRIPTION, EPILOG)
    parser.add_argument("--imdb", type=user_path, help="folder with IMDb's parquet files (default: no Text)")
    parser.add_argument("--cifar10", type=user_path, help="folder with CIFAR-10's (default: no Image)")
    parser.add_argument("--runs", type=user_path, default=Path("runs/lra"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of lra.yaml (default: all)")
    parser.add_argument("--minutes", type=float, default=240, help="time limit (default: %(default)s)")
    return parser


def main(argv: list[str]) -> None:
    """Train what there is time for, and write the results files.

    Raises:
        UserError: an unknown name, or a run failed.
    """
    arguments = _parser().parse_args(argv)
    grid = yaml.safe_load(GRID.read_text())["runs"]
    if unknown := [name for name in arguments.only or () if name not in grid]:
        raise UserError("--only", f"{unknown[0]!r} is none of {', '.join(grid)}")
    deadline = time.monotonic() + 60 * arguments.minutes
    folders = {"IMDB": arguments.imdb, "CIFAR10": arguments.cifar10}
    trained: dict[str, list[Path]] = {}
    for name in arguments.only or grid:
        run = grid[name]
        needed = [key for key in folders if f"folder: {key}" in str(run["settings"])]
        if any(folders[key] is None for key in needed):
            print(f"{name} is left out: it needs --{needed[0].lower()}")
            continue
        for seed in run["seeds"]:
            if time.monotonic() >= deadline:
                break
            folder = arguments.runs / f"{name}-{seed}"
            train(command_of(run, folder, seed, folders), deadline - time.monotonic())
            if is_run(folder):
                trained.setdefault(run["recipe"], []).append(folder)
    for recipe, paths in trained.items():
        out = RESULTS / f"runs-{recipe}.json"
        results.main([*map(str, paths), "--as", recipe.replace("pathx", "path-x"), "--out", str(out)])
