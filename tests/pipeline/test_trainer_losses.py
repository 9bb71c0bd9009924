"""`MinRNNTrainer` on the rows of a run gives the losses of the run."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import Values, losses
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from minrnn.models.trainer import MinRNNTrainer
from minrnn.pipeline import loop
from minrnn.pipeline.optim import build_optimizer, learning_rate
from minrnn.pipeline.recipe import build_recipe


class Rows(IterableDataset):
    """The rows of all readers' chunks, step by step."""

    def __init__(self, steps: list[list[Any]]) -> None:
        self.steps = steps

    def __iter__(self):
        for chunks in self.steps:
            for chunk in chunks:
                for lane in range(len(chunk.input_ids)):
                    yield {
                        "input_ids": torch.from_numpy(chunk.input_ids[lane]),
                        "shift_labels": torch.from_numpy(chunk.shift_labels[lane]),
                        "document_starts": torch.from_numpy(chunk.document_starts[lane]),
                    }


def test_a_trainer_gives_the_losses_of_the_loop(
    values: Values,
    run_recipe: Callable[[Values], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    """Two readers of two lanes are a batch of four rows; the same optimizer and schedule."""
    values["model"] |= {"dropout": 0.0, "learn_h0": True}
    values["train"] |= {"eval_every": None, "save_every": None, "steps": 8}
    steps: list[list[Any]] = []
    models: list[Any] = []
    original = loop.take_step

    def recorded(run: loop.Run, number: int, batch: list[Any], num_scored: float):
        if not models:
            models.append(copy.deepcopy(run.accelerator.unwrap_model(run.engine.module)))
        steps.append(copy.deepcopy(batch))
        return original(run, number, batch, num_scored)

    monkeypatch.setattr(loop, "take_step", recorded)
    expected = losses(run_recipe(values))
    recipe = build_recipe(values)
    optimizer = build_optimizer(models[0], recipe.optim)
    rate = recipe.optim.lr
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(recipe.optim, step + 1, 8) / rate
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=8,
        per_device_train_batch_size=4,
        max_grad_norm=recipe.optim.clip or 0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MinRNNTrainer(
        model=models[0], args=arguments, train_dataset=Rows(steps), optimizers=(optimizer, schedule)
    )
    trainer.train()
    actual = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
