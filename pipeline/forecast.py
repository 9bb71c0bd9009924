"""The remaining time of a run, estimated once after its first steps.

steps after the first (which compiles) -> seconds per step x remaining steps and validations
-> "about 3 min to go"
"""

import time
from collections.abc import Callable

from ..common.names import counted
from .config import Recipe
from .run import Run
from .run_log import in_words

BACKWARD = 2  # forward passes that take as long as a backward pass, which validation has not


class Forecast:
    """Reports the remaining time once, at the first log line after at least two steps."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start: tuple[int, float] | None = None
        self._is_done = False

    def after_step(self, run: Run, is_logged: bool) -> None:
        """Call this after each step, before saving and validating."""
        if self._is_done:
            return
        if self._start is None:
            self._start = (run.step, self._clock())
            return
        if not is_logged:
            return
        first, start = self._start
        self._is_done = True
        seconds_per_step = (self._clock() - start) / (run.step - first)
        steps, validations = run.recipe.train.steps - run.step, validations_left(run.recipe, run.step)
        run.report(
            f"step {run.step}: {in_words(seconds_left(run, seconds_per_step))} to go "
            f"({counted(steps, 'step')}, {counted(validations, 'validation')})"
        )


def seconds_left(run: Run, seconds_per_step: float) -> float:
    """The time that the remaining steps and validations of a run take."""
    batch = run.recipe.batch
    step_positions = max(len(run.data.readers), 1) * batch.tokens_per_step // batch.readers
    validation_positions = sum(part.num_positions for part in run.data.validation)
    forward_share = 1 / (batch.forward_passes + BACKWARD)
    validation_steps = forward_share * validation_positions / step_positions
    steps, validations = run.recipe.train.steps - run.step, validations_left(run.recipe, run.step)
    return seconds_per_step * (steps + validations * validation_steps)


def validations_left(recipe: Recipe, step: int) -> int:
    """How many validations a run still has after this step, including the last."""
    steps, every = recipe.train.steps, recipe.train.eval_every
    due = range(0) if every is None else range(-(-step // every) * every, steps + 1, every)
    return len(due) + (steps not in due)
