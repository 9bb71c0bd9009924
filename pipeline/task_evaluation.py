"""Tasks of lm-eval and samples on the weights of a run, while it pauses.

    current weights -> a copy of the model, on the main process -> lm-eval, or samples -> metrics.jsonl

The copy is an ordinary model without the wrappers of training, so its results are those of `minrnn eval` on
an export of this step, under every engine and layout. The other processes wait. Random states are put back,
so the losses of a run do not depend on its evaluations.
"""

import contextlib
import copy
import importlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.errors import UserError, missing_package_error, one_line_message
from . import processes
from .checkpoint import copy_parameters
from .classification import new_model
from .config import Recipe
from .engine import Engine
from .eval_section import EvalSection


class TaskEvaluator(Protocol):
    """What `evals.harness.in_training` provides: tasks with their data."""

    names: list[str]

    def evaluate(self, name: str, model: PreTrainedModel, tokenizer: Any) -> dict[str, float]:
        """The metrics of a task or group, by `TASK/METRIC`."""
        ...


@dataclass(frozen=True)
class EvaluatedTasks:
    """The tasks of `eval.tasks`."""

    names: list[str]
    """The same in every process; empty if there are none."""
    evaluator: TaskEvaluator | None = None
    """In the main process."""


def open_tasks(recipe: Recipe, accelerator: Any) -> EvaluatedTasks:
    """Load the tasks with their data, in the main process. Collective.

    Raises:
        UserError: in every process: lm-eval is not installed, or tasks are unknown or cannot be loaded.
    """
    if not recipe.eval.tasks:
        return EvaluatedTasks([])
    opened: list[TaskEvaluator] = []

    def open_names() -> list[str]:
        opened.append(_evaluator(recipe.eval))
        return opened[0].names

    names = processes.run_on_main(accelerator, open_names)
    return EvaluatedTasks(names, opened[0] if opened else None)


def _evaluator(section: EvalSection) -> TaskEvaluator:
    # By name: folders import those below them only, and this is the one call into a folder above.
    try:
        module = importlib.import_module("..evals.harness.in_training", __package__)
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise missing_package_error("eval.tasks", "lm-eval", extra="eval") from None
    try:
        return module.LoadedTasks(section)
    except UserError as error:
        raise error.with_keys({"--tasks": "eval.tasks"}) from None


def current_model(
    engine: Engine, recipe: Recipe, device: torch.device, is_main: bool
) -> PreTrainedModel | None:
    """A copy of the model with the current weights, in eval mode, in the main process; None in others.
    Collective."""
    weights = engine.weights(keep=is_main)
    if not is_main:
        return None
    with torch.random.fork_rng():
        model = new_model(recipe.model.family, copy.deepcopy(engine.module.config))
    nn.Module.to(model, torch.float64 if recipe.train.precision == "fp64" else torch.float32)
    copy_parameters(weights, model, "the run")
    nn.Module.to(model, device)
    return model.eval()


@contextlib.contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Put the random states of Python, numpy and torch back at the end: lm-eval seeds all of them."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def evaluate_tasks(
    tasks: EvaluatedTasks, name: str, model: PreTrainedModel | None, tokenizer: Any, accelerator: Any
) -> tuple[dict[str, float], str | None]:
    """The metrics of one task, and why there are none, in every process. Collective.

    Args:
        model: `current_model`.
    """

    def evaluate() -> tuple[dict[str, float], str | None]:
        assert tasks.evaluator is not None
        assert model is not None
        try:
            with unchanged_random_states():
                return tasks.evaluator.evaluate(name, model, tokenizer), None
        except Exception as error:  # tasks run foreign code; memory may not suffice
            return {}, one_line_message(error)

    return processes.run_on_main(accelerator, evaluate)
