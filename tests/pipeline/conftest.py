"""A run that trains in a second, in this process."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

from minrnn.pipeline import loop
from minrnn.pipeline.recipe import build_recipe

Values = dict[str, dict[str, Any]]
WORDS = [
    "the",
    "state",
    "of",
    "a",
    "lane",
    "goes",
    "on",
    "where",
    "it",
    "was",
    "cut",
    "and",
    "no",
    "document",
    "ever",
    "sees",
    "another",
    "one",
]


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: with tensors this small, two threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 300 documents of very different lengths."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    with path.open("w") as file:
        for _ in range(300):
            text = " ".join(draw.choices(WORDS, k=draw.choice([0, 1, 3, 10, 60])))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture
def values(tmp_path: Path, corpus: Path) -> Values:
    """A tiny recipe, which tests may change."""
    return {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "dropout": 0.1},
        "data": {
            "corpus": str(corpus),
            "validation_fraction": 0.1,
            "validation_tokens": 500,
            "shuffle_window": 50,
            "workers": 0,
        },
        "batch": {"readers": 2, "lanes": 2, "chunk": 24},
        "optim": {"warmup_steps": 2},
        "train": {
            "precision": "fp32",
            "steps": 12,
            "log_every": 1,
            "eval_every": 6,
            "save_every": 4,
            "sample_tokens": 3,
        },
        "tracking": {"uri": None},
    }


@pytest.fixture
def run_recipe() -> Callable[[Values], Path]:
    """Train a recipe in this process; returns the run's folder."""

    def run(values: Values) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        loop.train(build_recipe(values))
        return Path(values["run"]["dir"])

    return run


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
