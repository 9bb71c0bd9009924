"""The MLflow run of a sweep, in which its runs are nested."""

import re
from pathlib import Path
from typing import Any

from ...common.output import warn
from ...pipeline.config import TrackingSection
from ...pipeline.public import without_credentials
from ...pipeline.tracking_parent import find_parent
from ...pipeline.tracking_store import error_line, existing_uri, open_client, sqlite_file
from .plan import sweep_id


def tracked_base(base: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Values of the base recipe, with the MLflow experiment of the sweep, its folder's name, and the parent
    of its runs. Each is left as it is if the recipe names it.

    Args:
        base: section -> field -> value.
        folder: of the sweep; its plan is published.
    """
    name = re.sub(r"['`]", "_", folder.resolve().name)
    parent = "-".join(filter(None, [name, sweep_id(folder)]))
    return {**base, "tracking": {"experiment": name, "parent": parent, **(base.get("tracking") or {})}}


def end_parent(base: dict[str, Any], settings: dict[str, Any], status: str) -> None:
    """End the MLflow run of a sweep as FINISHED or FAILED, if its runs were tracked. A failure is a warning:
    the runs have been tracked already.

    Args:
        base: from `tracked_base`.
        settings: of every run, by key.
    """
    own = {
        key.removeprefix("tracking."): value for key, value in settings.items() if key.startswith("tracking.")
    }
    tracking = TrackingSection.model_validate({**base["tracking"], **own})
    uri = tracking.resolved_uri()
    if uri is None or tracking.parent is None:
        return
    uri = existing_uri(uri, None)
    database = sqlite_file(uri)
    if database is not None and not database.exists():  # every run names another
        return
    try:
        client = open_client(uri)
        experiment = client.get_experiment_by_name(tracking.experiment)
        parent = find_parent(client, experiment.experiment_id, tracking.parent) if experiment else None
        if parent is not None:
            client.set_terminated(parent.info.run_id, status)
    except Exception as error:  # every store raises its own errors
        place = without_credentials(uri)
        warn(f"tracking: the sweep's run in {place} was not ended ({error_line(error, uri)})")
