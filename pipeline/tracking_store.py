"""Where a run's MLflow run is (mlflow.json, tracking URIs), and clients that open it."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from ..common.locks import lock
from .public import secret_parts, text_without_credentials, without_credentials

NOTE = "mlflow.json"
SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]+)(.*)")
DATABRICKS = ("databricks", "databricks-uc", "uc")
# Files beside a database.
SQLITE_SUFFIXES = ("-journal", "-wal", "-shm", ".lock", ".building", ".building-journal")


def read_note(folder: Path) -> dict[str, Any] | None:
    """The content of mlflow.json in a run's folder; None if there is none.

    Raises:
        ValueError: it is damaged.
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


def note_uri(note: dict[str, Any]) -> str:
    """The URI in mlflow.json. It gets the credentials of MLFLOW_TRACKING_URI if that names the same store."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri if uri and without_credentials(uri) == without_credentials(note["uri"]) else note["uri"]


def error_line(error: Exception, *uris: str) -> str:
    """An error as one line, without the credentials of any URI, whole or in parts: HTTP clients name the path
    and the query of a request without its scheme."""
    message = (str(error).strip().splitlines() or [""])[0]
    message = text_without_credentials(message, *uris)
    for secret in sorted({part for uri in uris for part in secret_parts(uri)}, key=len, reverse=True):
        message = message.replace(secret, "...")
    return f"{type(error).__name__}: {message[:300]}"


def is_about(note: dict[str, Any], uri: str) -> bool:
    """Whether mlflow.json names the same store as a recipe's URI, whatever the credentials."""
    names = {without_credentials(name) for name in (note["uri"], note.get("recipe_uri", note["uri"]))}
    return not names.isdisjoint({without_credentials(uri), without_credentials(absolute_uri(uri))})


def existing_uri(uri: str, note: dict[str, Any] | None) -> str:
    """The URI with an absolute path. A database that mlflow.json names is used if it exists; otherwise a
    relative path is relative to the working directory."""
    if note is not None and (database := sqlite_file(note["uri"])) is not None and database.exists():
        return absolute_uri(note["uri"])
    return absolute_uri(uri)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite URI; None for any other URI."""
    match = SQLITE.fullmatch(uri)
    return Path(match[2]) if match and match[2] != ":memory:" else None


def uri_problem(uri: str) -> str | None:
    """Why MLflow cannot open a URI, or None. The text does not repeat the URI, which may hold a password.

    A scheme that is not known here may be that of a plugin.
    """
    advice = "write sqlite:///FILE for a database, http://HOST:PORT for a server, or null for none"
    if uri.startswith("sqlite"):
        return None if SQLITE.fullmatch(uri) else f"is no SQLite database; {advice}"
    if uri.partition(":")[0] in DATABRICKS or ("://" in uri and not uri.startswith("file:")):
        return None
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return None
    return f"names no server (http://) but a folder, and MLflow no longer writes to folders; {advice}"


def absolute_uri(uri: str) -> str:
    """The URI of a SQLite database with an absolute path; any other URI unchanged."""
    database = sqlite_file(uri)
    if database is None:
        return uri
    path = Path(os.path.expanduser(database)).absolute()
    return SQLITE.sub(lambda match: f"{match[1]}{path}{match[3]}", uri)


def open_client(uri: str) -> Any:
    """An `MlflowClient` that prints nothing and gives up a request after one minute instead of four. Callers
    retry."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }
    for name, value in defaults.items():  # MLflow reads these at each request and has no other way
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # After the import, which sets levels itself. Failures are raised anyway.
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri=uri)


def prepare_sqlite(path: Path) -> None:
    """Create an MLflow database atomically.

    MLflow's first start migrates the schema step by step. A kill meanwhile leaves a file that never opens
    again, and two first starts at the same time crash. So the database is created under a lock and another
    name, and renamed.
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
