"""Helpers for tests of the mirror in MLflow; its fixtures are in conftest.py."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from minrnn.pipeline.tracking import Tracker
from minrnn.pipeline.tracking_details import NO_DETAILS, RunDetails
from minrnn.pipeline.tracking_store import read_note

SECONDS = 600.0  # for anything that a busy machine may delay


def write_lines(folder: Path, *steps: int) -> None:
    """Lines of metrics.jsonl, a validation at every third step."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(
                json.dumps(
                    {"kind": "train", "step": step, "loss": 1 / step, "tokens": 10 * step, "grad_norm": None}
                )
                + "\n"
            )
            if step % 3 == 0:
                file.write(
                    json.dumps(
                        {"kind": "validation", "step": step, "loss": 2 / step, "by_length": {"8": 0.5}}
                    )
                    + "\n"
                )


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class Warnings(list):
    """The warnings of a tracker."""

    def __call__(self, message: str) -> None:
        self.append(message)

    def wait(self) -> None:
        wait_for(lambda: self)


def mirror(
    folder: Path, uri: str, status: str = "KILLED", details: RunDetails = NO_DETAILS, /, **parameters: Any
) -> list[str]:
    """Start and close a tracker; returns its warnings."""
    warnings = Warnings()
    Tracker(folder, uri, "tests", parameters, warnings, details).close(status)
    return warnings


def values_of(folder: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of `kind/name` in metrics.jsonl."""
    kind, name = key.split("/")
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry[name]) for entry in entries if entry["kind"] == kind]


def check_mirrored(folder: Path, uri: str, *keys: str) -> Any:
    """Check that MLflow has every step of metrics.jsonl once; returns the MLflow run."""
    client, note = MlflowClient(tracking_uri=uri), read_note(folder)
    assert note is not None
    for key in keys or ("train/loss", "train/tokens", "validation/loss"):
        history = client.get_metric_history(note["run_id"], key)
        assert sorted((metric.step, metric.value) for metric in history) == values_of(folder, key), key
    return client.get_run(note["run_id"])


def runs_of(uri: str, experiment: str = "tests") -> list[Any]:
    client = MlflowClient(tracking_uri=uri)
    record = client.get_experiment_by_name(experiment)
    return [] if record is None else list(client.search_runs([record.experiment_id]))
