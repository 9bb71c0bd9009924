"""The first lines of a run's log: what is trained, on what, from which step."""

from typing import Any

from ..common.names import counted
from ..common.output import warn
from .config import Recipe
from .data_order import order_note
from .families.registry import OURS, kernel_names
from .machine import PrecisionChoice
from .optim import learning_rate
from .optim_section import OptimSection
from .recipe_on_resume import schedule_steps_of
from .run import Run


def announce(run: Run, precision: PrecisionChoice) -> None:
    """Print these lines, and warnings about the choice of precision and about settings without effect."""
    recipe, layout, batch = run.recipe, run.layout, run.recipe.batch
    if precision.warning:
        warn(precision.warning)
    if layout.context > 1 and recipe.train.compile and recipe.train.recompute != "none":
        warn(
            "with parallel.context, train.compile does nothing for blocks that train.recompute runs again; "
            "they stay as they are"
        )
    model = f"{_model_name(run)}, {run.engine.num_parameters:,} parameters"
    chunks = f"{batch.backprop_chunks} x " if batch.backprop_chunks > 1 else ""
    step_size = f"{batch.readers} x {batch.lanes} x {chunks}{batch.chunk} tokens a step"
    sharing = f"{run.engine.name}, " if layout.num_processes > 1 else ""
    sharing += f"{layout.context} to a sequence, " if layout.context > 1 else ""
    device = f"{counted(layout.num_processes, 'process')} on {run.accelerator.device.type}"
    reason = f" ({precision.reason})" if precision.reason else ""
    begin = f"going on from step {run.step}" if run.step else "from the beginning"
    run.report(
        f"{run.output.folder.path}: {model}, {step_size}, {device}, {sharing}{precision.precision}{reason}; "
        f"{begin}"
    )
    if note := order_note(recipe):
        run.report(note)
    for limit in recipe.model.limits:
        run.report(f"{recipe.model.family}: {limit}")
    saved = run.output.folder.saved
    if saved and (note := _learning_rate_note(recipe, saved, run.step)):
        run.report(note)


def _model_name(run: Run) -> str:
    """Our cell, or the family with what computes it; and the sizes that were searched for."""
    model, config = run.recipe.model, run.engine.module.config
    name = config.cell if model.family == OURS else f"{model.family} ({kernel_names(model.family)})"
    sizes = ", ".join(f"{field} {value}" for field, value in model.sizes.items())
    return f"{name}, {sizes}" if sizes else name


def _learning_rate_note(recipe: Recipe, saved: dict[str, Any], step: int) -> str | None:
    """How the learning rate continues, if train.steps or the schedule differs from the saved run's."""
    saved_steps, saved_schedule = saved["train"]["steps"], schedule_steps_of(saved)
    steps, schedule = recipe.train.steps, recipe.optim.schedule_steps or recipe.train.steps
    if (steps, schedule) == (saved_steps, saved_schedule) or step >= steps:
        return None
    current = learning_rate(OptimSection.model_construct(**saved["optim"]), step, saved_schedule)
    first, last = (learning_rate(recipe.optim, at, schedule) for at in (step + 1, steps))
    if first == last:
        change = f"stays at {first:.3g}"
    else:
        change = f"{'falls' if last < first else 'rises'} from {first:.3g} to {last:.3g}"
    note = (
        f"train.steps is {steps}, it was {saved_steps}: the learning rate, {current:.3g} at step {step}, "
        f"{change} until step {steps}"
    )
    if schedule < steps and recipe.optim.schedule != "constant":
        note += (
            f"; its schedule ends at step {schedule}. "
            f"--optim.schedule_steps {steps} --run.change [optim.schedule_steps] draws it anew"
        )
    return note
