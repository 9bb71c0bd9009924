"""What a run's MLflow run has besides metrics: parameters that changed, the environment, the commit, the
dataset, and the exported model in the model registry.

All of it can be sent again without a second copy: tags replace their value, and what is there is not sent.
"""

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .config import Recipe
from .machine import device_name, num_cores
from .public import public_config

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "numba", "deepspeed")
MAX_TAG_LENGTH = 5000  # characters, of the oldest servers
MAX_TAGS = 100  # of a request
NOT_LOGGED_AS_CHANGED = ("run.change", "run.resume")
Call = Callable[..., Any]
"""Calls a function of MLflow's client with its arguments."""


@dataclass(frozen=True)
class RunDetails:
    """What is sent once at each start."""

    tags: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, str] | None = None
    """Name, digest, source_type and source, as MLflow's `Dataset` takes them."""
    step: int = 0
    """That the run resumes from."""
    register: str | None = None
    """Name in the model registry."""
    has_system_metrics: bool = False


NO_DETAILS = RunDetails()


def run_details(
    recipe: Recipe, device: torch.device, num_processes: int, corpus: dict[str, Any] | None, step: int
) -> RunDetails:
    """The details of a run at its start.

    Args:
        corpus: its fingerprint.
    """
    return RunDetails(
        tags=environment(device, num_processes) | commit_tags(),
        dataset=dataset_of(recipe, corpus),
        step=step,
        register=recipe.tracking.register,
        has_system_metrics=recipe.tracking.system_metrics,
    )


def environment(device: torch.device, num_processes: int) -> dict[str, str]:
    """Versions and hardware, as tags. No host names, no paths."""
    versions = {"python": platform.python_version()}
    for package in ("minrnn", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware = {
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "cores": str(num_cores()),
        "processes": str(num_processes),
    }
    return {f"environment.{name}": value for name, value in {**versions, **hardware}.items()}


def commit_tags() -> dict[str, str]:
    """The commit of the checkout that this code is run from, under the key that MLflow's interface shows;
    empty for an installed package."""
    file = Path(__file__).resolve()
    git = ["git", "-C", str(file.parent)]

    def output(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        output("ls-files", "--error-unmatch", file.name)  # an environment may lie in another's checkout
        commit = output("rev-parse", "HEAD")
        is_changed = bool(output("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": commit, "environment.commit_is_changed": str(is_changed).lower()}


def dataset_of(recipe: Recipe, corpus: dict[str, Any] | None) -> dict[str, str]:
    """The corpus as MLflow's dataset: its public name, and a digest of its settings and its fingerprint."""
    names = ("corpus", "subset", "split", "revision", "commit", "template", "filter", "task", "join")
    settings = public_config(recipe.data.model_dump(mode="json", include=set(names)))
    content = json.dumps([settings, corpus], sort_keys=True, default=str)
    public_name = settings["corpus"] if isinstance(settings["corpus"], str) else "mixture"
    return {
        "name": public_name[-500:],
        "digest": hashlib.sha256(content.encode()).hexdigest()[:16],
        "source_type": "minrnn",
        "source": json.dumps({name: value for name, value in settings.items() if value not in (None, {})}),
    }


def changed_tags(
    parameters: Mapping[str, str], known: Mapping[str, str], tags: Mapping[str, str], step: int
) -> dict[str, str]:
    """Tags for parameters that differ from the MLflow run's, whose own parameters can never change.

    The tag `changed.KEY` is a JSON list of {"after_step", "value"}, one for each change.

    Args:
        known, tags: of the MLflow run.
        step: that the run resumes from.
    """
    new = {}
    for key, value in parameters.items():
        if key not in known or key in NOT_LOGGED_AS_CHANGED:
            continue
        name = f"changed.{key}"
        changes = json.loads(tags[name]) if name in tags else []
        last = changes[-1]["value"] if changes else known[key]
        if value == last or (len(last) >= 250 and value.startswith(last)):  # some servers truncate values
            continue
        changes.append({"after_step": step, "value": value[:1000]})
        while len(text := json.dumps(changes)) > MAX_TAG_LENGTH:
            changes.pop(0)
        new[name] = text
    return new


def send_tags(client: Any, run: Any, tags: dict[str, str], call: Call) -> None:
    """Send the tags that an MLflow run lacks or has with another value."""
    from mlflow.entities import RunTag

    cut = {name: value[:MAX_TAG_LENGTH] for name, value in tags.items()}
    new = [RunTag(name, value) for name, value in cut.items() if run.data.tags.get(name) != value]
    for first in range(0, len(new), MAX_TAGS):
        call(client.log_batch, run.info.run_id, tags=new[first : first + MAX_TAGS])


def send_dataset(client: Any, run: Any, dataset: dict[str, str], call: Call) -> None:
    """Send the dataset, unless the MLflow run has it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = run.inputs.dataset_inputs if run.inputs is not None else []
    if all(known.dataset.digest != dataset["digest"] for known in inputs):
        new = DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", "training")])
        call(client.log_inputs, run.info.run_id, datasets=[new])


def is_refused(error: Exception) -> bool:
    """Whether a request failed for good: the server does not know it, or does not allow it."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return False
    status = error.get_http_status_code()
    return (400 <= status < 500 and status not in (408, 429)) or status == 501


def register_model(client: Any, run_id: str, model: Path, name: str, step: int, call: Call) -> None:
    """Log an exported model and make it a version in the model registry, unless it is one already.

    Raises:
        MlflowException: see `is_refused`.
    """
    from mlflow.exceptions import MlflowException

    tag = {"minrnn.step": str(step)}
    versions = call(client.search_model_versions, f"run_id = '{run_id}'")
    if any(version.name == name and version.tags.get("minrnn.step") == str(step) for version in versions):
        return
    try:
        call(client.create_registered_model, name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    folder = f"model-{step}"
    call(client.log_artifacts, run_id, str(model), folder)
    source = f"{call(client.get_run, run_id).info.artifact_uri}/{folder}"
    call(client.create_model_version, name, source, run_id, tags=tag, await_creation_for=0)


class SystemMetrics:
    """MLflow's own monitor of CPU, memory, disk, network and GPUs (with nvidia-ml-py), every 10 seconds.

    Its thread ends at the first failed request, so `keep` starts another one, which continues its steps.
    """

    def __init__(self, uri: str):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._new_monitor = functools.partial(SystemMetricsMonitor, resume_logging=True, tracking_uri=uri)
        self._monitor: Any = None

    def keep(self, run_id: str) -> None:
        """Start the monitor of an MLflow run if it does not run."""
        if self._monitor is not None and self._monitor._run_id == run_id:
            thread = self._monitor._process
            if thread is not None and thread.is_alive():
                return
        elif self._monitor is not None:
            self._monitor._shutdown_event.set()  # of a run that was deleted
        self._monitor = self._new_monitor(run_id)
        self._monitor.start()

    def stop(self) -> None:
        """Send what it has and end it."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
