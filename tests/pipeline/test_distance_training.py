"""Training on tasks whose documents are longer than a chunk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import Values, losses, stop_at_step_7
from transformers import AutoModelForCausalLM

from minrnn.common.errors import UserError
from minrnn.data import Task, TaskValidation, build_task
from minrnn.pipeline.recipe import build_recipe

Run = Callable[[Values], Path]
TASK = {"min_distance": 6, "max_distance": 40, "validation_examples": 5, "test_lengths": [60]}


@pytest.fixture
def far_values(values: Values) -> Values:
    """A tiny run with documents of 8 to 42 positions in chunks of 6."""
    values["data"] = {"corpus": "synthetic/distant-register", "task": TASK, "workers": 0}
    values["batch"] = {"readers": 2, "lanes": 2, "chunk": 6, "backprop_chunks": 3}
    del values["train"]["sample_tokens"]
    return values


def last_validation(folder: Path) -> dict[str, Any]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == "validation"][-1]


@pytest.mark.parametrize("carry_state", [True, False])
def test_validation_reads_documents_as_training_does(far_values: Values, run_recipe: Run, carry_state: bool):
    """State carried over the chunks of a document, or reset at each: as one pass over it would."""
    if not carry_state:
        far_values["batch"] |= {"carry_state": False, "backprop_chunks": 1}
    folder = run_recipe(far_values)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    task = build_task("synthetic/distant-register", TASK)
    assert isinstance(task, Task)
    correct: dict[str, list[bool]] = {}
    of_length: dict[int, list[bool]] = {0: [], 60: []}
    for length, chunk in TaskValidation(task, 0, 1, 1, piece=1000).chunks():
        assert chunk.distances is not None
        starts = chunk.document_starts if carry_state else np.arange(1000)[None] % 6 == 0
        with torch.no_grad():
            ids = torch.from_numpy(chunk.input_ids)
            logits = model(ids, document_starts=torch.from_numpy(starts)).logits[0]
        for i in np.flatnonzero(chunk.shift_labels[0] >= 0):
            is_correct = int(logits[i].argmax()) == chunk.shift_labels[0, i]
            of_length[length].append(is_correct)
            correct.setdefault(str(2 ** int(np.log2(chunk.distances[0, i]))), []).append(is_correct)
    entry = last_validation(folder)
    assert entry["by_distance"] == {key: pytest.approx(np.mean(own)) for key, own in correct.items()}
    assert entry["by_length"] == {"60": pytest.approx(np.mean(of_length[60]))}
    assert entry["accuracy"] == pytest.approx(np.mean(of_length[0]))


def test_a_resumed_run_goes_on_within_its_documents(
    far_values: Values, run_recipe: Run, tmp_path: Path, monkeypatch
):
    undisturbed = run_recipe(far_values)
    far_values["run"]["dir"] = str(tmp_path / "stopped")
    stop_at_step_7(far_values, run_recipe, monkeypatch)
    assert losses(run_recipe(far_values)) == losses(undisturbed)


def test_a_step_without_an_answer_has_a_loss_of_0(far_values: Values, run_recipe: Run):
    far = {"min_distance": 300, "max_distance": 300, "validation_examples": 1}  # 12 steps read 216 positions
    far_values["data"]["task"] = far
    assert {loss for _, loss in losses(run_recipe(far_values))} == {0.0}


def test_chunks_are_joined_for_long_documents_only():
    batch = {"chunk": 50, "backprop_chunks": 2}
    build_recipe({"data": {"corpus": "synthetic/distant-key"}, "batch": batch})
    with pytest.raises(UserError, match=r"backprop_chunks: .* synthetic/parity has whole examples"):
        build_recipe({"data": {"corpus": "synthetic/parity"}, "batch": batch})


def learned(run_recipe: Run, folder: Path, **batch: Any) -> dict[str, Any]:
    """The last validation of a small model, with answers that lie 2 to 8 chunks back."""
    task = {"min_distance": 64, "max_distance": 256, "num_values": 4, "num_reads": 4}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "expansion_factor": 2, "intermediate_size": 0}
    values = {
        "run": {"dir": str(folder)},
        "model": {**shape, "memory_length": 1000},
        "data": {"corpus": "synthetic/distant-register", "task": task, "workers": 0},
        "batch": {"chunk": 32, **batch},
        "optim": {"lr": 5e-3},
        "train": {"steps": 300, "log_every": 50, "precision": "fp32"},
        "tracking": {"uri": None},
    }
    return last_validation(run_recipe(values))


@pytest.mark.slow
def test_answers_beyond_a_chunk_are_learned_with_gradients_through_chunks(run_recipe: Run, tmp_path: Path):
    """Not if the state is reset at each chunk: then every answer is a guess among four."""
    far = learned(run_recipe, tmp_path / "far", lanes=8, backprop_chunks=8)
    assert min(far["by_distance"].values()) > 0.95
    reset = learned(run_recipe, tmp_path / "reset", lanes=64, carry_state=False)
    assert max(reset["by_distance"].values()) < 0.45
