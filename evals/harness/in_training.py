"""Tasks of lm-eval for `eval.tasks`, on a model in memory (pipeline/task_evaluation.py).

names -> tasks with their data, once -> at each pause: simple_evaluate -> {TASK/METRIC: value}
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from lm_eval import evaluator
from lm_eval.api import model as lm_eval_model
from lm_eval.api import task as lm_eval_task
from tqdm import tqdm
from transformers import PreTrainedModel

from ...pipeline.eval_section import EvalSection
from .model import MinRNNLM
from .results import metric_values
from .tasks import load_tasks, task_manager, task_names


class LoadedTasks:
    """The tasks of a recipe, with their data.

    Raises:
        UserError: under `--tasks`: unknown tasks, and those whose data cannot be loaded.
    """

    def __init__(self, section: EvalSection):
        self.section = section
        path = section.include_path
        self._manager = task_manager(None if path is None else Path(path))
        self._tasks = load_tasks(self._manager, task_names(self._manager, ",".join(section.tasks)))
        self.names = list(self._tasks)

    def evaluate(self, name: str, model: PreTrainedModel, tokenizer: Any) -> dict[str, float]:
        """The metrics of a task or group, by `TASK/METRIC`, without standard errors.

        Args:
            model: in eval mode.
        """
        lm = MinRNNLM(model, tokenizer, batch_size=self.section.batch_size, show_progress=False)
        simple_evaluate: Any = evaluator.simple_evaluate
        limit = self.section.limit
        with _silence():
            results = simple_evaluate(
                lm,
                tasks=self._tasks[name],
                num_fewshot=self.section.num_fewshot,
                limit=limit if limit is None or limit < 1 else int(limit),
                bootstrap_iters=0,
                log_samples=False,
                task_manager=self._manager,
            )
        assert results is not None  # the rank of `lm` is 0
        return metric_values(results)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without lm-eval's progress bars and log lines, which would end up between those of the training."""
    logger, modules = logging.getLogger("lm_eval"), cast(Any, (lm_eval_task, lm_eval_model))
    level = logger.level
    logger.setLevel(logging.ERROR)
    for module in modules:
        module.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        logger.setLevel(level)
        for module in modules:
            module.tqdm = tqdm
