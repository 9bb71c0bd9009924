"""train.micro_lanes changes the memory of a step and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from run_helpers import Values, losses
from safetensors.numpy import load_file

from minrnn.common.errors import UserError
from minrnn.pipeline.checkpoint import checkpoint_paths
from minrnn.pipeline.launch_checks import layout_errors
from minrnn.pipeline.recipe import build_recipe, resolved_config
from minrnn.pipeline.recipe_on_resume import check_unchanged

Run = Callable[[Values], Path]
TASK = {"max_length": 20, "test_lengths": [20], "validation_examples": 6}


def assert_same_run(folder: Path, expected: Path, tolerance: float) -> None:
    """Losses, weights, moments, positions and carried states agree."""
    for kind in ("train", "validation"):
        np.testing.assert_allclose(losses(folder, kind), losses(expected, kind), rtol=tolerance)
    newest, other = (checkpoint_paths(path / "checkpoints")[0] for path in (folder, expected))
    for path in other.glob("*.safetensors"):
        tensors, others = load_file(newest / path.name), load_file(path)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(tensor, others[name], rtol=1e-5, atol=1e3 * tolerance, err_msg=name)
    for path in other.glob("reader-*.json"):
        assert json.loads((newest / path.name).read_text()) == json.loads(path.read_text())


@pytest.mark.parametrize("task", [None, "synthetic/parity"])
def test_micro_batches_of_any_size_make_the_same_run(
    task: str | None, values: Values, run_recipe: Run, tmp_path: Path
):
    values["model"]["dropout"] = 0.0
    values["train"] |= {"precision": "fp64", "steps": 5, "eval_every": None, "save_every": None}
    if task is not None:  # not every position is scored
        values["data"] = {"corpus": task, "task": TASK, "workers": 0}
        del values["train"]["sample_tokens"]
    values["batch"]["lanes"] = 4
    whole = run_recipe(values)
    for micro_lanes in (1, 2):
        values["run"]["dir"] = str(tmp_path / f"{micro_lanes}")
        values["train"]["micro_lanes"] = micro_lanes
        assert_same_run(run_recipe(values), whole, 1e-10)


def test_a_micro_batch_of_all_lanes_is_the_default(values: Values, run_recipe: Run, tmp_path: Path):
    """To the bit, dropout included."""
    values["train"] |= {"steps": 3, "eval_every": None, "save_every": None}
    default = run_recipe(values)
    values["run"]["dir"], values["train"]["micro_lanes"] = str(tmp_path / "all"), 2
    assert losses(run_recipe(values)) == losses(default)


def test_it_may_change_on_resume_without_dropout():
    one = {"train": {"micro_lanes": 4}}
    check_unchanged(resolved_config(build_recipe({})), build_recipe(one), "runs/x")
    dropping = {"model": {"dropout": 0.1}}
    with pytest.raises(UserError, match=r"train\.micro_lanes: is 4, .* was started with None \(with model"):
        check_unchanged(resolved_config(build_recipe(dropping)), build_recipe(dropping | one), "runs/x")
    family = resolved_config(build_recipe({"model": {"family": "gpt2"}, **one}))
    family["model"]["limits"] = ["trains with dropout: resid_pdrop 0.1"]
    with pytest.raises(UserError, match=r"train\.micro_lanes"):
        check_unchanged(family, build_recipe({"model": {"family": "gpt2"}}), "runs/x")


def test_it_divides_the_lanes():
    recipe = build_recipe({"batch": {"lanes": 6}, "train": {"micro_lanes": 4}})
    assert layout_errors(recipe, 1) == [
        ("train.micro_lanes", "4 does not divide batch.lanes 6; use 1 or 2 or 3 or 6")
    ]
