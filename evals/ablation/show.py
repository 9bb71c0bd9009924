"""An ablation as a table, a figure, and text."""

from pathlib import Path
from typing import Any

from ...pipeline.pictures import save_figure
from ..output import si, table


def difference_text(row: dict[str, Any]) -> str:
    """`-2.31 ± 0.20 %`."""
    value, half_width = row["difference"]["value"], row["difference"]["half_width"]
    return f"{value:+.2f} %" if half_width is None else f"{value:+.2f} ± {half_width:.2f} %"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


COLUMNS: dict[str, Any] = {
    "variant": lambda row: row["variant"],
    "parameters": lambda row: si(row["parameters"]),
    "lr": lambda row: f"{row['lr']:g}" + ("*" if row.get("is_at_the_end") else ""),
    "seeds": lambda row: str(len(row["seeds"])),
    "loss": lambda row: f"{row['loss']:.4f}",
    "difference": difference_text,
    "tokens/s": lambda row: si(row["tokens_per_second"]),
    "steps": lambda row: _fraction(row["steps"]),
    "seconds": lambda row: _fraction(row["seconds"]),
}


def caption(record: dict[str, Any]) -> str:
    """What the columns mean."""
    rows = record["rows"]
    text = (
        f"Held-out loss in {record['unit']}, after {si(rows[0]['tokens'])} tokens. difference: from "
        f"{record['base']}, in percent, paired by seed, with a 95 % interval. steps, seconds: to the loss "
        f"that {record['base']} has at its end, as a fraction of its own."
    )
    ends = any(row.get("is_at_the_end") for row in rows)
    return text + (" *: the best learning rate is at the end of the grid." if ends else "")


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
