"""The state of each run of a sweep, as a table."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from ...evals.output import si, table
from .leases import RunState
from .runner import Runner

TAIL = 20_000  # bytes of metrics.jsonl that hold its newest lines
WAITING, TRAINING, DONE, FAILED = "waiting", "training", "done", "failed"


def newest_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The newest line of each kind in the last part of a metrics.jsonl: {"train": ..., "validation": ...}."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    newest = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the first may be cut
            entry = json.loads(line)
            newest[entry["kind"]] = entry
    return newest


def row_of(runner: Runner, name: str, state: RunState) -> dict[str, Any]:
    """What the table says about a run."""
    run, lines = runner.runs[name], newest_lines(runner.run_dir(name) / "metrics.jsonl")
    kind = WAITING
    if state.is_done:
        kind = DONE
    elif runner.has_failed(state):
        kind = FAILED
    elif state.is_held:
        kind = TRAINING
    train, validation = lines.get("train", {}), lines.get("validation", {})
    score = validation.get("bits_per_byte", validation.get("loss"))
    return {
        "run": name,
        "state": kind,
        "step": f"{train.get('step', 0):,}/{run['steps']:,}",
        "loss": f"{train['loss']:.3f}" if "loss" in train else "-",
        "held out": f"{score:.4f}" if score is not None else "-",
        "tokens/s": si(train.get("tokens_per_second")) if kind == TRAINING else "-",
        "worker": state.content.get("worker", "-") if kind == TRAINING else "-",
        "failures": str(len(state.failures)),
    }


def progress_table(runner: Runner) -> tuple[str, dict[str, str]]:
    """The table of all runs, and the state of each by name."""
    rows = [row_of(runner, name, state) for name, state in runner.states().items()]
    columns = {column: lambda row, column=column: row[column] for column in rows[0]}
    states = {row["run"]: row["state"] for row in rows}
    counts = ", ".join(
        f"{list(states.values()).count(kind)} {kind}" for kind in (DONE, TRAINING, WAITING, FAILED)
    )
    return table(rows, columns, f"{runner.folder}: {counts}").lstrip("\n"), states


class Display:
    """Shows the progress: a table that is drawn again on a terminal, else a line for each change."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self._states: dict[str, str] = {}
        self._height = 0

    def update(self) -> None:
        """Show what has changed."""
        try:
            text, states = progress_table(self.runner)
        except OSError:  # the folder's server does not answer; the next update may
            return
        if sys.stdout.isatty():
            up = f"\033[{self._height}A\033[J" if self._height else ""
            lines = text.splitlines()[: os.get_terminal_size().lines - 1]  # a longer table cannot be redrawn
            print(up + "\n".join(line[: os.get_terminal_size().columns - 1] for line in lines), flush=True)
            self._height = len(lines)
        else:
            for name, state in states.items():
                if self._states.get(name, WAITING) != state:
                    print(f"{name}: {state}", flush=True)
        self._states = states
