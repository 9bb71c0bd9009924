"""The recipe of a run that resumes: the settings it keeps from its start, and those that may change."""

import dataclasses
from typing import Any

from ..common.errors import UserError
from .config import SECTIONS, Recipe
from .data_order import with_saved_order
from .families.registry import OURS
from .recipe import FIXED_ON_RESUME, MOVABLE_ON_RESUME, flatten, resolved_config

# Settings that may change on resume, because they do not affect the losses. Those of DECIDE_DROPOUT affect
# them only with dropout (`free_on_resume`).
DECIDE_DROPOUT = {"parallel.context", "train.micro_lanes"}
FREE_SECTIONS = ("tracking.", "eval.")
FREE_ON_RESUME = {
    "run.dir",
    "run.resume",
    "run.change",
    "data.workers",
    "data.retries",
    "data.retry_wait",
    "data.timeout",
    "data.cache",
    "data.validation_tokens",
    "data.trust_remote_code",
    "parallel.context",
    "model.max_position_embeddings",
    "model.limits",
    "train.steps",
    "train.device",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.save_at",
    "train.save_minutes",
    "train.keep_checkpoints",
    "train.save_in_background",
    "train.peer_timeout",
    "train.recompute",
    "train.micro_lanes",
    "train.prompts",
    "train.sample_tokens",
}

FREE_SECTIONS = ("tracking.", "push.", "eval.")  # what is done with the results


def schedule_steps_of(saved: dict[str, Any]) -> int:
    """Length of a saved run's learning rate schedule. Old runs have no schedule_steps; theirs is
    train.steps."""
    return saved["optim"].get("schedule_steps") or saved["train"]["steps"]


def with_saved_settings(recipe: Recipe, saved: dict[str, Any]) -> Recipe:
    """The recipe with the settings that a run keeps from its start, unless run.change names them.

    These are `optim.schedule_steps` where it is null, `train.precision` and `data.order` where they are auto,
    the sizes that `model.num_parameters` was resolved to, and the commits of hub datasets.

    Args:
        saved: the resolved recipe of the checkpoint to resume from; empty for a new run.
    """
    steps = recipe.optim.schedule_steps
    if steps is None:
        keeps = saved and "optim.schedule_steps" not in recipe.run.change
        steps = schedule_steps_of(saved) if keeps else recipe.train.steps
    precision = recipe.train.precision
    if saved and precision == "auto" and "train.precision" not in recipe.run.change:
        precision = saved["train"]["precision"]
    model, saved_model = recipe.model, saved.get("model", {})
    is_same = (model.family, model.num_parameters) == (
        saved_model.get("family", OURS),
        saved_model.get("num_parameters"),
    )
    if is_same and model.num_parameters and not model.sizes:
        model = model.model_copy(update={"sizes": saved_model["sizes"]})
    return dataclasses.replace(
        recipe,
        data=with_saved_order(recipe, saved).data.with_commits_of(saved.get("data", {})),
        model=model,
        optim=recipe.optim.model_copy(update={"schedule_steps": steps}),
        train=recipe.train.model_copy(update={"precision": precision}),
    )


def free_on_resume(saved: dict[str, Any]) -> set[str]:
    """Settings that do not affect the losses of a run, by its saved recipe."""
    # Each process of a context group, and each micro-batch, draws its own masks.
    model = saved["model"]
    drops = model.get("dropout") or any("dropout" in limit for limit in model.get("limits") or ())
    return FREE_ON_RESUME - (DECIDE_DROPOUT if drops else set())


def check_unchanged(saved: dict[str, Any], recipe: Recipe, folder: str) -> None:
    """Check that a run resumes with the settings it was started with. train.precision auto matches any
    precision.

    Args:
        folder: of the run, for messages.

    Raises:
        UserError: each setting that differs, affects the losses and is not named in run.change.
    """
    omitted = {"model.family": OURS, "model.num_parameters": None}  # by config.yaml
    new = omitted | flatten(resolved_config(with_saved_settings(recipe, saved)))
    # A run from before a setting was made with its default.
    old = _defaults() | omitted | flatten(saved) | {"optim.schedule_steps": schedule_steps_of(saved)}
    allowed = free_on_resume(saved) | set(recipe.run.change)
    if old["model.family"] != new["model.family"]:  # the fields of one are not those of the other
        allowed |= {key for key in new if key.startswith("model.")} - {"model.family"}
    if any(old[key] != new[key] for key in ("model.family", "data.corpus", "data.task")):
        allowed |= {"batch.carry_state", "batch.chunk"}  # their defaults follow from these
    different = [
        key
        for key in new
        if old[key] != new[key] and key not in allowed and not key.startswith(FREE_SECTIONS)
    ]

    def message(key: str) -> str:
        dropout = " (with model.dropout it decides which values are dropped)"
        reason = dropout if key in DECIDE_DROPOUT else ""
        advice = "set it back, or name another run.dir"
        if key in MOVABLE_ON_RESUME and old[key] is not None and new[key] is not None:
            advice += f", or, if the same text has only moved, say so with --run.change [{key}]"
        if not key.startswith(FIXED_ON_RESUME):
            advice += f", or accept the change with --run.change [{key}]"
        return f"is {new[key]!r}, but the run in {folder} was started with {old[key]!r}{reason}; {advice}"

    if different:
        raise UserError.from_list((key, message(key)) for key in different)


def _defaults() -> dict[str, Any]:
    """{"run.dir": ...}: the default of every setting."""
    return flatten(
        {
            section: {
                name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()
            }
            for section, cls in SECTIONS.items()
        }
    )
