"""MLflow as a mirror of metrics.jsonl. A thread sends what the MLflow run lacks; training never waits for it.

    metrics.jsonl -> whole lines behind those that were sent -> metrics whose step the MLflow run does not
    have -> log_batch

metrics.jsonl is the truth. At every connection the run is asked for the last step of each of its metrics. The
steps of a metric rise from line to line and are sent in that order, so the run has all steps up to its last
and none after it: nothing is missing and nothing twice, also after a kill -9 between a request and its
answer, and after a resume that cut metrics.jsonl back. A request that fails leads to a new connection, after
a pause that grows. What is not sent when the process leaves is sent by the next start.

mlflow.json, in the run's folder, says where the MLflow run is: `uri` (absolute, without credentials),
`recipe_uri` (as the recipe wrote it), `run_id`, and `finished_step` once everything up to this step, the
artifacts and the end of the run are there.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ..common.files import replace
from ..common.locks import lock
from .config import Recipe
from .public import public_config, text_without_credentials, without_credentials
from .recipe import flatten, resolved

NOTE = "mlflow.json"
ARTIFACTS = ("loss.png", "accuracy_by_length.png", "samples.txt")
BATCH_SECONDS = 2.0
MAX_METRICS, MAX_PARAMETERS, MAX_PARAMETER_LENGTH = (
    1000,
    100,
    6000,
)  # of one call, and of one value: MLflow's limits
LONGEST_PAUSE = 60.0
ANSWER_SECONDS, LEAVING_SECONDS = 5.0, 60.0  # leaving waits so long for one answer, and for all of them
SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]+)(.*)")
SQLITE_SUFFIXES = (
    "-journal",
    "-wal",
    "-shm",
    ".lock",
    ".building",
    ".building-journal",
)  # of files beside a database


class _LeftError(Exception):
    """The process did not wait for the thread any longer."""


class Tracker:
    """Mirrors a run to MLflow.

    Args:
        folder: the run's folder, with metrics.jsonl, cut to where the run goes on.
        uri, experiment: where to.
        parameters: the resolved configuration by key, as it is published.
        warn: is called with one line, once for each thing that goes wrong.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        experiment: str,
        parameters: dict[str, Any],
        warn: Callable[[str], object],
    ):
        self.folder, self.uri, self.experiment, self._warn = folder, uri, experiment, warn
        self.parameters = {key: str(value)[:MAX_PARAMETER_LENGTH] for key, value in parameters.items()}
        self._metrics = folder / "metrics.jsonl"
        self._begins_anew = not self._metrics.exists() or self._metrics.stat().st_size == 0
        self._client: Any = None
        self._run_id, self._offset, self._step = "", 0, 0
        self._last_steps: dict[str, int] = {}
        self._wake, self._closing = threading.Event(), threading.Event()
        self._status: str | None = None
        self._waiting_since: float | None = None
        self._left = self._complete = False
        self._reason = ""
        """Of the latest failure."""
        self._warned: set[str] = set()
        self._wake.set()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """metrics.jsonl has another line."""
        self._wake.set()

    def close(self, status: str) -> None:
        """Send what is left, the artifacts of a finished run included, and end the MLflow run as FINISHED,
        KILLED or FAILED.

        Waits at most `ANSWER_SECONDS` for one answer.
        """
        self._status, start = status, time.monotonic()
        self._closing.set()
        self._wake.set()
        while self._thread.is_alive() and not self._left:
            self._thread.join(0.05)
            asked, now = self._waiting_since, time.monotonic()
            self._left = now - start > LEAVING_SECONDS or (
                asked is not None and now - max(asked, start) > ANSWER_SECONDS
            )
        if not self._complete:
            reason = "no answer yet" if self._left else self._reason
            message = f"tracking: {without_credentials(self.uri)} did not take everything ({reason})"
            self._warn(f"{message}; the rest is in metrics.jsonl and is sent when the run is started again")

    def _work(self) -> None:
        pause = 1.0
        while not (self._complete or self._left):
            self._wake.wait()
            self._closing.wait(BATCH_SECONDS)
            self._wake.clear()
            status = self._status
            try:
                if self._client is None:
                    self._client = self._connect()
                self._send_lines()
                if status is not None:
                    self._end(status)
                pause = 1.0
            except _LeftError:
                return
            except Exception as error:  # every store raises its own; none of them may stop the training
                self._client, self._reason = None, error_line(error, self.uri)
                if status is not None:
                    return
                place = without_credentials(self.uri)
                self._warn_once(
                    "failed",
                    f"{place} failed ({self._reason}); training goes on, and what MLflow misses is sent later",
                )
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                self._wake.set()

    def _ask(self, request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The answer to a request; `close` sees how long it takes."""
        if self._left:
            raise _LeftError
        self._waiting_since = time.monotonic()
        try:
            return request(*arguments, **options)
        finally:
            self._waiting_since = None

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(f"tracking: {message}")

    def _connect(self) -> Any:
        """A client; the run that goes on, or a new one; what it has."""
        note = self._note()
        uri = _place(self.uri, note)
        if (database := sqlite_file(uri)) is not None:
            prepare_sqlite(database)
        client = open_client(uri)
        run = None if note is None else self._run_of(note, client)
        if run is None:
            run = self._begin(client)
        if run.info.run_id != self._run_id:
            self._run_id, self._offset, self._step = run.info.run_id, 0, 0
        content = {
            "uri": without_credentials(uri),
            "recipe_uri": without_credentials(self.uri),
            "run_id": self._run_id,
        }
        replace(self.folder / NOTE, json.dumps(content))
        self._send_parameters(client, run.data.params)
        if run.info.status != "RUNNING":
            self._ask(client.update_run, self._run_id, status="RUNNING")
        self._last_steps = {
            metric.key: metric.step for metric in run.data._metric_objs
        }  # public are the values alone (MLflow 3.17)
        return client

    def _note(self) -> dict[str, Any] | None:
        """What mlflow.json says about the place that the recipe names."""
        try:
            note = read_note(self.folder)
        except ValueError as error:
            self._warn_once("note", f"{error}; a new MLflow run begins, with every step of metrics.jsonl")
            return None
        return note if note is not None and _is_about(note, self.uri) else None

    def _run_of(self, note: dict[str, Any], client: Any) -> Any:
        """The MLflow run that a note names; None where it was deleted, or holds other steps than this
        training will take."""
        from mlflow.exceptions import MlflowException

        run_id, run = note["run_id"], None
        try:
            run = self._ask(client.get_run, run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        if run is None or run.info.lifecycle_stage == "deleted":
            self._warn_once(
                "deleted",
                f"the MLflow run {run_id} was deleted; a new one begins, with every step of metrics.jsonl",
            )
            return None
        known = [(key, value) for key, value in run.data.params.items() if key in self.parameters]
        differs = any(
            not self.parameters[key].startswith(value) for key, value in known
        )  # some servers cut them
        if self._begins_anew and run_id != self._run_id and differs:
            self._warn_once(
                "other",
                f"the MLflow run {run_id} was begun with other settings; training begins anew, in a new one",
            )
            return None
        return run

    def _begin(self, client: Any) -> Any:
        """A new run, in the experiment or, where that was deleted, in one with a number behind its name."""
        name, number = self.experiment, 1
        while (
            experiment := self._ask(client.get_experiment_by_name, name)
        ) is not None and experiment.lifecycle_stage == "deleted":
            number += 1
            name = f"{self.experiment}-{number}"
        if name != self.experiment:
            self._warn_once(
                "experiment", f"the MLflow experiment {self.experiment} was deleted; the run is in {name}"
            )
        experiment_id = experiment.experiment_id if experiment else self._ask(client.create_experiment, name)
        return self._ask(client.create_run, experiment_id, run_name=self.folder.resolve().name)

    def _send_parameters(self, client: Any, known: dict[str, str]) -> None:
        from mlflow.entities import Param

        missing = [Param(key, value) for key, value in self.parameters.items() if key not in known]
        for first in range(0, len(missing), MAX_PARAMETERS):
            self._ask(client.log_batch, self._run_id, params=missing[first : first + MAX_PARAMETERS])

    def _send_lines(self) -> None:
        """The whole lines behind the last that was sent; what the run has of them is left out."""
        if not self._metrics.exists():
            return
        if self._metrics.stat().st_size < self._offset:  # lines were taken back, and will be written again
            self._offset = 0
        batch, now = [], round(time.time() * 1000)
        with self._metrics.open("rb") as file:
            end = file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                metrics = self._missing(line, now)
                if len(batch) + len(metrics) > MAX_METRICS:
                    self._send(batch, end)
                    batch = []
                batch, end = batch + metrics, end + len(line)
        self._send(batch, end)

    def _send(self, batch: list[Any], end: int) -> None:
        if batch:
            self._ask(self._client.log_batch, self._run_id, metrics=batch)
        self._offset = end

    def _missing(self, line: bytes, now: int) -> list[Any]:
        """The numbers of a line that the run does not have."""
        from mlflow.entities import Metric

        try:
            entry = json.loads(line)
            kind, step = entry["kind"], entry["step"]
        except (ValueError, KeyError, TypeError):  # a disk that lost something: the other lines are good
            return []
        self._step = max(self._step, step)
        values = {
            f"{kind}/{key}": float(value)
            for key, value in entry.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
        }
        missing = {key: value for key, value in values.items() if step > self._last_steps.get(key, -1)}
        for key in missing:
            self._last_steps[key] = step
        return [Metric(key, value, now, step) for key, value in missing.items()]

    def _end(self, status: str) -> None:
        self._ask(self._client.set_terminated, self._run_id, status)
        if status == "FINISHED":
            if (config := self.folder / "config.yaml").exists():
                published = yaml.safe_dump(public_config(yaml.safe_load(config.read_text())), sort_keys=False)
                self._ask(self._client.log_text, self._run_id, published, config.name)
            for name in ARTIFACTS:
                if (self.folder / name).exists():
                    self._ask(self._client.log_artifact, self._run_id, str(self.folder / name))
            note = {**(read_note(self.folder) or {}), "finished_step": self._step}
            replace(self.folder / NOTE, json.dumps(note))
        self._complete = True


def tracker_of(folder: Path, recipe: Recipe, warn: Callable[[str], object]) -> Tracker | None:
    """The tracker of a run; None where the recipe wants none."""
    uri, experiment = recipe.tracking.resolved_uri(), recipe.tracking.experiment
    return (
        None
        if uri is None
        else Tracker(folder, uri, experiment, flatten(public_config(resolved(recipe))), warn)
    )


def send_missed(folder: Path, recipe: Recipe, step: int, warn: Callable[[str], object]) -> None:
    """Send what MLflow lacks of a run that is finished at `step`, if it may lack anything."""
    try:
        note = read_note(folder)
    except ValueError:
        note = None
    if (
        note is not None
        and note.get("finished_step") == step
        and _is_about(note, recipe.tracking.resolved_uri() or "")
    ):
        return
    if (tracker := tracker_of(folder, recipe, warn)) is not None:
        tracker.close("FINISHED")


def read_note(folder: Path) -> dict[str, Any] | None:
    """mlflow.json of a run's folder; None without one.

    Raises:
        ValueError: it is broken.
    """
    path = folder / NOTE
    if not path.exists():
        return None
    try:
        note = json.loads(path.read_text())
        if not all(isinstance(note[key], str) for key in ("uri", "run_id")):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is broken") from None
    return note


def uri_of(note: dict[str, Any]) -> str:
    """Where a note's MLflow run is, with the credentials of MLFLOW_TRACKING_URI where that names the same
    place."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if given and without_credentials(given) == without_credentials(note["uri"]) else note["uri"]


def error_line(error: Exception, *uris: str) -> str:
    """An error in one line, without the credentials of any URI."""
    message = (str(error).strip().splitlines() or [""])[0][:300]
    return text_without_credentials(f"{type(error).__name__}: {message}", *uris)


def _is_about(note: dict[str, Any], uri: str) -> bool:
    """Whether a note names the place that a recipe's URI names, with whatever credentials."""
    names = {without_credentials(name) for name in (note["uri"], note.get("recipe_uri", note["uri"]))}
    return not names.isdisjoint({without_credentials(uri), without_credentials(absolute_uri(uri))})


def _place(uri: str, note: dict[str, Any] | None) -> str:
    """Where a relative database is: where the run began, if it still is there, or else below the working
    directory."""
    if note is not None and (database := sqlite_file(note["uri"])) is not None and database.exists():
        return absolute_uri(note["uri"])
    return absolute_uri(uri)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite URI; None for any other."""
    match = SQLITE.fullmatch(uri)
    return Path(match[2]) if match and match[2] != ":memory:" else None


def absolute_uri(uri: str) -> str:
    """The URI of a SQLite database with its path from the root; any other as it is."""
    database = sqlite_file(uri)
    return (
        uri
        if database is None
        else SQLITE.sub(
            lambda match: f"{match[1]}{Path(os.path.expanduser(database)).absolute()}{match[3]}", uri
        )
    )


def open_client(uri: str) -> Any:
    """An `MlflowClient` that prints nothing, and that gives a request up after a minute instead of four: what
    calls it tries again."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }
    for name, value in defaults.items():  # MLflow reads them for each request, and has no other way
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in (
        "mlflow",
        "alembic",
        "urllib3.connectionpool",
    ):  # importing mlflow sets its own level; what fails is raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri=uri)


def prepare_sqlite(path: Path) -> None:
    """Create an MLflow database whole or not at all.

    Its first start migrates the schema step by step: a kill on the way leaves a file that never opens again,
    and two first
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
