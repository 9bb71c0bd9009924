"""`minrnn ui`: MLflow's interface on the database that runs wrote, whatever the working directory."""

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path

from ..common.errors import UserError, missing_package_error
from ..common.files import user_path
from ..pipeline.options import new_parser
from ..pipeline.tracking_store import NOTE, read_note, sqlite_file

DESCRIPTION = """Open MLflow's interface on the database that runs wrote. mlflow.json in a run's folder names
it. Among several runs the newest decides. If the runs went to a server, its address is printed."""
EXAMPLES = """examples:
  minrnn ui
  minrnn ui runs/quickstart --port 5001
  minrnn ui ~/project/runs"""


def newest_uri(folder: Path) -> str:
    """The tracking URI of a run, or of the newest run below a folder.

    Raises:
        UserError: there is none, or its database is not there.
    """
    notes = sorted(
        (path for path in folder.rglob(NOTE) if path.is_file()),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    for path in notes:
        try:
            note = read_note(path.parent)
        except ValueError:
            continue
        assert note is not None
        database = sqlite_file(note["uri"])
        if database is not None and not database.exists():
            message = f"{path} names {database}, which is not there; name a run whose database is"
            raise UserError("RUN", message)
        return note["uri"]
    raise UserError(
        "RUN", f"no tracked run is in {folder} ({NOTE}); name a run's folder, or a folder of runs"
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn ui", DESCRIPTION, EXAMPLES)
    run_help = "a run's folder, or a folder of runs (default: %(default)s)"
    parser.add_argument("run", nargs="?", type=user_path, default=Path("runs"), metavar="RUN", help=run_help)
    parser.add_argument("--port", type=int, default=5000, help="of the interface (default: %(default)s)")
    return parser


def main(argv: list[str]) -> None:
    """Run `minrnn ui`; the process becomes MLflow's.

    Raises:
        UserError: there is no tracked run, or MLflow's interface is not installed.
    """
    arguments = _parser().parse_args(argv)
    uri = newest_uri(arguments.run)
    if uri.startswith(("http://", "https://")):
        print(f"The runs are on {uri}")
        return
    try:
        importlib.metadata.version("mlflow")  # mlflow-skinny, which minrnn needs, has no interface
    except importlib.metadata.PackageNotFoundError:
        raise missing_package_error("ui", "mlflow", extra="ui") from None
    print(f"http://127.0.0.1:{arguments.port} shows {uri}", flush=True)
    words = ["-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(arguments.port)]
    os.execv(sys.executable, [sys.executable, *words])
