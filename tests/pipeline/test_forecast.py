"""The estimate of the remaining time."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_helpers import Values

from minrnn.pipeline.forecast import Forecast, in_words, validations_left
from minrnn.pipeline.recipe import build_recipe


class Steps:
    """A run with its own clock: the first step takes 1,000 seconds, all others 2."""

    def __init__(self, values: Values, num_positions: int):
        self.recipe, self.step, self.now, self.lines = build_recipe(values), 0, 0.0, []
        validation = [SimpleNamespace(num_positions=num_positions)]
        self.data = SimpleNamespace(readers={0: None}, validation=validation)
        self.report: Callable[[str], Any] = self.lines.append

    def take(self, count: int, log_every: int) -> list[str]:
        forecast = Forecast(lambda: self.now)
        first = self.step + 1
        for self.step in range(first, first + count):
            self.now += 1000 if self.step == first else 2
            forecast.after_step(self, is_logged=self.step % log_every == 0)  # type: ignore[arg-type]
        return self.lines


@pytest.mark.parametrize(("done", "log_every", "logged"), [(0, 5, 5), (0, 1, 2), (50, 5, 55), (54, 5, 60)])
def test_the_forecast_ignores_the_first_step(values: Values, done: int, log_every: int, logged: int):
    values["batch"] |= {"readers": 1, "lanes": 2, "chunk": 50}
    values["train"] |= {"steps": 100, "eval_every": 60, "save_every": None}
    run = Steps(values, num_positions=3000)  # as many as in 30 steps, so 10 steps' work
    run.step = done
    seconds = 2 * (100 - logged + 2 * 10)
    assert run.take(20, log_every) == [
        f"step {logged}: {in_words(seconds)} to go ({100 - logged} steps, 2 validations)"
    ]


def test_validations_left(values: Values):
    values["train"] |= {"steps": 12, "eval_every": 5}
    recipe = build_recipe(values)
    assert [validations_left(recipe, step) for step in (1, 5, 6, 10, 11, 12)] == [3, 3, 2, 2, 1, 1]
    values["train"]["eval_every"] = None
    assert validations_left(build_recipe(values), 1) == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.1, "1 s"),
        (80, "80 s"),
        (90, "2 min"),
        (200, "3 min"),
        (5000, "83 min"),
        (6000, "2 h"),
        (1e5, "28 h"),
        (1e6, "12 days"),
    ],
)
def test_times_in_words(seconds: float, words: str):
    assert in_words(seconds) == f"about {words}"


@pytest.mark.parametrize("corpus_is_a_task", [False, True])
def test_every_run_reports_it_once(
    values: Values,
    run_recipe: Callable[[Values], Path],
    capsys: pytest.CaptureFixture,
    corpus_is_a_task: bool,
):
    if corpus_is_a_task:
        values["data"] = {"corpus": "synthetic/parity", "task": {"validation_examples": 8}}
        values["train"]["sample_tokens"] = 0
        values["batch"]["chunk"] = 40
    run_recipe(values)
    lines = [line for line in capsys.readouterr().err.splitlines() if "to go" in line]
    assert len(lines) == 1
    assert re.fullmatch(r"step 2: about \d+ (s|min) to go \(10 steps, 2 validations\)", lines[0].strip())
