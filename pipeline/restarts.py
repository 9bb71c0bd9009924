"""Restarts by an elastic launcher, ended for errors that a restart does not fix.

An elastic launcher (torchrun, accelerate launch --max_restarts) restarts all processes after any exit status.
So each process records the error that ended it in the launcher's folder, next to torchrun's own record:

    LOGS/RUN/minrnn-error-LOCAL_RANK.json     {"status", "error", "is_final"}
    LOGS/RUN/attempt_N/LOCAL_RANK/error.json  torchrun's (TORCHELASTIC_ERROR_FILE)

An error is final in two cases. It came before the processes were connected, so that only the command and its
files caused it. Or the previous attempt ended with the same error at the same step, such as a NaN that comes
back. After a final error, a restarted process exits at once with the same status, before it imports or reads
anything.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def exit_if_final() -> None:
    """Exit with the previous status, if the launcher restarted the process after a final error."""
    note = _read()
    if note.get("is_final"):
        if os.environ.get("RANK") == "0":
            print("error: training: not started again: the error above would come back", file=sys.stderr)
        raise SystemExit(note["status"])


def record_error(error: Exception, status: int) -> None:
    """Record the error that ends this process; does nothing without an elastic launcher."""
    path = _path()
    if path is None:
        return
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    is_final = not _is_connected() or _read().get("error") == text
    try:
        path.write_text(json.dumps({"status": status, "error": text, "is_final": is_final}))
    except OSError:  # then the launcher restarts the process in vain
        return


def _is_connected() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _path() -> Path | None:
    """The path of this process's record, in the launcher's folder, which is the same for all attempts."""
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
