"""Runs beside the published set-up: as published, reduced, or different."""

from typing import Any

import pytest
import yaml

from minrnn.evals.report.compare import PooledRuns, differences
from minrnn.evals.report.published import published
from minrnn.evals.report.runs import KEPT_SECTIONS, Curve, Seed
from minrnn.evals.report.sources import ResultSource
from minrnn.pipeline.recipe import build_recipe, resolved_config, shipped_recipes

LRA = {name: experiment for name, experiment in published().experiments.items() if experiment.group == "lra"}


def words(name: str, steps: int | None = None, **changes: Any) -> str:
    """How a run of a recipe of Long Range Arena differs from the published set-up, after so many steps."""
    values = yaml.safe_load(shipped_recipes()[name.replace("path-x", "pathx")].read_text())
    for key, value in changes.items():
        section, field = key.split("__")
        values[section][field] = value
    config = resolved_config(build_recipe(values))
    kept = {section: config[section] for section in KEPT_SECTIONS}
    asked = kept["train"]["steps"]
    seed = Seed(
        run="run",
        seed=0,
        steps=steps or asked,
        steps_asked=asked,
        tokens=1,
        parameters=None,
        training_seconds=None,
        not_finite=0,
        best=None,
        final=None,
        curve=Curve(train=[(1, 1.0)], validation=[]),
    )
    source: Any = ResultSource
    return str(differences(LRA[name], PooledRuns("", kept, [(seed, source)])))


@pytest.mark.parametrize("name", LRA)
def test_each_recipe_is_set_up_as_published(name: str):
    assert words(name) == "set up as published"


@pytest.mark.parametrize("name", LRA)
@pytest.mark.parametrize(
    ("section", "field", "value", "key"),
    [
        ("model", "hidden_size", 64, "model.hidden_size"),
        ("model", "num_hidden_layers", 2, "model.num_hidden_layers"),
        ("model", "intermediate_size", 0, "model.intermediate_size"),
        ("batch", "lanes", 8, "sequences_per_step"),
        ("train", "steps", 2000, "train.steps"),
    ],
)
def test_a_smaller_run_is_called_reduced(name: str, section: str, field: str, value: int, key: str):
    assert words(name, **{f"{section}__{field}": value}).startswith(f"reduced: {key} {value:,} (published ")


@pytest.mark.parametrize("name", LRA)
def test_a_run_that_was_stopped_early_is_called_reduced(name: str):
    assert words(name, steps=100).startswith("reduced: train.steps 100 (published ")


@pytest.mark.parametrize(
    ("field", "value"),
    [("bidirectional", None), ("pooling", "last"), ("conv_kernel", 0), ("preset", "default")],
)
@pytest.mark.parametrize("name", LRA)
def test_another_block_is_named(name: str, field: str, value: Any):
    value = not LRA[name].setup["model.bidirectional"] if field == "bidirectional" else value
    assert f"differs in model.{field} {value} (published" in words(name, **{f"model__{field}": value})
