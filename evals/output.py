"""Results of commands: where they are written (beside the run, or in evals/results/), and tables as text."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"  # in a checkout; a wheel has none


def run_folder(model: str) -> Path | None:
    """The folder of the run that a model path belongs to: the path itself, or the parent of its model/."""
    path = Path(model)
    for folder in (path, path.resolve().parent) if path.resolve().name == "model" else (path,):
        if (folder / "config.yaml").exists() and (folder / "model" / "config.json").exists():
            return folder
    return None


def out_errors(out: Path | None, key: str = "--out", suffix: str = ".json") -> list[tuple[str, str]]:
    """Errors in the path of a file, found before long work that ends by writing it.

    Its folder is created.

    Args:
        key: the option that names it.
    """
    if out is None:
        return []
    if out.suffix != suffix:
        return [(key, f"{out} must end in {suffix}")]
    if out.is_dir():
        return [(key, f"{out} is a folder; name a file")]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            return []
    except OSError as error:
        return [(key, f"cannot write {out} ({error.strerror})")]


def default_out(model: str, kind: str) -> Path:
    """The default path of results: in the folder of the model's run, or in evals/results/ without a run."""
    run = run_folder(model)
    folder = Path("evals", "results") if run is None else run / "evals"
    return folder / f"{kind}-{time.strftime('%Y%m%dT%H%M%S')}.json"


def table(
    rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]], title: str
) -> str:
    """Rows as text under a title; a row with a reason shows that instead of numbers."""
    names = list(columns)
    lines = [
        [columns[names[0]](row), *(columns[name](row) if "reason" not in row else "" for name in names[1:])]
        for row in rows
    ]
    widths = (
        [max(len(name), *(len(line[i]) for line in lines)) for i, name in enumerate(names)] if lines else []
    )
    out = [
        f"\n{title}",
        "  ".join(
            name.ljust(w) if i == 0 else name.rjust(w)
            for i, (name, w) in enumerate(zip(names, widths, strict=False))
        ),
    ]
    for row, line in zip(rows, lines, strict=True):
        first = line[0].ljust(widths[0])
        rest = (
            f"- {row['reason']}"
            if "reason" in row
            else "  ".join(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))
        )
        out.append(f"{first}  {rest}")
    return "\n".join(out)


def si(value: float | None, unit: str = "") -> str:
    """1234567 -> 1.23M; bytes in powers of ten like everything else."""
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}"
