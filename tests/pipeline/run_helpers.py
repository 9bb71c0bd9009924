"""Helpers for tests that train: stop a run at a step, read its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from minrnn.pipeline import loop

Values = dict[str, dict[str, Any]]


class Crash(BaseException):
    """Ends training immediately, as a kill would. Nothing catches it, so nothing is saved."""


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Call a function before a step of a run."""
    original = loop.take_step

    def one_step(run: loop.Run, number: int, *arguments):
        if number == step:
            act()
        return original(run, number, *arguments)

    monkeypatch.setattr(loop, "take_step", one_step)


def stop_at_step_7(
    values: Values, run_recipe: Callable[[Values], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train until step 7, where an error stops the run."""

    def stop() -> None:
        raise RuntimeError("stop here")

    with monkeypatch.context() as patched:
        before_step(patched, 7, stop)
        with pytest.raises(RuntimeError, match="stop here"):
            run_recipe(values)


def recipe_file(values: Values, folder: Path) -> Path:
    """Write the recipe to a file, for other processes."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(folder: Path, kind: str = "train") -> list[tuple[int, float]]:
    """(step, loss) of each line of metrics.jsonl, in the order of the file."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries if entry["kind"] == kind]
