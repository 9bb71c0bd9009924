"""Where what is found out about a model goes: beside its run, or in evals/results/."""

import tempfile
import time
from pathlib import Path


def run_of(model: str) -> Path | None:
    """The folder of the run whose model this is: the run itself, or its model/."""
    path = Path(model)
    for folder in (path, path.resolve().parent) if path.resolve().name == "model" else (path,):
        if (folder / "config.yaml").exists() and (folder / "model" / "config.json").exists():
            return folder
    return None


def out_errors(out: Path | None) -> list[tuple[str, str]]:
    """What is wrong with a JSON file that is to be written at the end of long work, found before it begins; its folder is made."""
    if out is None:
        return []
    if out.suffix != ".json":
        return [("--out", f"{out} must end in .json")]
    if out.is_dir():
        return [("--out", f"{out} is a folder; name a file")]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            return []
    except OSError as error:
        return [("--out", f"cannot write {out} ({error.strerror})")]


def default_out(model: str, what: str) -> Path:
    """Where results go unless it is said: among those of the model's run, or in evals/results/ without a run."""
    run = run_of(model)
    return (
        Path("evals", "results") if run is None else run / "evals"
    ) / f"{what}-{time.strftime('%Y%m%dT%H%M%S')}.json"
