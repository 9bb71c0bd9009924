"""Changed settings, environment, commit, dataset and the model registry in MLflow; and no secret anywhere."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from run_helpers import Values, stop_at_step_7
from tracking_helpers import Warnings, check_mirrored, mirror, runs_of, wait_for, write_lines
from transformers import AutoModelForCausalLM

from minrnn.common.errors import UserError
from minrnn.launch import ui
from minrnn.pipeline import tracking
from minrnn.pipeline.recipe import build_recipe
from minrnn.pipeline.tracking_details import RunDetails, changed_tags, is_refused

Run = Callable[[Values], Path]
SECRET = "s3cret"
pytestmark = pytest.mark.usefixtures("an_answer_may_take_long")


def test_a_run_has_its_environment_dataset_and_changed_settings(
    values: Values,
    run_recipe: Run,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
):
    values["tracking"] = {"uri": uri, "experiment": "tests", "register": "tiny"}
    stop_at_step_7(values, run_recipe, monkeypatch)
    values["optim"]["lr"] = 0.25
    values["run"]["change"] = ["optim.lr"]
    folder = run_recipe(values)
    (run,) = runs_of(uri)
    assert run.data.params["optim.lr"] == "0.004"
    changes = {key: json.loads(value) for key, value in run.data.tags.items() if key.startswith("changed.")}
    assert changes == {"changed.optim.lr": [{"after_step": 4, "value": "0.25"}]}
    assert run.data.tags["environment.device"] == "cpu"
    assert run.data.tags["environment.processes"] == "1"
    assert {"environment.torch", "environment.python", "environment.minrnn"} <= run.data.tags.keys()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert run.data.tags.get("mlflow.source.git.commit", "") == head.stdout.strip()
    (dataset,) = [known.dataset for known in run.inputs.dataset_inputs]
    assert dataset.name == "words.jsonl"
    client = MlflowClient(tracking_uri=uri)
    (version,) = client.search_model_versions("name = 'tiny'")
    assert (version.run_id, version.tags) == (run.info.run_id, {"minrnn.step": "12"})
    model = client.download_artifacts(run.info.run_id, "model-12")
    assert AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).config.hidden_size == 16
    (folder / "mlflow.json").write_text(
        json.dumps({**json.loads((folder / "mlflow.json").read_text()), "finished_step": 0})
    )
    run_recipe(values)  # sends all again that is missing, which is nothing
    assert len(client.search_model_versions("name = 'tiny'")) == 1


@given(st.lists(st.sampled_from(["a", "b", "", "x" * 300]), min_size=1, max_size=8))
def test_each_change_is_recorded_once(history: list[str]):
    """However often the tracker connects between two changes."""
    known, tags, expected, last = {"key": "a"}, {}, [], "a"
    for step, value in enumerate(history):
        for _ in range(3):
            tags |= changed_tags({"key": value, "new": "1"}, known, tags, step)
        if value != last:
            expected.append({"after_step": step, "value": value})
        last = value
    assert (json.loads(tags["changed.key"]) if tags else []) == expected


def test_a_store_without_a_registry_is_a_warning(
    uri: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def missing(*arguments, **options):
        raise RestException({"error_code": "ENDPOINT_NOT_FOUND", "message": "no such endpoint"})

    monkeypatch.setattr(MlflowClient, "search_registered_models", missing)
    write_lines(folder, 1, 2, 3)
    (warning,) = mirror(folder, uri, "FINISHED", RunDetails(register="tiny"))
    assert "refuses tracking.register (the model will be in" in warning
    assert "no such endpoint" in warning
    assert check_mirrored(folder, uri).info.status == "FINISHED"


REFUSALS = ("ENDPOINT_NOT_FOUND", "PERMISSION_DENIED", "NOT_IMPLEMENTED")


@pytest.mark.parametrize(
    "code", [*REFUSALS, "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "TEMPORARILY_UNAVAILABLE"]
)
def test_only_lasting_errors_are_refusals(code: str):
    assert is_refused(RestException({"error_code": code, "message": ""})) == (code in REFUSALS)
    assert not is_refused(ConnectionError())
    assert not is_refused(MlflowException("API request failed with exception ConnectionError"))


def test_system_metrics_are_mlflows_own(uri: str, folder: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    client, key = MlflowClient(tracking_uri=uri), "system/cpu_utilization_percentage"
    for first in (1, 4):
        write_lines(folder, first, first + 1, first + 2)
        tracker = tracking.Tracker(folder, uri, "tests", {}, Warnings(), RunDetails(has_system_metrics=True))

        def has_values(count: int = first + 1) -> bool:
            return any(len(client.get_metric_history(run.info.run_id, key)) >= count for run in runs_of(uri))

        wait_for(has_values)
        tracker.close("FINISHED")
    run = check_mirrored(folder, uri)
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, key)]
    assert sorted(steps) == list(range(len(steps))), "also after a resume, each once"


def test_no_secret_of_a_uri_leaves_the_process(
    values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch, capfd
):
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.5)
    values["tracking"]["uri"] = f"http://me:{SECRET}@127.0.0.1:9/path?token={SECRET}"
    folder = run_recipe(values)
    output = capfd.readouterr()
    assert "http://127.0.0.1:9/path did not take everything" in output.err
    assert SECRET not in output.err + output.out
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_registry_needs_a_server():
    with pytest.raises(UserError, match=r"tracking\.register: names a model in MLflow's registry, but"):
        build_recipe({"tracking": {"uri": None, "register": "tiny"}})


def test_the_interface_opens_the_database_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Whatever the working directory; of several runs the newest decides."""
    started = []
    monkeypatch.setattr(ui.os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr(ui.importlib.metadata, "version", lambda name: "3")
    project = tmp_path / "project"
    with pytest.raises(UserError, match="no tracked run is in"):
        ui.main([str(project)])
    for number, name in enumerate(["old", "new"]):
        (project / "runs" / name).mkdir(parents=True)
        (project / f"{name}.db").touch()
        note = project / "runs" / name / "mlflow.json"
        note.write_text(json.dumps({"uri": f"sqlite:///{project / f'{name}.db'}", "run_id": "1"}))
        ui.os.utime(note, (number, number))
    monkeypatch.chdir(tmp_path)
    ui.main([str(project / "runs"), "--port", "5001"])
    assert started[0][1:] == [
        *("-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{project / 'new.db'}", "--port", "5001")
    ]
    (project / "new.db").unlink()
    with pytest.raises(UserError, match=r"names .*new\.db, which is not there"):
        ui.main([str(project)])
    (project / "runs" / "new" / "mlflow.json").write_text('{"uri": "https://mlflow.org", "run_id": "1"}')
    ui.main([str(project)])
    assert "https://mlflow.org" in capsys.readouterr().out
    assert len(started) == 1
