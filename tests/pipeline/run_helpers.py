"""Helpers for tests that train: stop a run at a step, read its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

from minrnn.pipeline import loop
from minrnn.pipeline.config import Recipe
from minrnn.pipeline.optim import learning_rate
from minrnn.pipeline.recipe import build_recipe

Values = dict[str, dict[str, Any]]


class Crash(BaseException):
    """Ends training immediately, as a kill would. Nothing catches it, so nothing is saved."""


def train(values: Values) -> Path:
    """Train a recipe in this process; returns the run's folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    loop.train(build_recipe(values))
    return Path(values["run"]["dir"])


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


def run_that_resumes_to_the_bit(
    values: Values, run_recipe: Callable[[Values], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of a whole run, whose losses a run that was stopped and resumed equals."""
    whole = run_recipe(values)
    values["run"]["dir"] = str(tmp_path / "stopped")
    stop_at_step_7(values, run_recipe, monkeypatch)
    assert losses(run_recipe(values)) == losses(whole)
    return whole


def plain_update(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, recipe: Recipe, step: int
) -> None:
    """A step's backward pass, clipping, learning rate and update, written out in plain torch."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe.optim, step, recipe.train.steps)
    optimizer.step()
    optimizer.zero_grad()


def recipe_file(values: Values, folder: Path) -> Path:
    """Write the recipe to a file, for other processes."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(folder: Path, kind: str = "train") -> list[tuple[int, float]]:
    """(step, loss) of each line of metrics.jsonl, in the order of the file."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries if entry["kind"] == kind]
