"""`minrnn sweep`: all runs of a sweep, with any number of workers on any number of machines."""

import argparse
import collections
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from ...common.checks import option_minimum_errors
from ...common.errors import UserError
from ...common.output import warn
from ...evals.output import si, table
from ...pipeline.machine import num_cores
from ...pipeline.options import new_parser
from .checks import check_corpora
from .expand import PlannedRun, base_values, expand
from .leases import Leases
from .parent import end_parent, tracked_base
from .plan import planned, publish
from .progress import DONE, FAILED, Display, progress_table
from .runner import Hardware, Runner, train_command
from .runs_file import RunsFile
from .search import Study, check_optuna
from .spec import Sweep

REFRESH = 5.0  # seconds
SETTINGS = "--settings."
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
DESCRIPTION = """Train all runs of a sweep: a grid, a random or Bayesian search, or a ladder of sizes and
token budgets. SWEEP is a YAML file, or the name of a sweep that comes with minrnn ({sweeps}).
The same command resumes a sweep that was stopped. Started again, also on other machines that share the
sweep's folder, it adds workers: each takes the next run that nobody holds, and takes over the runs of
workers that died."""
EPILOG = """examples:
  minrnn sweep laptop --plan            what would be trained, and how long it takes
  minrnn sweep laptop --workers 2       two runs at a time, each on half of the cores
  minrnn fit runs/laptop                then: the scaling law
  minrnn sweep laptop --settings.data.corpus 'books/*.parquet' --out runs/books      on another text

a grid:
  out: runs/rates
  base: quickstart
  settings: {train.precision: fp32}
  grid: {model.cell: [mingru, minlstm], optim.lr: [2.0e-3, 4.0e-3]}
a search, each run drawn by Optuna from the results before it (make setup-search):
  search: {runs: 30, settings: {optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}}
runs by name, where several settings change together:
  variants: {reset: {batch.carry_state: false}, carried: {batch.backprop_chunks: 4, batch.lanes: 4}}
a ladder:
  ladder:
    sizes: [100k, 350k, 1M]
    budgets: [5, 10, 20]
    families: {minGRU: {}, Llama: {model.family: llama}}"""


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn sweep", DESCRIPTION.format(sweeps=", ".join(Sweep.shipped())), EPILOG)
    parser.add_argument(
        "file", metavar="SWEEP", help="a YAML file, or the name of a sweep that comes with minrnn"
    )
    add_options(parser, "SWEEP")
    return parser


def add_options(parser: argparse.ArgumentParser, file: str) -> None:
    """The options of a command that trains runs.

    Args:
        file: what the command line calls the file with the runs.
    """
    parser.add_argument("--plan", action="store_true", help="print runs, FLOPs and estimated hours, and stop")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="runs at the same time; they share the GPUs or the cores (default: 1)",
    )
    parser.add_argument("--out", help=f"the folder of the runs, in place of that in {file}")
    parser.add_argument(
        "--settings.SECTION.FIELD",
        metavar="VALUE",
        help=f"a setting of every run, in place of that in {file}'s settings",
    )
    parser.add_argument(
        "--tflops", type=float, help="rate of matrix products, for --plan (default: measured on this machine)"
    )
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.3,
        help="fraction of that rate that training reaches, for --plan (default: %(default)s, an assumption)",
    )


def main(argv: Sequence[str]) -> None:
    """Plan a sweep, or train it. The exit status is 1 if runs failed.

    Raises:
        UserError: all errors of the sweep and the options, before anything is trained.
    """
    sweep, arguments = parse(_parser(), argv, Sweep)
    if sweep.search is not None:
        check_optuna()
    expanded = expand(sweep)
    if arguments.plan:
        print(plan_text(sweep, expanded, arguments))
    elif train_sweep(sweep, expanded, arguments.workers):
        raise SystemExit(1)


def train_sweep(sweep: Sweep, expanded: list[PlannedRun], workers: int) -> bool:
    """Train all runs. Returns whether runs failed.

    Args:
        expanded: the sweep's runs, from `expand`.

    Raises:
        UserError: a corpus cannot be opened, the folder holds another sweep, or there are too few GPUs.
        SystemExit: a signal arrived; training has saved.
    """
    base = base_values(sweep)
    check_corpora(expanded)
    shares = hardware_of(workers, sweep.processes)
    folder, runs = Path(sweep.out), publish(sweep, planned(sweep, expanded))
    base = tracked_base(base, folder)
    runner = Runner(
        folder,
        runs,
        base,
        train_command(sweep.processes, sweep.launcher, has_gpus=bool(shares[0].environment)),
        sweep.retries,
        Leases(folder / "leases"),
        study=sweep.search and Study(folder, sweep.search, {run["name"]: run["trial"] for run in runs}),
    )
    has_failed = _run(runner, shares)
    end_parent(base, sweep.settings, "FAILED" if has_failed else "FINISHED")
    return has_failed


File = TypeVar("File", bound=RunsFile)


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], kind: type[File]
) -> tuple[File, argparse.Namespace]:
    """The file that a command line names, with `--out` and `--settings` in it; and the other options.

    Args:
        parser: with `add_options`, and the positional argument `file`.

    Raises:
        UserError: all errors of the options, or of the file.
    """
    words, overrides = settings_options(argv)
    arguments = parser.parse_args(words)
    errors = option_minimum_errors(arguments, workers=1)
    for name in ("tflops", "fraction"):
        if (value := getattr(arguments, name)) is not None and not value > 0:
            errors.append((f"--{name}", f"must be positive, not {value:g}"))
    if errors:
        raise UserError.from_list(errors)
    content = kind.read(arguments.file, overrides)
    if arguments.out is not None:
        content.out = os.path.expanduser(arguments.out)
    return content, arguments


