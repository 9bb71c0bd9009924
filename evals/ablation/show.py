"""An ablation as text and as a figure. The report (report/ablations.py) shows the same columns."""

from pathlib import Path
from typing import Any

from ...pipeline.pictures import save_figure
from ..output import table
from ..report.ablations import COLUMNS, caption


def text(record: dict[str, Any]) -> str:
    """The table of `minrnn ablate`."""
    return f"{table(record['rows'], COLUMNS, '').strip()}\n{caption(record)}"


def draw(record: dict[str, Any], path: Path) -> None:
    """The differences from the base, with their intervals, the best at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(record["rows"], key=lambda row: -row["difference"]["value"])
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.7")
    axes.errorbar(
        [row["difference"]["value"] for row in rows],
        range(len(rows)),
        xerr=[row["difference"]["half_width"] or 0 for row in rows],
        fmt="o",
        capsize=3,
    )
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.set(xlabel=f"{record['unit']}: difference from {record['base']} (%)")
    axes.grid(alpha=0.3, axis="x")
    FigureCanvasAgg(figure)
    save_figure(figure, path)
