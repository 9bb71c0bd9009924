"""Every published cell trains as ours do: killed, resumed, validated, exported, reloaded, continued."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Values, losses, recipe_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minrnn.models.minimal_coefficients import MINIMAL_CELLS
from minrnn.models.registry import CELLS
from minrnn.pipeline.checkpoint import checkpoint_paths

Run = Callable[[Values], Path]


def killed_after_a_checkpoint(recipe: Path, folder: Path) -> None:
    """Train in another process, with as many threads as here, and kill it after its first checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "minrnn.pipeline.train", "--config", str(recipe)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not checkpoint_paths(folder / "checkpoints") and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in MINIMAL_CELLS])
def test_a_killed_run_of_every_cell_resumes_and_its_export_generates(
    values: Values, run_recipe: Run, tmp_path: Path, cell: str
):
    values["train"] |= {"steps": 30, "save_every": 5, "eval_every": 15, "log_every": 1, "precision": "fp32"}
    values["model"] |= {"cell": cell}
    folder = tmp_path / "killed"
    values["run"]["dir"] = str(folder)
    killed_after_a_checkpoint(recipe_file(values, tmp_path), folder)
    run_recipe(values)
    values["run"]["dir"] = str(tmp_path / "whole")
    whole = run_recipe(values)
    for kind in ("train", "validation"):
        assert losses(folder, kind) == losses(whole, kind)
    assert [step for step, _ in losses(folder)] == list(range(1, 31))
    assert losses(folder)[-1][1] < losses(folder)[0][1] - 0.5

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=True)
    assert model.config.cell == cell
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("the state", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False}
    continued = model.generate(ids, **options)
    assert torch.equal(continued, model.generate(ids, **options, use_cache=False))