def settings_options(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The other words of a command line, and the settings of `--settings.KEY VALUE` (or =VALUE) by key.

    Raises:
        UserError: a setting lacks its value.
    """
    others, settings, errors = [], {}, []
    words = collections.deque(argv)
    while words:
        word = words.popleft()
        if not word.startswith(SETTINGS):
            others.append(word)
            continue
        key, equals, value = word.removeprefix(SETTINGS).partition("=")
        if not equals and (not words or words[0].startswith("--")):
            errors.append((f"{SETTINGS}{key}", "lacks a value"))
            continue
        settings[key] = value if equals else words.popleft()
    if errors:
        raise UserError.from_list(errors)
    return others, settings


def hardware_of(workers: int, processes: int) -> list[Hardware]:
    """What each worker trains on: its GPUs, or its part of the cores.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus and workers * processes > num_gpus:
        need = f"{workers} workers with {processes} processes need {workers * processes} GPUs"
        message = f"{need}; there are {num_gpus}"
        raise UserError("--workers", message)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
    shares = []
    for worker in range(workers):
        own = tuple(cores[worker * len(cores) // workers : (worker + 1) * len(cores) // workers])
        environment = {}
        if num_gpus:
            gpus = visible[worker * processes : (worker + 1) * processes]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        shares.append(Hardware(str(worker), own if workers > 1 else (), environment))
    if workers > num_cores():
        warn(f"--workers: {workers} workers share {num_cores()} cores")
    return shares


def _run(runner: Runner, shares: list[Hardware]) -> bool:
    """Start a thread for each worker, show their progress, and stop all on a signal. Returns whether runs
    failed."""
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        runner.stop.set()

    previous = {number: signal.signal(number, on_signal) for number in SIGNALS}
    display = Display(runner)
    threads = [threading.Thread(target=runner.work, args=(share,), daemon=True) for share in shares]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            display.update()
            for thread in threads:
                thread.join(REFRESH / len(threads))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if runner.errors:
        raise runner.errors[0]
    if received:
        print(f"Stopped; the same command goes on from there: {runner.folder}", file=sys.stderr)
        raise SystemExit(128 + received[0])
    text, states = progress_table(runner)
    print(text)
    if runner.study is not None:
        print(runner.study.summary())
    failed = [name for name, state in states.items() if state == FAILED]
    if failed:
        print(
            f"error: sweep: {len(failed)} runs failed; {runner.folder / 'logs'} and failed/ say why",
            file=sys.stderr,
        )
    assert all(state in (DONE, FAILED) for state in states.values())
    return len(failed) > 0


def plan_text(sweep: Sweep, expanded: list[PlannedRun], arguments: argparse.Namespace) -> str:
    """The runs, their FLOPs and the estimated time.

    Args:
        expanded: the sweep's runs, from `expand`.
        arguments: with `tflops` and `fraction` of `add_options`.
    """
    runs = planned(sweep, expanded)
    precisions = {run.name: run.recipe.train.precision for run in expanded}
    rates, source = _rates(set(precisions.values()), arguments)

    def hours(run: dict[str, Any]) -> float:
        return run["flops"] / (rates[precisions[run["name"]]] * arguments.fraction) / 3600

    columns: dict[str, Any] = {
        "run": lambda run: run["name"],
        "parameters": lambda run: si(run["parameters"]["all"]),
        "tokens": lambda run: si(run["tokens"]),
        "steps": lambda run: f"{run['steps']:,}",
        "from step": lambda run: f"{run['branch_step']:,}" if run["trunk"] else "-",
        "FLOPs": lambda run: f"{run['flops']:.3g}",
        "hours": lambda run: f"{hours(run):.4f}" if hours(run) < 1 else f"{hours(run):,.1f}",
    }
    total = sum(run["flops"] for run in runs)
    alone = sum(run["flops_per_token"] * run["tokens"] for run in runs)
    lines = [table(runs, columns, f"{len(runs)} runs").lstrip("\n")]
    saved = f" ({alone / total:.2g} times as many without branches)" if alone > total else ""
    time = f"{sum(map(hours, runs)):.3g} hours at {arguments.fraction:.0%} of {source}"
    lines.append(f"in all {total:.3g} FLOPs{saved}, {time}")
    return "\n".join(lines)


def _rates(precisions: set[str], arguments: argparse.Namespace) -> tuple[dict[str, float], str]:
    """FLOP/s of matrix products by precision, and where the numbers are from.

    Raises:
        UserError: this machine lacks a precision.
    """
    if arguments.tflops is not None:
        rate: float = arguments.tflops * 1e12
        return dict.fromkeys(precisions, rate), f"{arguments.tflops:g} TFLOP/s"
    from ...pipeline.machine import measure_rates, resolve_device

    rates = measure_rates(resolve_device("auto"), sorted(precisions))
    if missing := precisions - rates.keys():
        raise UserError("--tflops", f"give a rate, as this machine has no {' and '.join(sorted(missing))}")
    measured = " and ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in rates.items())
    return rates, f"{measured}, measured here; divide by the number of machines"
