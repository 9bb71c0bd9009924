"""A checkpoint and an export of version 0.1 resume and load with the losses and logits of that version.

`version-0.1.tar.gz` holds a run that was stopped at step 4 of 8, its corpus, the export of its last step and
what followed (expected.json). All of it was computed in fp64, so that another machine's order of additions
changes the last digits only.
"""

import dataclasses
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import minrnn.models
from minrnn.common.errors import UserError
from minrnn.pipeline.recipe import build_recipe, flatten, resolved_config
from minrnn.pipeline.recipe_on_resume import FREE_ON_RESUME, FREE_SECTIONS, check_unchanged


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What version 0.1 computed; its files are in the working directory."""
    with tarfile.open(Path(__file__).parent / "version-0.1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def test_a_checkpoint_resumes(expected: dict, run_recipe: Callable[[dict], Path]):
    folder = run_recipe(yaml.safe_load(Path("run", "config.yaml").read_text()))
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    resumed = [entry for entry in entries if entry["step"] > 4]
    kinds = [(entry["kind"], entry["step"]) for entry in resumed]
    assert kinds == [(entry["kind"], entry["step"]) for entry in expected["entries"]]
    losses = [entry["loss"] for entry in resumed]
    np.testing.assert_allclose(losses, [entry["loss"] for entry in expected["entries"]], rtol=1e-9)


def changed(value: Any) -> Any:
    """Another value of a setting."""
    if isinstance(value, bool):
        return not value
    return f"{value}-other" if isinstance(value, str) else (value or 0) + 1


def test_settings_that_the_run_did_not_have_cannot_change(expected: dict):
    saved = yaml.safe_load(Path("run", "config.yaml").read_text())
    recipe = build_recipe(saved)
    check_unchanged(saved, recipe, "run")
    newer = flatten(resolved_config(recipe)).keys() - flatten(saved).keys() - FREE_ON_RESUME
    newer = {key for key in newer if not key.startswith(FREE_SECTIONS)}
    assert {"model.ternary", "model.head_dim", "model.pooling"} <= newer
    for key in newer:
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        other = getattr(recipe, section).model_copy(update={name: changed(value)})
        with pytest.raises(UserError, match=f"{key}: is .*, but the run in run was started with"):
            check_unchanged(saved, dataclasses.replace(recipe, **{section: other}), "run")


@pytest.mark.parametrize("trust", [True, False], ids=["with its code", "with ours"])
def test_an_export_loads(expected: dict, trust: bool):
    assert minrnn.models.MinRNNConfig.model_type == "minrnn"  # registered with transformers
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float64, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=trust)
    ids = tokenizer("the state of a lane", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    np.testing.assert_allclose(logits.tolist(), expected["logits"], rtol=1e-9, atol=1e-12)
