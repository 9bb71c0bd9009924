"""MLflow mirrors metrics.jsonl, every step once, despite failures; and failures of MLflow do not stop a
run."""

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from run_helpers import Values, losses, recipe_file, stop_at_step_7
from tracking_helpers import Warnings, check_mirrored, mirror, runs_of, write_lines

from minrnn.evals.harness.results import track
from minrnn.pipeline import tracking
from minrnn.pipeline.tracking import Tracker
from minrnn.pipeline.tracking_store import read_note

Run = Callable[[Values], Path]
SECRET = "s3cret"
pytestmark = pytest.mark.usefixtures("an_answer_may_take_long")


def test_one_mlflow_run_per_training_resume_included(values: Values, run_recipe: Run, uri: str, monkeypatch):
    values["tracking"] = {"uri": uri, "experiment": "tests"}
    stop_at_step_7(values, run_recipe, monkeypatch)
    folder = run_recipe(values)
    run = check_mirrored(
        folder, uri, "train/loss", "train/tokens", "validation/loss", "validation/bits_per_byte"
    )
    assert [run.info.run_id for run in runs_of(uri)] == [run.info.run_id]
    assert run.info.status == "FINISHED"
    assert run.data.params["model.hidden_size"] == "16"
    assert run.data.params["data.corpus"] == "words.jsonl"
    assert run.data.params["run.dir"] == "run"
    client = MlflowClient(tracking_uri=uri)
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "loss.png",
        "samples.txt",
    }
    config = yaml.safe_load(Path(client.download_artifacts(run.info.run_id, "config.yaml")).read_text())
    assert config["data"]["corpus"] == "words.jsonl"


@pytest.mark.slow
def test_every_step_exists_once_after_a_kill(values: Values, run_recipe: Run, uri: str, tmp_path: Path):
    values["tracking"] = {"uri": uri, "experiment": "tests"}
    values["train"] |= {"steps": 250, "eval_every": 50, "save_every": 20}
    command = [sys.executable, "-m", "minrnn.pipeline.train", "--config", str(recipe_file(values, tmp_path))]
    for enough in (20, 60):
        process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        while (
            process.poll() is None
            and max([metric.step for run in runs_of(uri) for metric in run.data._metric_objs], default=0)
            <= enough
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    check_mirrored(run_recipe(values), uri)


def test_only_missing_metrics_are_sent(uri: str, folder: Path):
    """After a cut back to a checkpoint, and with a store that has only half of a line."""
    write_lines(folder, *range(1, 8))
    assert mirror(folder, uri) == []
    run = check_mirrored(folder, uri)
    (folder / "metrics.jsonl").unlink()
    write_lines(folder, *range(1, 5))
    assert mirror(folder, uri) == []
    write_lines(folder, *range(5, 10))
    MlflowClient(tracking_uri=uri).log_metric(run.info.run_id, "train/tokens", 80, step=8)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 10, "lo')
    assert mirror(folder, uri) == []
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: text.rindex("\n") + 1])
    check_mirrored(folder, uri)
    assert len(runs_of(uri)) == 1


def test_more_than_one_batch_is_sent_in_order(uri: str, folder: Path):
    write_lines(folder, *range(1, 901))
    assert mirror(folder, uri, **{f"key.{number}": "x" * 7000 for number in range(150)}) == []
    assert len(check_mirrored(folder, uri).data.params) == 150


def test_the_import_of_requests_prints_no_warning(uri: str, folder: Path, recwarn: pytest.WarningsRecorder):
    """Also if another thread resets the filters of warnings meanwhile, as when it leaves catch_warnings."""
    tracker = Tracker(folder, uri, "tests", {}, Warnings())
    warnings.warn("SOCKS support in urllib3 requires the installation of PySocks", stacklevel=1)
    tracker.close("KILLED")
    assert not [warning for warning in recwarn if "SOCKS" in str(warning.message)]


def test_a_failed_request_is_retried(uri: str, folder: Path, tmp_path: Path, capfd):
    database, warnings = sqlite3.connect(tmp_path / "mlflow.db"), Warnings()
    write_lines(folder, 1, 2, 3)
    database.execute("ALTER TABLE metrics RENAME COLUMN step TO away")
    tracker = Tracker(folder, uri, "tests", {}, warnings)
    warnings.wait()
    write_lines(folder, 4, 5, 6)
    tracker.notify()
    database.execute("ALTER TABLE metrics RENAME COLUMN away TO step")
    tracker.close("FINISHED")
    database.close()
    assert capfd.readouterr().err == ""
    assert len(warnings) == 1
    assert "training goes on, and what MLflow misses is sent later" in warnings[0]
    assert check_mirrored(folder, uri).info.status == "FINISHED"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://me:{SECRET}@127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["silent", "refused", "locked"])
