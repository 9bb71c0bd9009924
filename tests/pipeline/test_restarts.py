"""Which errors an elastic launcher's restart repeats, and which end the restarts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import Values, recipe_file
from test_engines import ENVIRONMENT, NAN_IN_ONE, ddp, launch

from minrnn.common.errors import UserError
from minrnn.pipeline import train
from minrnn.pipeline.restarts import exit_if_final, record_error


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch) -> Any:
    """Starts an attempt of the launcher: sets the environment of its local rank 1."""

    def begin(number: int) -> None:
        folder = tmp_path / "none_x" / f"attempt_{number}" / "1"
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))

    return begin


def with_note(message: str, note: str) -> Exception:
    error = RuntimeError(message)
    error.add_note(note)
    return error


def test_an_error_before_the_processes_are_connected_is_final(attempts, capsys):
    attempts(0)
    exit_if_final()
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--train.stpes", "3"])
    assert exit_info.value.code == 2
    assert "did you mean train.steps?" in capsys.readouterr().err
    for number in (1, 2):
        attempts(number)
        with pytest.raises(SystemExit) as exit_info:
            train.main(["--train.stpes", "3"])
        assert exit_info.value.code == 2
        assert "stpes" not in capsys.readouterr().err


def test_a_later_error_is_final_when_it_repeats(attempts, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for number, (message, step) in enumerate(
        [("loss nan", 5), ("no network", 5), ("no network", 8), ("no network", 8)]
    ):
        attempts(number)
        exit_if_final()
        record_error(with_note(message, f"after step {step}"), 1)
    attempts(4)
    with pytest.raises(SystemExit) as exit_info:
        exit_if_final()
    assert exit_info.value.code == 1


@pytest.mark.parametrize("file", [None, "", os.devnull, "/nowhere/attempt_0/0/error.json"])
def test_without_an_elastic_launcher_nothing_is_recorded(monkeypatch, file: str | None):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    if file is not None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
    record_error(UserError("run.dir", "is wrong"), 2)
    exit_if_final()


@pytest.mark.slow
def test_a_user_error_is_reported_once_despite_restarts(values: Values, tmp_path: Path):
    done = launch(
        ddp(2, "--max_restarts", "3", "--monitor_interval", "0.2"),
        recipe_file(values, tmp_path),
        "--train.stpes",
        "3",
    )
    assert done.returncode != 0
    assert done.stderr.count("error: train.stpes: unknown key") == 1, done.stderr[-3000:]
    assert done.stderr.count("not started again") == 3
    assert re.search(r"exitcode *: 2", done.stderr)


@pytest.mark.slow
def test_a_repeated_nan_ends_the_restarts(values: Values, tmp_path: Path):
    """The restarts end after the second NaN at the same step, and the checkpoint before it is unchanged."""
    script = tmp_path / "nan_in_one.py"
    script.write_text(NAN_IN_ONE)
    options = ["--nproc_per_node", "2", "--max_restarts", "3", "--monitor_interval", "0.2"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        str(script),
        "--config",
        str(recipe_file(values, tmp_path)),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: training: step 5: loss nan. In reader 1: ") == 2, done.stderr[-3000:]
    assert done.stderr.count("not started again") == 2
    folder = Path(values["run"]["dir"])
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-000004"]
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
