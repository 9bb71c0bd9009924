"""MLflow mirrors a run, and cannot stop it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Values, losses, stop_at_step_7
from mlflow import MlflowClient

Run = Callable[[Values], Path]


def test_one_mlflow_run_per_training_resume_included(values: Values, run_recipe: Run, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    values["tracking"] = {"uri": uri, "experiment": "tests"}
    stop_at_step_7(values, run_recipe, monkeypatch)
    folder = run_recipe(values)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["model.hidden_size"] == "16"
    history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    assert sorted(history.items()) == losses(folder)
    assert client.get_metric_history(run.info.run_id, "validation/bits_per_byte")
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} == {"config.yaml", "loss.png", "samples.txt"}


@pytest.mark.parametrize("content", ["this is no database", None])
def test_a_database_that_cannot_be_opened_is_said_once_and_training_goes_on(values: Values, run_recipe: Run, tmp_path: Path, capfd, content):
    path = tmp_path / "broken" / "mlflow.db"
    if content is None:
        (tmp_path / "broken").write_text("a file where a folder should be")
    else:
        path.parent.mkdir()
        path.write_text(content)
    values["tracking"] = {"uri": f"sqlite:///{path}"}
    folder = run_recipe(values)
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: tracking" in line]
    assert len(warnings) == 1
    assert "training goes on without it" in warnings[0]
    assert len(losses(folder)) == 12
