"""TensorBoard and W&B beside MLflow: every step once, and no failure of theirs stops a run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_helpers import Values, losses, stop_at_step_7
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minrnn.common.errors import UserError
from minrnn.pipeline import other_trackers
from minrnn.pipeline.recipe import read_recipe

Run = Callable[[Values], Path]


class FakeWandb:
    """What Accelerate calls of wandb, with its rule for steps: none may be before the last."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.config = SimpleNamespace(update=lambda values, allow_val_change: None)

    def init(self, project: str, id: str, resume: str, **options: Any) -> Any:
        assert (project, resume) == ("minrnn", "allow")
        steps = self.runs.setdefault(id, {})

        def log(values: dict[str, float], step: int) -> None:
            if step >= max(steps, default=0):
                steps.setdefault(step, {}).update(values)

        return SimpleNamespace(log=log, finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(other_trackers, "_is_installed", lambda name: True)
    return fake


def test_a_resumed_run_has_each_step_once(
    values: Values, run_recipe: Run, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
):
    """It stops at step 7 and goes on from the checkpoint of step 4."""
    values["tracking"] |= {"also": ["tensorboard", "wandb"]}
    stop_at_step_7(values, run_recipe, monkeypatch)
    folder = run_recipe(values)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    (steps,) = wandb.runs.values()
    for kind in ("train", "validation"):
        expected = losses(folder, kind)
        shown = [(event.step, event.value) for event in events.Scalars(f"{kind}/loss")]
        assert shown == [(step, pytest.approx(loss)) for step, loss in expected]
        tag = f"{kind}/loss"
        assert [(step, row[tag]) for step, row in steps.items() if tag in row] == expected
    values["run"]["dir"] += "-2"
    run_recipe(values)
    assert len(wandb.runs) == 2


def test_a_failing_tracker_is_left_out(values: Values, run_recipe: Run, wandb: FakeWandb, monkeypatch, capfd):
    def refuse(**options: Any) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    values["tracking"] |= {"also": ["wandb"]}
    assert len(losses(run_recipe(values))) == 12
    warnings = [line for line in capfd.readouterr().err.splitlines() if "tracking.also" in line]
    assert warnings == [
        "warning: tracking.also: wandb failed (RuntimeError: api_key not configured); training goes on "
        "without it"
    ]


def test_a_missing_library_is_an_error_before_training(values: Values, run_recipe: Run, monkeypatch):
    monkeypatch.setattr(other_trackers, "_is_installed", lambda name: False)
    values["tracking"] |= {"also": ["wandb", "tensorboard"]}
    with pytest.raises(UserError) as raised:
        run_recipe(values)
    assert str(raised.value).splitlines() == [
        f"error: tracking.also: {name} is not installed: make setup-{name}, or pip install 'minrnn[{name}]'"
        for name in ("wandb", "tensorboard")
    ]
    assert not Path(values["run"]["dir"]).exists()


def test_the_names_are_known():
    assert read_recipe(["--tracking.also", "[tensorboard]"]).tracking.also == ["tensorboard"]
    with pytest.raises(UserError, match=r"tracking\.also: input should be 'tensorboard' or 'wandb'"):
        read_recipe(["--tracking.also", "[comet]"])


@pytest.mark.slow
def test_the_real_wandb_writes_offline(values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    values["tracking"] |= {"also": ["wandb"]}
    folder = run_recipe(values)
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert json.loads((folder / "trackers.json").read_text())["wandb"]
