"""MLflow as a mirror of metrics.jsonl. A thread sends what the MLflow run lacks; training never waits for it.

    metrics.jsonl -> lines after the last one sent -> metrics after the MLflow run's last step -> log_batch

metrics.jsonl is the source of truth. At every connection the thread asks the MLflow run for the last step of
each metric. The steps of a metric increase from line to line and are sent in that order, so the MLflow run
has all steps up to its last and none after it. No step is missing or duplicated, even after a kill between a
request and its answer, or after a resume that cut metrics.jsonl. After a failed request the thread connects
again, with increasing pauses. What is not sent when the process exits is sent by the next start.

mlflow.json, in the run's folder, records where the MLflow run is: `uri` (absolute, without credentials),
`recipe_uri` (as in the recipe), `run_id`, and `finished_step` once the MLflow run has everything up to this
step, the artifacts and its end.
"""

import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ..common.files import write_text
from .config import Recipe
from .metrics import numbers
from .public import public_config, without_credentials
from .recipe import flatten, resolved_config
from .tracking_details import (
    NO_DETAILS,
    RunDetails,
    SystemMetrics,
    changed_tags,
    is_refused,
    register_model,
    send_dataset,
    send_tags,
)
from .tracking_parent import parent_tags
from .tracking_store import (
    NOTE,
    error_line,
    existing_uri,
    is_about,
    open_client,
    prepare_sqlite,
    read_note,
    sqlite_file,
)

ARTIFACTS = ("loss.png", "accuracy_by_length.png", "samples.txt")
BATCH_SECONDS = 2.0
# MLflow's limits: metrics and parameters per call, characters of a parameter.
MAX_METRICS, MAX_PARAMETERS, MAX_PARAMETER_LENGTH = 1000, 100, 6000
MAX_PAUSE = 60.0  # seconds between two connections
ANSWER_SECONDS, CLOSE_SECONDS = 5.0, 60.0  # how long `close` waits for one answer, and in all


class _AbandonedError(Exception):
    """The process no longer waits for the thread."""


