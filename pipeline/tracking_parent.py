"""The MLflow run that the runs of a sweep are nested in.

It is found by a tag, and created by the first of its children that connects. They create it under a lock, so
it exists once, also if a process was killed between the request and its answer.
"""

from pathlib import Path
from typing import Any

from ..common.locks import lock

PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its pages nest the runs
NAME_TAG = "minrnn.parent"
LOCK = ".mlflow-parent.lock"


def parent_tags(client: Any, experiment_id: str, name: str | None, folder: Path) -> dict[str, str]:
    """The tags of a new MLflow run: its parent, if it has one.

    Args:
        name: of the parent, `tracking.parent`; None without one.
        folder: of the run. The lock is beside it, where all runs of a sweep are.
    """
    if name is None:
        return {}
    with (folder.resolve().parent / LOCK).open("a") as file:
        lock(file, wait=True)
        parent = find_parent(client, experiment_id, name)
        if parent is None:
            parent = client.create_run(experiment_id, tags={NAME_TAG: name}, run_name=name)
    return {PARENT_TAG: parent.info.run_id}


def find_parent(client: Any, experiment_id: str, name: str) -> Any:
    """The parent of this name in an experiment; None if there is none, or it was deleted."""
    runs = client.search_runs([experiment_id], f"tags.`{NAME_TAG}` = '{name}'", max_results=1)
    return runs[0] if runs else None
