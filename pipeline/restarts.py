"""Errors that a restart does not cure are not met again and again.

An elastic launcher (torchrun, accelerate launch --max_restarts) starts all processes anew, whatever the
status they ended with. So each process leaves a note of the error that ended it in the launcher's folder,
next to where torchrun keeps its own:

    LOGS/RUN/minrnn-error-LOCAL_RANK.json     {"status", "error", "is_final"}
    LOGS/RUN/attempt_N/LOCAL_RANK/error.json  torchrun's (TORCHELASTIC_ERROR_FILE)

An error is final if it came before the processes were connected, since nothing but the command and its files
decides it then; or if the start before ended with the same one at the same step: a NaN that comes back, a
setting that does not fit the run. After a final error a process that is started again leaves at once, with
the same status, before it imports or reads anything.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def leave_if_final() -> None:
    """End the process as it ended before, if the launcher starts it again after an error that would only come
    back."""
    note = _read()
    if note.get("is_final"):
        if os.environ.get("RANK") == "0":
            print("error: training: not started again: the error above would come back", file=sys.stderr)
        raise SystemExit(note["status"])


def note_error(error: Exception, status: int) -> None:
    """Leave a note of the error that ends this process; does nothing without an elastic launcher."""
    path = _path()
    if path is None:
        return
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    is_final = not _connected() or _read().get("error") == text
    try:
        path.write_text(json.dumps({"status": status, "error": text, "is_final": is_final}))
    except OSError:  # then it is started again, for nothing
        return


def _connected() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _path() -> Path | None:
    """Of this process's note. The folder is the launcher's own, the same at each of its starts."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    attempt = file.parent.parent
    return (
        attempt.parent / f"minrnn-error-{file.parent.name}.json"
        if attempt.name.startswith("attempt_")
        else None
    )


def _read() -> dict[str, Any]:
    path = _path()
    try:
        return json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