class Tracker:
    """Mirrors a run to MLflow.

    Args:
        folder: the run's folder. Its metrics.jsonl is cut to the step that the run resumes from.
        uri, experiment: of the MLflow run.
        parameters: the resolved configuration by key, as published.
        warn: called with a message, once for each kind of failure.
        details: what is sent besides metrics and parameters.
        parent: name of the MLflow run that this one is nested in.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        experiment: str,
        parameters: dict[str, Any],
        warn: Callable[[str], object],
        details: RunDetails = NO_DETAILS,
        parent: str | None = None,
    ):
        self.folder, self.uri, self.experiment, self._warn = folder, uri, experiment, warn
        self.parent = parent
        self.parameters = {key: str(value)[:MAX_PARAMETER_LENGTH] for key, value in parameters.items()}
        self._metrics = folder / "metrics.jsonl"
        self._is_new = not self._metrics.exists() or self._metrics.stat().st_size == 0
        self._client: Any = None
        self._run_id, self._offset, self._step = "", 0, 0
        self._last_steps: dict[str, int] = {}
        self._wake, self._closing = threading.Event(), threading.Event()
        self._status: str | None = None
        self._waiting_since: float | None = None
        self._abandoned = self._complete = False
        self._reason = ""
        """Of the latest failure."""
        self._warned: set[str] = set()
        self._details, self._has_registry = details, details.register is not None
        self._system_metrics: SystemMetrics | None = None
        self._wake.set()
        # requests hides this warning of its import, but the filters of warnings are not safe between threads.
        warnings.filterwarnings("ignore", message="SOCKS support in urllib3")
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Called when metrics.jsonl has a new line."""
        self._wake.set()

    def close(self, status: str) -> None:
        """Send everything and end the MLflow run as FINISHED (with its artifacts), KILLED or FAILED.

        Waits at most `ANSWER_SECONDS` for an answer, and `CLOSE_SECONDS` in all.
        """
        self._status, start = status, time.monotonic()
        self._closing.set()
        self._wake.set()
        while self._thread.is_alive() and not self._abandoned:
            self._thread.join(0.05)
            request_start, now = self._waiting_since, time.monotonic()
            self._abandoned = now - start > CLOSE_SECONDS or (
                request_start is not None and now - max(request_start, start) > ANSWER_SECONDS
            )
        if not self._complete:
            reason = "no answer yet" if self._abandoned else self._reason
            message = f"tracking: {without_credentials(self.uri)} did not take everything ({reason})"
            self._warn(f"{message}; the rest is in metrics.jsonl and is sent when the run is started again")

    def _work(self) -> None:
        pause = 1.0
        while not (self._complete or self._abandoned):
            self._wake.wait()
            self._closing.wait(BATCH_SECONDS)
            self._wake.clear()
            status = self._status
            try:
                if self._client is None:
                    self._client = self._connect()
                self._send_lines()
                if self._system_metrics is not None and status is None:
                    self._call(self._system_metrics.keep, self._run_id)
                if status is not None:
                    self._end(status)
                pause = 1.0
            except _AbandonedError:
                return
            except Exception as error:  # every store raises its own errors; none may stop the training
                self._client, self._reason = None, error_line(error, self.uri)
                if status is not None:
                    return
                failure = f"{without_credentials(self.uri)} failed ({self._reason})"
                self._warn_once(
                    "failed", f"{failure}; training goes on, and what MLflow misses is sent later"
                )
                self._closing.wait(pause)
                pause = min(2 * pause, MAX_PAUSE)
                self._wake.set()

    def _call(self, request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The answer to a request. `close` watches how long it takes.

        Raises:
            _AbandonedError: `close` no longer waits.
        """
        if self._abandoned:
            raise _AbandonedError
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
        """Open a client and the MLflow run, a new one if there is none, and read the run's last steps."""
        note = self._note()
        uri = existing_uri(self.uri, note)
        if (database := sqlite_file(uri)) is not None:
            prepare_sqlite(database)
        client = open_client(uri)
        run = None if note is None else self._existing_run(note, client)
        if run is None:
            run = self._create_run(client)
        if run.info.run_id != self._run_id:
            self._run_id, self._offset, self._step = run.info.run_id, 0, 0
        content = {
            "uri": without_credentials(uri),
            "recipe_uri": without_credentials(self.uri),
            "run_id": self._run_id,
        }
        write_text(self.folder / NOTE, json.dumps(content))
        self._send_parameters(client, run.data.params)
        self._send_details(client, run)
        if run.info.status != "RUNNING":
            self._call(client.update_run, self._run_id, status="RUNNING")
        if self._details.has_system_metrics and self._system_metrics is None:
            self._system_metrics = SystemMetrics(uri)
        # MLflow 3.17 has no public access to the steps.
        self._last_steps = {metric.key: metric.step for metric in run.data._metric_objs}
        return client

    def _note(self) -> dict[str, Any] | None:
        """mlflow.json, if it is about the recipe's URI."""
        try:
            note = read_note(self.folder)
        except ValueError as error:
            self._warn_once("note", f"{error}; a new MLflow run begins, with every step of metrics.jsonl")
            return None
        return note if note is not None and is_about(note, self.uri) else None

    def _existing_run(self, note: dict[str, Any], client: Any) -> Any:
        """The MLflow run that mlflow.json names, or None if it was deleted or belongs to other settings."""
        from mlflow.exceptions import MlflowException

        run_id, run = note["run_id"], None
        try:
            run = self._call(client.get_run, run_id)
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
        # Some servers truncate values.
        differs = any(not self.parameters[key].startswith(value) for key, value in known)
        if self._is_new and run_id != self._run_id and differs:
            self._warn_once(
                "other",
                f"the MLflow run {run_id} was begun with other settings; training begins anew, in a new one",
            )
            return None
        return run

    def _create_run(self, client: Any) -> Any:
        """A new MLflow run in the experiment. If that was deleted, a number is appended to its name."""
        name, number = self.experiment, 1
        while (
            experiment := self._call(client.get_experiment_by_name, name)
        ) is not None and experiment.lifecycle_stage == "deleted":
            number += 1
            name = f"{self.experiment}-{number}"
        if name != self.experiment:
            self._warn_once(
                "experiment", f"the MLflow experiment {self.experiment} was deleted; the run is in {name}"
            )
        experiment_id = experiment.experiment_id if experiment else self._call(client.create_experiment, name)
        tags = self._call(parent_tags, client, experiment_id, self.parent, self.folder)
        return self._call(client.create_run, experiment_id, tags=tags, run_name=self.folder.resolve().name)

    def _send_parameters(self, client: Any, known: dict[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in self.parameters.items() if key not in known]
        for first in range(0, len(new), MAX_PARAMETERS):
            self._call(client.log_batch, self._run_id, params=new[first : first + MAX_PARAMETERS])

    def _send_lines(self) -> None:
        """Send the whole lines after the last one sent, without metrics that the MLflow run has already."""
        if not self._metrics.exists():
            return
        if self._metrics.stat().st_size < self._offset:  # lines were removed, and will be written again
            self._offset = 0
        batch, now = [], round(time.time() * 1000)
        with self._metrics.open("rb") as file:
            end = file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                metrics = self._new_metrics(line, now)
                if len(batch) + len(metrics) > MAX_METRICS:
                    self._send(batch, end)
                    batch = []
                batch, end = batch + metrics, end + len(line)
        self._send(batch, end)

    def _send(self, batch: list[Any], end: int) -> None:
        if batch:
            self._call(self._client.log_batch, self._run_id, metrics=batch)
        self._offset = end

    def _new_metrics(self, line: bytes, now: int) -> list[Any]:
        """The numbers of a line that the MLflow run does not have."""
        from mlflow.entities import Metric

        try:
            entry = json.loads(line)
            step, values = entry["step"], numbers(entry)
        except (ValueError, KeyError, TypeError):  # a damaged line; the others are good
            return []
        self._step = max(self._step, step)
        new = {key: value for key, value in values.items() if step > self._last_steps.get(key, -1)}
        for key in new:
            self._last_steps[key] = step
        return [Metric(key, value, now, step) for key, value in new.items()]

    def _send_details(self, client: Any, run: Any) -> None:
        """Send what is there once a start, and find out whether the server has a model registry."""
        details = self._details
        changed = changed_tags(self.parameters, run.data.params, run.data.tags, details.step)
        send_tags(client, run, {**details.tags, **changed}, self._call)
        if (dataset := details.dataset) is not None:
            self._if_accepted("the dataset", lambda: send_dataset(client, run, dataset, self._call))
        if self._has_registry:
            self._register(lambda: self._call(client.search_registered_models, max_results=1))

    def _register(self, request: Callable[[], object]) -> None:
        """Make requests to the model registry, until one is refused."""
        what = f"tracking.register (the model will be in {self.folder / 'model'})"
        self._has_registry = self._if_accepted(what, request)

    def _if_accepted(self, what: str, request: Callable[[], object]) -> bool:
        """Make requests for something that not every server takes; returns whether this one does."""
        try:
            request()
        except Exception as error:
            if not is_refused(error):
                raise
            reason = error_line(error, self.uri)
            self._warn_once(
                what, f"{without_credentials(self.uri)} refuses {what}: {reason}; training goes on without it"
            )
            return False
        return True

    def _end(self, status: str) -> None:
        if self._system_metrics is not None:
            self._call(self._system_metrics.stop)
        self._call(self._client.set_terminated, self._run_id, status)
        if status == "FINISHED":
            if (config := self.folder / "config.yaml").exists():
                published = yaml.safe_dump(public_config(yaml.safe_load(config.read_text())), sort_keys=False)
                self._call(self._client.log_text, self._run_id, published, config.name)
            for name in ARTIFACTS:
                if (self.folder / name).exists():
                    self._call(self._client.log_artifact, self._run_id, str(self.folder / name))
            if self._has_registry and (name := self._details.register) is not None:
                model = self.folder / "model"
                self._register(
                    lambda: register_model(self._client, self._run_id, model, name, self._step, self._call)
                )
            note = {**(read_note(self.folder) or {}), "finished_step": self._step}
            write_text(self.folder / NOTE, json.dumps(note))
        self._complete = True


def build_tracker(
    folder: Path, recipe: Recipe, warn: Callable[[str], object], details: RunDetails = NO_DETAILS
) -> Tracker | None:
    """The tracker of a run; None if the recipe has no tracking URI."""
    uri, experiment = recipe.tracking.resolved_uri(), recipe.tracking.experiment
    if uri is None:
        return None
    parameters = flatten(public_config(resolved_config(recipe)))
    return Tracker(folder, uri, experiment, parameters, warn, details, recipe.tracking.parent)


def send_missed(folder: Path, recipe: Recipe, step: int, warn: Callable[[str], object]) -> None:
    """Send what MLflow lacks of a run that is finished at `step`, unless mlflow.json records that it lacks
    nothing."""
    try:
        note = read_note(folder)
    except ValueError:
        note = None
    if (
        note is not None
        and note.get("finished_step") == step
        and is_about(note, recipe.tracking.resolved_uri() or "")
    ):
        return
    details = RunDetails(register=recipe.tracking.register, step=step)
    if (tracker := build_tracker(folder, recipe, warn, details)) is not None:
        tracker.close("FINISHED")
