"""MLflow as a mirror of metrics.jsonl: in a thread of its own, in batches, best effort.

One MLflow run per training: its id is kept in the run's folder from the start, so a resumed run goes on in it. Whatever fails is said once, and
training goes on.
"""

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .locks import lock

BATCH_SECONDS = 2.0
MAX_PARAMETERS = 100  # of one call


class Tracker:
    """Mirrors a run to MLflow.

    Args:
        folder: the run's folder; holds mlflow.json.
        uri, experiment: where to.
        parameters: the resolved configuration by key.
        warn: is called once, if tracking fails.
    """

    def __init__(self, folder: Path, uri: str, experiment: str, parameters: dict[str, Any], warn: Callable[[str], object]):
        self.folder, self.uri, self.experiment, self.parameters, self.warn = folder, uri, experiment, parameters, warn
        self._queue: queue.Queue[Callable[[Any, str], None] | dict[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, entry: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._queue.put(entry)

    def artifact(self, path: Path) -> None:
        """A file, as it is now."""
        self._queue.put(lambda client, run_id: client.log_artifact(run_id, str(path)))

    def close(self, status: str, timeout: float = 60.0) -> None:
        """Send what is left and end the run as FINISHED, KILLED or FAILED."""
        self._queue.put(lambda client, run_id: client.set_terminated(run_id, status))
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.warn(f"tracking: {self.uri} did not take everything within {timeout:.0f} s; metrics.jsonl has it all")

    def _work(self) -> None:
        try:
            client, run_id = self._connect()
            done = False
            while not done:
                items = [self._queue.get()]
                deadline = time.monotonic() + BATCH_SECONDS
                while items[-1] is not None and (wait := deadline - time.monotonic()) > 0:
                    try:
                        items.append(self._queue.get(timeout=wait))
                    except queue.Empty:
                        break
                done = items[-1] is None
                self._send(client, run_id, [item for item in items if item is not None])
        except Exception as error:  # every store raises its own; none of them may stop the training
            message = str(error).strip().splitlines()
            self.warn(f"tracking: {self.uri} failed ({type(error).__name__}: {message[0] if message else ''}); training goes on without it")

    def _connect(self) -> tuple[Any, str]:
        if self.uri.startswith("sqlite:///"):
            prepare_sqlite(Path(self.uri.removeprefix("sqlite:///")))
        client = open_client(self.uri)
        note = self.folder / "mlflow.json"
        if note.exists():
            saved = json.loads(note.read_text())
            if saved["uri"] == self.uri:
                client.set_terminated(saved["run_id"], "RUNNING")
                return client, saved["run_id"]
        experiment = client.get_experiment_by_name(self.experiment)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(self.experiment)
        run_id = client.create_run(experiment_id, run_name=self.folder.name).info.run_id
        note.write_text(json.dumps({"uri": self.uri, "run_id": run_id}))
        from mlflow.entities import Param

        params = [Param(key, str(value)) for key, value in self.parameters.items()]
        for first in range(0, len(params), MAX_PARAMETERS):
            client.log_batch(run_id, params=params[first : first + MAX_PARAMETERS])
        return client, run_id

    @staticmethod
    def _send(client: Any, run_id: str, items: list[Any]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        entries = [item for item in items if isinstance(item, dict)]
        metrics = [
            Metric(f"{entry['kind']}/{key}", float(value), now, entry["step"])
            for entry in entries
            for key, value in entry.items()
            if isinstance(value, int | float) and key != "step"
        ]
        for first in range(0, len(metrics), 1000):
            client.log_batch(run_id, metrics=metrics[first : first + 1000])
        for item in items:
            if callable(item):
                item(client, run_id)


def open_client(uri: str) -> Any:
    """An `MlflowClient` that says nothing but warnings."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # importing mlflow sets its own level
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def prepare_sqlite(path: Path) -> None:
    """Create an MLflow database whole or not at all.

    Its first start migrates the schema step by step: a kill on the way leaves a file that never opens again, and two first
    starts at once crash. So it is made under a lock, under another name, and renamed.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        lock(file, wait=True)
        if not path.exists():
            building = path.with_name(path.name + ".building")
            building.unlink(missing_ok=True)
            open_client(f"sqlite:///{building}").search_experiments()
            os.replace(building, path)
