"""Pushes beside training: checked before the first step, started at saves, never waited for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import READ_TOKEN, LocalHub
from run_helpers import Values, losses

from minrnn.common.errors import UserError
from minrnn.pipeline.push import beside
from minrnn.pipeline.push.beside import Pusher, check_push
from minrnn.pipeline.push.target import MARKER
from minrnn.pipeline.recipe import build_recipe, resolved_config
from minrnn.pipeline.recipe_on_resume import check_unchanged

Run = Callable[[Values], Path]


class Worker:
    """A process that ends when a test says so, with what it prints."""

    def __init__(self, argument: dict[str, Any], output: Any):
        self.argument, self.output = argument, output
        self.returncode: int | None = None

    def finish(self, **result: Any) -> None:
        self.output.write(json.dumps(result).encode() + b"\n")
        self.returncode = 0

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        if self.returncode is None:
            self.finish(kind="outage", error="no answer")
        return self.returncode

    def terminate(self) -> None:
        self.returncode = -15


class Process:
    """A run with a pusher whose workers are `Worker`."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, every: int):
        self.workers: list[Worker] = []
        self.warnings: list[str] = []
        self.reports: list[str] = []
        patch.setattr(beside.subprocess, "Popen", self._start)
        recipe = build_recipe(
            {"push": {"repo": "me/model", "every": every}, "data": {"trust_remote_code": True}}
        )
        self.folder = folder
        self.pusher = Pusher(recipe, folder, 0, self.warnings.append, self.reports.append)

    def _start(self, words: list[str], stdout: Any, **options: Any) -> Worker:
        self.workers.append(Worker(json.loads(words[-1]), stdout))
        return self.workers[-1]

    def save(self, step: int) -> None:
        (self.folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)


