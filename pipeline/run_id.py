"""The id of a run, by which a repository of the hub knows whose model it holds.

It is made when a run begins and kept in its folder, in .run.json. A run that begins anew in the same folder
is another run.
"""

import json
import uuid
from pathlib import Path

from ..common.files import write_text

RUN_ID = ".run.json"


def new_run_id() -> str:
    """An id for a run that begins."""
    return uuid.uuid4().hex


def read_run_id(run: Path) -> str | None:
    """The id of a run; None if it has none, as runs of earlier versions."""
    try:
        return str(json.loads((run / RUN_ID).read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_run_id(run: Path, run_id: str) -> None:
    """Keep the id of a run."""
    write_text(run / RUN_ID, json.dumps({"id": run_id}) + "\n")
