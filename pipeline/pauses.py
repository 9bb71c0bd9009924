"""What a run does between steps, besides saving: validation, the test split, tasks of lm-eval, samples."""

import math
import time
from typing import Any

from transformers import PreTrainedModel

from ..common.errors import NonFiniteError, one_line_message
from ..common.output import warn
from . import processes
from .evaluation import ValidationSets, validate, validation_summary
from .export import sample
from .folder import RunFolder
from .pictures import draw_accuracy, draw_loss
from .run import Run
from .samples import write_samples
from .step_log import record
from .task_evaluation import current_model, evaluate_tasks


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def due(run: Run) -> list[str]:
    """The kinds of lines of metrics.jsonl that this step has besides its own, in order."""
    recipe, step = run.recipe, run.step
    is_last = step == recipe.train.steps
    is_due_by_kind = {
        "validation": is_last or is_due(step, recipe.train.eval_every),
        "test": is_last and bool(run.data.test),
        "eval": bool(recipe.eval.tasks) and (is_last or is_due(step, recipe.eval.every)),
        "samples": is_due(step, recipe.eval.samples_every),
    }
    return [kind for kind, is_kind_due in is_due_by_kind.items() if is_kind_due]


def evaluate_due(run: Run) -> None:
    """Evaluate what is due after this step. Collective.

    Raises:
        NonFiniteError: the loss of a validation or test is not finite.
    """
    _evaluate(run, due(run))


def catch_up(run: Run) -> None:
    """Evaluate what a run lacks that resumes from a step that was saved, but stopped before its evaluations.
    Collective."""
    if run.step == 0 or not (kinds := due(run)):
        return
    if run.is_main:
        history = run.output.folder.metrics.history.update()
        kinds = [kind for kind in kinds if all(entry["step"] != run.step for entry in history.of_kind(kind))]
    _evaluate(run, processes.broadcast_from_main(run.accelerator, kinds))


def _evaluate(run: Run, kinds: list[str]) -> None:
    model: PreTrainedModel | None = None
    if "validation" in kinds:
        validate_run(run)
    if "test" in kinds:
        test_run(run)
    if {"eval", "samples"} & set(kinds):
        run.watchdog.enter(f"step {run.step}: copying the weights")
        device = run.accelerator.device
        model = current_model(run.engine, run.recipe, device, run.is_main)
    if "eval" in kinds:
        _evaluate_tasks(run, model)
    if "samples" in kinds:
        run.watchdog.enter(f"step {run.step}: samples")
        if model is not None:
            _sample(run, model)


def validate_run(run: Run) -> None:
    """Validate, log the result and draw the pictures.

    Raises:
        NonFiniteError: the validation loss is not finite.
    """
    result = _score(run, "validation", run.data.validation)
    run.report(
        f"step {run.step}: held-out loss {result['loss']:.4f} nats/{run.unit}, {validation_summary(result)}"
        + "".join(f", {bits:.4f} on {name}" for name, bits in result.get("by_source", {}).items())
    )
    if run.is_main:
        _draw(run.output.folder, run.unit, draws_accuracy=bool(result.get("by_length")))


def test_run(run: Run) -> None:
    """Score the test split, and log the result.

    Raises:
        NonFiniteError: its loss is not finite.
    """
    result = _score(run, "test", run.data.test)
    run.report(f"step {run.step}: test {validation_summary(result)} on {result['examples']:,} examples")


def _evaluate_tasks(run: Run, model: PreTrainedModel | None) -> None:
    """Evaluate eval.tasks and log the results. A task that fails is a warning."""
    start, values = time.perf_counter(), {}
    for name in run.tasks.names:
        run.watchdog.enter(f"step {run.step}: {name}")
        scores, error = evaluate_tasks(run.tasks, name, model, run.data.tokenizer, run.accelerator)
        values |= scores
        if error is not None and run.is_main:
            warn(f"step {run.step}: {name} could not be evaluated ({error}); training goes on")
    if not values:
        return
    run.report(f"step {run.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    entry = {"kind": "eval", "step": run.step, "tokens": run.progress.tokens, **values}
    record(run, {**entry, "seconds": round(time.perf_counter() - start, 2)})


def _sample(run: Run, model: PreTrainedModel) -> None:
    """Log samples and write samples.txt, in the main process. A failure is a warning."""
    train = run.recipe.train
    try:
        texts = sample(model, run.data.tokenizer, train.prompts, train.sample_tokens, run.recipe.run.seed)
    except Exception as error:
        warn(f"step {run.step}: no samples ({one_line_message(error)}); training goes on")
        return
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(train.prompts, texts, strict=True)]
    record(run, {"kind": "samples", "step": run.step, "samples": samples})
    write_samples(run.output.folder)


def _score(run: Run, kind: str, sets: ValidationSets) -> dict[str, Any]:
    """Score these sets and write the result to metrics.jsonl as a line of this kind."""
    start = time.perf_counter()
    run.watchdog.enter(f"step {run.step}: {kind}")
    result = validate(
        run.engine.module,
        sets,
        run.accelerator,
        run.recipe.batch.carry_state,
        run.layout,
        in_lockstep=run.engine.in_lockstep,
        after_chunk=run.watchdog.move,
    )
    if not math.isfinite(result["loss"]):
        raise NonFiniteError(
            f"step {run.step}: the {kind} loss is {result['loss']}. Checkpoints are as they were."
        )
    entry = {"kind": kind, "step": run.step, "tokens": run.progress.tokens, **result}
    record(run, {**entry, "seconds": round(time.perf_counter() - start, 2)})
    return result


def _draw(folder: RunFolder, unit: str, draws_accuracy: bool) -> None:
    """Draw the pictures. A failure is a warning and never stops the run."""
    try:
        history = folder.metrics.history.update()
        draw_loss(history, folder.path / "loss.png", folder.path.name, unit)
        if draws_accuracy:
            draw_accuracy(history, folder.path / "accuracy_by_length.png", folder.path.name)
    except Exception as error:
        warn(f"the pictures could not be drawn: {error}")