@settings(max_examples=30)
@given(
    saves=st.lists(st.integers(1, 60), min_size=1, max_size=12, unique=True).map(sorted),
    every=st.integers(1, 20),
    seconds=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_one_push_at_a_time_of_the_newest_checkpoint_once_a_multiple(
    saves: list[int], every: int, seconds: list[int], tmp_path_factory: pytest.TempPathFactory
):
    """`seconds`: how many saves later a push ends."""
    with pytest.MonkeyPatch.context() as patch:
        run = Process(tmp_path_factory.mktemp("run"), patch, every)
        pushed, ends = [], -1
        for index, step in enumerate(saves):
            run.save(step)
            if run.workers and run.workers[-1].returncode is None and index >= ends:
                run.workers[-1].finish(message="pushed", warning=None, step=pushed[-1])
            before = len(run.workers)
            run.pusher.update(step)
            if len(run.workers) > before:
                pushed.append(step)
                ends = index + seconds[index]
        names = [Path(worker.argument["checkpoint"]).name for worker in run.workers]
        assert names == [f"step-{step:06d}" for step in pushed]
        assert all(
            last // every > before // every for before, last in zip([0, *pushed], pushed, strict=False)
        )
        if not any(seconds):
            expected, last = [], 0
            for step in saves:
                if step // every > last // every:
                    expected.append(step)
                    last = step
            assert pushed == expected
        assert run.warnings == []


def test_a_failure_is_a_warning_once_of_each_kind(tmp_path: Path, monkeypatch):
    run = Process(tmp_path, monkeypatch, every=1)
    for step, kind in enumerate(["outage", "outage", "token", "busy", "outage"], start=1):
        run.save(step)
        run.pusher.update(step)
        run.workers[-1].finish(kind=kind, error=f"a {kind}")
    run.save(6)
    run.pusher.update(6)
    run.workers[-1].returncode = 1
    run.pusher.push_last(6)
    crash = "push: its process ended with status 1: no message"
    goes_on = "; training goes on, and the next push tries again"
    command = f"`minrnn push {tmp_path} --repo me/model --trust-remote-code` finishes it"
    assert run.warnings == [
        f"push: a outage{goes_on}",
        f"push: a token{goes_on}",
        f"{crash}{goes_on}",
        f"push: no answer; {command}",
    ]
    assert not (tmp_path / beside.LINKS).exists()


def test_a_checkpoint_that_the_run_removes_is_still_pushed(tmp_path: Path, monkeypatch):
    run = Process(tmp_path, monkeypatch, every=1)
    run.save(1)
    weights = tmp_path / "checkpoints" / "step-000001" / "model.safetensors"
    weights.write_bytes(b"weights")
    run.pusher.update(1)
    weights.unlink()
    assert (Path(run.workers[0].argument["checkpoint"]) / "model.safetensors").read_bytes() == b"weights"
    run.pusher.close()
    assert run.workers[0].returncode == -15
    assert not (tmp_path / beside.LINKS).exists()


def test_a_push_that_cannot_be_noted_is_a_push(tmp_path: Path, monkeypatch):
    run = Process(tmp_path, monkeypatch, every=1)
    run.save(1)
    (tmp_path / beside.NOTE).mkdir()
    monkeypatch.setattr(
        Worker, "wait", lambda worker: worker.finish(message="pushed", warning="kept", step=1)
    )
    run.pusher.push_last(1)
    kept, warning = run.warnings
    assert run.reports == ["pushed"]
    assert kept == "push: kept"
    assert warning.startswith("push: push.json cannot be written (")


def test_a_last_push_that_is_interrupted_ends_the_one_before_it(tmp_path: Path, monkeypatch):
    run = Process(tmp_path, monkeypatch, every=1)
    run.save(1)
    run.pusher.update(1)

    def interrupt(worker: Worker) -> None:
        if worker.returncode is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.pusher.push_last(2)
    (warning,) = run.warnings
    assert warning.startswith("push: it was interrupted; `minrnn push ")
    assert run.workers[0].returncode == -15
    assert not (tmp_path / beside.LINKS).exists()


def test_the_worker_is_no_rank_of_the_training(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    environment = beside._environment()
    assert not {"RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_settings_without_a_repository_and_refused_names_are_errors():
    with pytest.raises(UserError) as error:
        build_recipe({"push": {"every": 5, "private": True}})
    assert [key for key, _ in error.value.errors] == ["push.every", "push.private"]
    never_saved = {"save_every": None, "save_minutes": None}
    with pytest.raises(
        UserError, match=r"push.every: pushes checkpoints, but none is written before the end"
    ):
        build_recipe({"push": {"repo": "me/model", "every": 5}, "train": never_saved})
    with pytest.raises(UserError, match=r"push.repo: .*alphanumeric.*Write USER/NAME"):
        build_recipe({"push": {"repo": "me/mo del"}})


def test_pushes_may_change_on_resume():
    saved = resolved_config(build_recipe({}))
    check_unchanged(saved, build_recipe({"push": {"repo": "me/model", "every": 3}}), "run")
    del saved["push"]  # a run of an earlier version
    check_unchanged(saved, build_recipe({"push": {"repo": "me/model"}}), "run")


def test_a_run_that_may_not_push_takes_no_step(values: Values, run_recipe: Run, hub: LocalHub, monkeypatch):
    values["push"] = {"repo": "me/model"}
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(UserError, match=r"push.repo: the token 'test' may only read"):
        run_recipe(values)
    assert not (Path(values["run"]["dir"]) / "metrics.jsonl").exists()
    assert hub.repositories == {}


def test_a_hub_that_does_not_answer_stops_only_a_new_run(hub: LocalHub):
    hub.fault = lambda method, path: 0
    recipe, warnings = build_recipe({"push": {"repo": "me/model"}}), []
    with pytest.raises(UserError, match="the hub cannot be reached"):
        check_push(recipe, "id", False, warnings.append)
    check_push(recipe, "id", True, warnings.append)
    (warning,) = warnings
    assert warning.startswith("push: the hub cannot be reached")


@pytest.mark.slow
def test_a_run_pushes_its_checkpoints_and_its_end(
    values: Values, run_recipe: Run, hub: LocalHub, monkeypatch, capsys
):
    """The first push fails. Losses are those of a run without pushes."""
    values["push"] = {"repo": "me/model", "every": 4, "private": True}
    values["train"] |= {"save_in_background": False}
    faults = iter([500])
    hub.fault = lambda method, path: next(faults, None) if "/commit/" in path else None
    original = Pusher.update

    def update(pusher: Pusher, newest: int | None) -> None:
        """As the loop of a run whose steps take longer than a push."""
        if pusher._worker is not None:
            pusher._worker.wait()
        original(pusher, newest)

    monkeypatch.setattr(Pusher, "update", update)
    folder = run_recipe(values)
    stderr = capsys.readouterr().err
    repository = hub.repositories["me/model"]
    assert repository.private
    assert stderr.count("warning: push:") == 1
    assert "training goes on" in stderr
    files = hub.files("me/model")
    assert json.loads(files[MARKER])["step"] == 12
    assert "training/samples.txt" in files
    assert repository.messages[-1] == "Step 12"
    pushed_losses = losses(folder)
    values["run"]["dir"] += "-alone"
    del values["push"]
    assert losses(run_recipe(values)) == pushed_losses


@pytest.mark.slow
def test_a_finished_run_pushes_what_could_not_be_pushed(
    values: Values, run_recipe: Run, hub: LocalHub, capsys
):
    values["push"] = {"repo": "me/model"}
    hub.fault = lambda method, path: 500 if "/commit/" in path else None
    folder = run_recipe(values)
    assert f"`minrnn push {folder} --repo me/model` finishes it" in capsys.readouterr().err
    assert hub.files("me/model") == {}
    hub.fault = lambda method, path: None
    for _ in range(2):
        run_recipe(values)
    assert json.loads(hub.files("me/model")[MARKER])["step"] == 12
    assert hub.repositories["me/model"].messages == ["", "Step 12"]
    assert capsys.readouterr().out.count("pushed to me/model") == 1
