"""Recipes of runs that resume: settings that may change, and settings that a run keeps from its start."""

import pytest

from minrnn.common.errors import UserError
from minrnn.pipeline.recipe import build_recipe, flatten, resolved_config
from minrnn.pipeline.recipe_on_resume import check_unchanged, with_saved_settings


def test_only_settings_that_do_not_affect_losses_may_change():
    recipe = build_recipe({"train": {"precision": "fp32"}})
    free = {
        "run.dir": "x",
        "train.device": "cpu",
        "train.steps": 5,
        "train.log_every": 3,
        "tracking.uri": None,
        "tracking.also": ["wandb"],
        "eval.tasks": ["arc_easy"],
        "data.workers": 4,
    }
    free["model.max_position_embeddings"] = 65_536  # an earlier default
    fixed = {
        "optim.lr": 1.0,
        "batch.lanes": 3,
        "model.cell": "minlstm",
        "run.seed": 3,
        "train.precision": "fp64",
        "data.join": "folder",
    }
    saved = resolved_config(recipe)
    for key, value in (free | fixed).items():
        section, name = key.split(".")
        assert flatten(saved)[key] != value
        saved[section][name] = value
    with pytest.raises(UserError) as raised:
        check_unchanged(saved, recipe, "runs/x")
    assert {key for key, _ in raised.value.errors} == fixed.keys()
    with pytest.raises(UserError) as raised:
        check_unchanged(saved, build_recipe({}), "runs/x")
    assert {key for key, _ in raised.value.errors} == fixed.keys() - {"train.precision"}, (
        "auto is what was saved"
    )


def test_a_longer_run_keeps_the_schedule_it_began_with():
    """Also if it began before the schedule was saved. A change of schedule_steps is a change like others."""
    began = resolved_config(with_saved_settings(build_recipe({"train": {"steps": 100}}), {}))
    assert began["optim"]["schedule_steps"] == 100
    older = {
        **began,
        "optim": {key: value for key, value in began["optim"].items() if key != "schedule_steps"},
    }
    for saved in (began, older):
        longer = build_recipe({"train": {"steps": 300}})
        check_unchanged(saved, longer, "runs/x")
        assert with_saved_settings(longer, saved).optim.schedule_steps == 100
        longer.run.change = ["optim.schedule_steps"]
        assert with_saved_settings(longer, saved).optim.schedule_steps == 300
        explicit = build_recipe({"train": {"steps": 300}, "optim": {"schedule_steps": 200}})
        with pytest.raises(
            UserError, match=r"optim\.schedule_steps: is 200, but the run in runs/x was started with 100"
        ):
            check_unchanged(saved, explicit, "runs/x")
        explicit.run.change = ["optim.schedule_steps"]
        check_unchanged(saved, explicit, "runs/x")


def test_context_may_change_without_dropout():
    two = {"parallel": {"context": 2}}
    check_unchanged(resolved_config(build_recipe({})), build_recipe(two), "runs/x")
    dropping = {"model": {"dropout": 0.1}}
    with pytest.raises(
        UserError, match=r"parallel\.context: is 2, .* was started with 1 \(with model\.dropout"
    ) as raised:
        check_unchanged(resolved_config(build_recipe(dropping)), build_recipe(dropping | two), "runs/x")
    assert [key for key, _ in raised.value.errors] == ["parallel.context"]
    meant = build_recipe(dropping | two | {"run": {"change": ["parallel.context"]}})
    check_unchanged(resolved_config(build_recipe(dropping)), meant, "runs/x")


def test_auto_precision_is_that_of_the_run_unless_changed():
    saved = resolved_config(build_recipe({"train": {"precision": "bf16"}}))
    assert with_saved_settings(build_recipe({}), {}).train.precision == "auto"
    assert with_saved_settings(build_recipe({}), saved).train.precision == "bf16"
    assert (
        with_saved_settings(build_recipe({"run": {"change": ["train.precision"]}}), saved).train.precision
        == "auto"
    )
    assert (
        with_saved_settings(build_recipe({"train": {"precision": "fp32"}}), saved).train.precision == "fp32"
    )
