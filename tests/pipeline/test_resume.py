"""A resumed run is bit-identical to one that never stopped."""

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from run_helpers import Crash, Values, losses

from minrnn.common import files
from minrnn.common.errors import StorageError, UserError
from minrnn.pipeline import checkpoint, loop, pauses
from minrnn.pipeline.interrupt import Interrupt
from minrnn.pipeline.metrics import read_metrics
from minrnn.pipeline.optim import learning_rate
from minrnn.pipeline.recipe import build_recipe

Run = Callable[[Values], Path]


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    original = loop.take_step

    def one_step(run: loop.Run, number: int, *arguments):
        result = original(run, number, *arguments)
        if number == step:
            act()
        return result

    monkeypatch.setattr(loop, "take_step", one_step)


def crash() -> None:
    raise Crash


@pytest.fixture
def undisturbed(values: Values, run_recipe: Run, tmp_path: Path) -> Path:
    return run_recipe({**values, "run": {"dir": str(tmp_path / "undisturbed")}})


@pytest.mark.parametrize("stops", [(1,), (5, 10), (4, 5), (11, 11), (12, 3)])
def test_crashes_leave_no_trace(
    values: Values, run_recipe: Run, undisturbed: Path, monkeypatch, stops: tuple[int, ...]
):
    for stop in stops:
        with monkeypatch.context() as patched:
            crash_at(patched, stop, crash)
            with contextlib.suppress(Crash):
                run_recipe(values)
    folder = run_recipe(values)
    for kind in ("train", "validation"):
        assert losses(folder, kind) == losses(undisturbed, kind)
    assert [step for step, _ in losses(folder)] == list(range(1, 13))
    assert (folder / "model" / "model.safetensors").read_bytes() == (
        undisturbed / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("number", "order"),
    [
        (signal.SIGTERM, "documents"),
        (signal.SIGINT, "windows"),
        (signal.SIGHUP, "documents"),
        (signal.SIGUSR1, "windows"),
    ],
)
def test_a_signal_saves_and_exits(
    values: Values, run_recipe: Run, monkeypatch, tmp_path, number: signal.Signals, order: str, capfd
):
    values["data"]["order"] = order
    undisturbed = run_recipe({**values, "run": {"dir": str(tmp_path / "undisturbed")}})
    with monkeypatch.context() as patched:
        crash_at(patched, 7, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as exit_info:
            run_recipe(values)
    assert exit_info.value.code == 128 + number
    assert "Saved step 7 of 12" in capfd.readouterr().err
    folder = Path(values["run"]["dir"])
    assert checkpoint.checkpoint_paths(folder / "checkpoints")[0].name == "step-000007"
    assert losses(run_recipe(values)) == losses(undisturbed)


def test_an_ignored_hangup_stays_ignored(values: Values, run_recipe: Run, undisturbed: Path, monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patched:
            crash_at(patched, 7, lambda: os.kill(os.getpid(), signal.SIGHUP))
            assert losses(run_recipe(values)) == losses(undisturbed)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_hangup_saves_without_a_terminal():
    """Writing to a closed terminal fails, but the step is finished and saved."""
    terminal, output = os.openpty()
    os.close(terminal)
    stderr = os.dup(2)
    with Interrupt() as interrupt:
        os.dup2(output, 2)
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.dup2(stderr, 2)
    os.close(stderr)
    os.close(output)
    assert interrupt.requested == signal.SIGHUP


def test_save_minutes(values: Values, run_recipe: Run, undisturbed: Path, monkeypatch, tmp_path: Path):
    """Without save_every, at most save_minutes are lost, here less than a step."""
    assert build_recipe({}).train.save_minutes == 15
    values["train"] |= {"save_every": None, "save_minutes": 1e-9, "save_in_background": False}
    with monkeypatch.context() as patched:
        crash_at(patched, 8, crash)
        with pytest.raises(Crash):
            run_recipe(values)
    folder = Path(values["run"]["dir"])
    assert [path.name for path in checkpoint.checkpoint_paths(folder / "checkpoints")] == [
        "step-000007",
        "step-000006",
    ]
    values["train"]["save_minutes"] = None
    assert losses(run_recipe(values)) == losses(undisturbed)
    assert checkpoint.checkpoint_paths(folder / "checkpoints")[0].name == "step-000012"
    values["run"]["dir"] = str(tmp_path / "never")
    assert [path.name for path in checkpoint.checkpoint_paths(run_recipe(values) / "checkpoints")] == [
        "step-000012"
    ]


@pytest.mark.parametrize("step", [6, 12])
def test_a_step_is_saved_before_its_validation_can_fail(
    values: Values, run_recipe: Run, undisturbed: Path, monkeypatch, step: int
):
    values["train"]["save_every"] = 6
    original = pauses.validate

    def fail(*arguments, **options):
        if (Path(values["run"]["dir"]) / "metrics.jsonl").read_text().count("train") == step:
            raise RuntimeError("no memory for this")
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(pauses, "validate", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            run_recipe(values)
    folder = Path(values["run"]["dir"])
    assert checkpoint.checkpoint_paths(folder / "checkpoints")[0].name == f"step-{step:06d}"
    run_recipe(values)
    for kind in ("train", "validation"):
        assert losses(folder, kind) == losses(undisturbed, kind)


def full_disk(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Every file of these steps' checkpoints fails in the middle."""
    original = checkpoint.write_file

    def write(path: Path, function):
        if path.name == "optimizer.safetensors" and path.parent.name in {
            f".step-{step:06d}.building" for step in steps
        }:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, function)

    monkeypatch.setattr(checkpoint, "write_file", write)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_does_not_stop_training(
    values: Values, run_recipe: Run, undisturbed: Path, monkeypatch, capfd, in_background: bool
):
    values["train"]["save_in_background"] = in_background
    folder = Path(values["run"]["dir"])
    with monkeypatch.context() as patched:
        full_disk(patched, 8)
        run_recipe(values)
    assert (
        "warning: a checkpoint could not be written: OSError: [Errno 28] No space left on device (rank 0)"
        in capfd.readouterr().err
    )
    assert [path.name for path in checkpoint.checkpoint_paths(folder / "checkpoints")] == [
        "step-000012",
        "step-000004",
    ]
    assert not list((folder / "checkpoints").glob(".*"))
    assert losses(folder) == losses(undisturbed)


def test_a_full_disk_at_the_end_is_an_error(values: Values, run_recipe: Run, undisturbed: Path, monkeypatch):
    with monkeypatch.context() as patched:
        full_disk(patched, 12)
        with pytest.raises(
            OSError,
            match=r"checkpoint of step 12 could not be written: .*No space left.*"
            r"Older checkpoints are untouched",
        ):
            run_recipe(values)
    assert losses(run_recipe(values)) == losses(undisturbed)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest"])
def test_a_damaged_checkpoint_is_reported_and_skipped(
    values: Values, run_recipe: Run, undisturbed: Path, monkeypatch, damage: str, capfd
):
    with monkeypatch.context() as patched:
        crash_at(patched, 10, crash)
        with pytest.raises(Crash):
            run_recipe(values)
    newest = Path(values["run"]["dir"]) / "checkpoints" / "step-000008"
    victim = newest / ("manifest.json" if damage == "manifest" else "optimizer.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    folder = run_recipe(values)
    message = capfd.readouterr().err
    assert "step-000008 is not used" in message
    assert victim.name in message
    assert "damaged checkpoints were renamed to step-000008.invalid-1" in message
    assert {path.name for path in newest.parent.iterdir()} == {
        "step-000008.invalid-1",
        "step-000008",
        "step-000012",
    }
    assert losses(folder) == losses(undisturbed)


def test_a_checkpoint_that_cannot_be_read_stops_the_run(values: Values, run_recipe: Run, monkeypatch):
    """It does not resume from an older one. The next start, when the disk works, resumes from the newest."""
    values["train"]["steps"] = 8
    folder = run_recipe(values)
    values["train"]["steps"] = 12
    original, before = Path.read_text, (folder / "metrics.jsonl").read_text()

    def failing(path: Path, *arguments, **options):
        if path == folder / "checkpoints" / "step-000008" / "manifest.json":
            raise OSError(errno.EIO, "Input/output error")
        return original(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(files, "RETRY_AFTER", (0.0,))
        patched.setattr(Path, "read_text", failing)
        with pytest.raises(
            StorageError, match=r"step-000008/manifest\.json cannot be read: Input/output error"
        ):
            run_recipe(values)
    assert (folder / "metrics.jsonl").read_text() == before
    assert [path.name for path in checkpoint.checkpoint_paths(folder / "checkpoints")] == [
        "step-000008",
        "step-000004",
    ]
    assert [step for step, _ in losses(run_recipe(values))] == list(range(1, 13))


def test_damaged_checkpoints_alone_are_an_error(values: Values, run_recipe: Run):
    folder = run_recipe(values)
    for path in checkpoint.checkpoint_paths(folder / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        run_recipe({**values, "train": {**values["train"], "steps": 20}})


def test_a_finished_run_continues_if_train_steps_is_raised(values: Values, run_recipe: Run, capfd):
    """At its last learning rate, or with a new schedule. The log reports which, and a later resume keeps
    it."""
    values["optim"]["schedule"] = "cosine"
    folder = run_recipe(values)
    before = (folder / "metrics.jsonl").read_text()
    run_recipe(values)
    assert "is finished: step 12 of 12" in capfd.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before
    optim = build_recipe(values).optim
    rates = [learning_rate(optim, step, 12) for step in range(1, 13)]
    values["train"]["steps"] = 15
    assert [step for step, _ in losses(run_recipe(values))] == list(range(1, 16))
    assert learning_rates(folder) == pytest.approx([*rates, *[rates[-1]] * 3])
    note = capfd.readouterr().err
    assert (
        f"train.steps is 15, it was 12: the learning rate, {rates[-1]:.3g} at step 12, stays at "
        f"{rates[-1]:.3g} until step 15" in note
    )
    values["train"]["steps"], values["run"]["change"] = 18, ["optim.schedule_steps"]
    run_recipe(values)
    anew = [learning_rate(optim, step, 18) for step in (16, 17, 18)]
    assert learning_rates(folder)[15:] == pytest.approx(anew)
    assert (
        f"{rates[-1]:.3g} at step 15, falls from {anew[0]:.3g} to {anew[-1]:.3g} until step 18"
        in capfd.readouterr().err
    )
    values["train"]["steps"], values["run"]["change"] = 19, []
    assert learning_rates(run_recipe(values))[18:] == pytest.approx(anew[-1:]), (
        "the schedule is that of 18 steps now"
    )


def learning_rates(folder: Path) -> list[float]:
    return [entry["lr"] for entry in read_metrics(folder / "metrics.jsonl") if entry["kind"] == "train"]


def test_a_run_killed_before_its_export_is_finished_by_the_next_start(
    values: Values, run_recipe: Run, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(loop, "finish", lambda run: crash())
        with pytest.raises(Crash):
            run_recipe(values)
    folder = run_recipe(values)
    assert (folder / "model" / "config.json").exists()
    assert [step for step, _ in losses(folder, "validation")] == [6, 12]


def test_resume_modes(values: Values, run_recipe: Run):
    values["run"]["resume"] = "must"
    with pytest.raises(UserError, match="holds no valid checkpoint"):
        run_recipe(values)
    values["run"]["resume"] = "never"
    run_recipe(values)
    with pytest.raises(UserError, match="already holds step-000012"):
        run_recipe(values)


def test_changed_settings_are_refused_unless_named_in_run_change(values: Values, run_recipe: Run):
    folder = run_recipe(values)
    values["optim"]["lr"], values["model"]["hidden_size"], values["train"]["steps"] = 1e-3, 32, 14
    with pytest.raises(UserError) as refused:
        run_recipe(values)
    assert [key for key, _ in refused.value.errors] == ["model.hidden_size", "optim.lr"]
    assert "0.004" in str(refused.value)
    values["model"]["hidden_size"] = 16
    values["run"]["change"] = ["optim.lr"]
    run_recipe(values)
    assert len(losses(folder)) == 14


def test_two_runs_cannot_share_a_folder(values: Values, run_recipe: Run, monkeypatch):
    refused = []

    def second() -> None:
        with pytest.raises(UserError, match="another process is training") as error:
            run_recipe(values)
        refused.append(error.value)

    with monkeypatch.context() as patched:
        crash_at(patched, 3, second)
        run_recipe(values)
    assert len(refused) == 1


@pytest.mark.parametrize("order", ["documents", "windows"])
def test_a_run_does_not_resume_on_another_corpus(order: str, values: Values, run_recipe: Run, tmp_path: Path):
    """Text that was changed, cut or prepended is an error. Appended text is a warning, and checkpoints
    without a fingerprint resume."""
    corpus = tmp_path / "corpus.jsonl"
    original = Path(values["data"]["corpus"]).read_bytes()
    corpus.write_bytes(original)
    values["data"] |= {"corpus": str(corpus), "order": order}
    values["train"] |= {"steps": 2, "save_every": None, "eval_every": None}
    folder = run_recipe(values)
    values["train"]["steps"] = 3
    at = original.rindex(b'"text": "') + len(b'"text": "')
    for changed in (
        original[:at] + b"#" + original[at + 1 :],
        original[:-200],
        b'{"text": "new"}\n' + original,
    ):
        corpus.write_bytes(changed)
        with pytest.raises(
            UserError,
            match=r"^error: data\.corpus: .*corpus\.jsonl is not what the run began with: "
            r"corpus\.jsonl .*run\.dir",
        ):
            run_recipe(values)
    corpus.write_bytes(original + b'{"text": "more"}\n')
    if order == "windows":
        with pytest.raises(UserError, match="has grown"):
            run_recipe(values)
        corpus.write_bytes(original)
    run_recipe(values)
    assert [step for step, _ in losses(folder)] == [1, 2, 3]
