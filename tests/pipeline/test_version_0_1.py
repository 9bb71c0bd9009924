"""A checkpoint and an export of version 0.1 resume and load with the losses and logits of that version.

`version-0.1.tar.gz` holds a run that was stopped at step 4 of 8, its corpus, the export of its last step and
what followed (expected.json). All of it was computed in fp64, so that another machine's order of additions
changes the last digits only.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import minrnn.models


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


@pytest.mark.parametrize("trust", [True, False], ids=["with its code", "with ours"])
def test_an_export_loads(expected: dict, trust: bool):
    assert minrnn.models.MinRNNConfig.model_type == "minrnn"  # registered with transformers
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float64, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=trust)
    ids = tokenizer("the state of a lane", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    np.testing.assert_allclose(logits.tolist(), expected["logits"], rtol=1e-9, atol=1e-12)