def test_closing_does_not_wait_for_a_silent_server(
    kind: str, uri: str, folder: Path, tmp_path: Path, silent_server: str, monkeypatch
):
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 600.0)
    location = {"silent": silent_server, "refused": f"http://me:{SECRET}@127.0.0.1:9", "locked": uri}[kind]
    database = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    write_lines(folder, 1, 2, 3)
    warnings = Warnings()
    tracker = Tracker(folder, location, "tests", {}, warnings)
    tracker.close("FINISHED")
    database.execute("ROLLBACK")
    database.close()
    reason = r"no answer yet" if kind == "silent" else r"\w+: .+|no answer yet"
    assert re.search(rf"did not take everything \(({reason})\); the rest is in metrics.jsonl", warnings[-1])
    assert len(warnings) <= 2
    assert not any(SECRET in line or "\n" in line for line in warnings)
    if kind == "locked":
        tracker._thread.join()  # an exiting process would stop it here
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 60.0)
    assert mirror(folder, uri, "FINISHED") == []
    assert check_mirrored(folder, uri).info.status == "FINISHED"


@pytest.mark.parametrize("content", ["this is no database", None])
def test_the_next_start_sends_a_run_that_could_not_be_tracked(
    values: Values, run_recipe: Run, tmp_path: Path, capfd, content
):
    path = tmp_path / "broken" / "mlflow.db"
    if content is None:
        (tmp_path / "broken").write_text("a file where a folder should be")
    else:
        path.parent.mkdir()
        path.write_text(content)
    values["tracking"] = {"uri": f"sqlite:///{path}", "experiment": "tests"}
    folder = run_recipe(values)
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: tracking" in line]
    assert 1 <= len(warnings) <= 2
    assert re.search(r"did not take everything \(\w+: .+\)", warnings[-1]), (
        "it says why, however short the run is"
    )
    assert len(losses(folder)) == 12
    if content is not None:
        return
    (tmp_path / "broken").unlink()
    run_recipe(values)
    assert "is finished" in capfd.readouterr().out
    assert check_mirrored(folder, values["tracking"]["uri"]).info.status == "FINISHED"
    note = read_note(folder)
    assert note is not None
    assert note["finished_step"] == 12


@pytest.mark.parametrize("damaged", ["note", "run", "removed run", "experiment"])
def test_deleted_runs_and_damaged_notes_are_replaced_with_a_warning(
    damaged: str, uri: str, folder: Path, tmp_path: Path
):
    write_lines(folder, 1, 2, 3)
    assert mirror(folder, uri) == []
    (old,) = runs_of(uri)
    client, experiment = MlflowClient(tracking_uri=uri), "tests"
    if damaged == "note":
        (folder / "mlflow.json").write_text('{"uri": "sqli')
    elif damaged == "experiment":
        client.delete_experiment(old.info.experiment_id)
        experiment = "tests-2"
    else:
        client.delete_run(old.info.run_id)
        if damaged == "removed run":
            with sqlite3.connect(tmp_path / "mlflow.db") as database:
                for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                    database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", [old.info.run_id])
    write_lines(folder, 4, 5)
    warnings = mirror(folder, uri)
    assert len(warnings) == (2 if damaged == "experiment" else 1)
    assert ("is broken" if damaged == "note" else "was deleted") in warnings[0]
    new = check_mirrored(folder, uri)
    assert new.info.run_id != old.info.run_id
    assert new.info.run_id in [run.info.run_id for run in runs_of(uri, experiment)]
    assert mirror(folder, uri) == []


def test_a_relative_database_stays_where_the_run_was_started(
    uri: str, folder: Path, tmp_path: Path, monkeypatch
):
    write_lines(folder, 1, 2, 3)
    assert mirror(folder, "sqlite:///mlflow.db?timeout=9") == []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_lines(folder, 4, 5, 6)
    assert mirror(folder, "sqlite:///mlflow.db?timeout=9") == []
    check_mirrored(folder, uri)
    assert len(runs_of(uri)) == 1
    moved = tmp_path / "moved"  # the project, with its runs and its database
    moved.mkdir()
    shutil.move(folder, moved / "run")
    shutil.move(tmp_path / "mlflow.db", moved / "mlflow.db")
    monkeypatch.chdir(moved)
    write_lines(moved / "run", 7)
    assert mirror(moved / "run", "sqlite:///mlflow.db?timeout=9") == []
    check_mirrored(moved / "run", f"sqlite:///{moved / 'mlflow.db'}")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_new_run_with_other_settings_gets_another_mlflow_run(uri: str, folder: Path):
    write_lines(folder, 1, 2, 3)
    assert mirror(folder, uri, lr=1) == []
    write_lines(folder, 4)
    assert mirror(folder, uri, lr=2) == []  # a resumed run with a setting changed on purpose
    assert len(runs_of(uri)) == 1
    (folder / "metrics.jsonl").write_text("")
    (warning,) = mirror(folder, uri, lr=2)
    assert "other settings" in warning
    assert len(runs_of(uri)) == 2


def test_metrics_of_an_evaluation_with_a_broken_note_are_a_warning(folder: Path, capsys):
    (folder / "mlflow.json").write_text("[]")
    track(folder, {"results": {}})
    (line,) = capsys.readouterr().err.splitlines()
    assert "mlflow.json is broken" in line
