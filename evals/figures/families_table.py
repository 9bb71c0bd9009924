"""The table and the picture of `minrnn figures families`: what was measured of each model."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..output import RESULTS

Curve = list[tuple[int, float]]
"""Tokens read, and bits per byte of the held-out text."""


@dataclass
class Model:
    """One model of the grid, and what is known of it so far."""

    name: str
    fields: dict[str, Any]
    tokens_per_second: float | None = None
    """Of the last steps of the probe."""
    tuning: dict[str, float] = field(default_factory=dict)
    """Bits per byte after the short run, by learning rate."""
    final: dict[str, float] = field(default_factory=dict)
    """Bits per byte after the full run, by seed."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Of the full runs, by seed."""
    failure: str | None = None
    """The error of its last run that failed."""
    reason: str | None = None
    """Why it was not trained."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of its runs: precision, parameters, and what the model cannot do (`model.limits`)."""

    @property
    def best_rate(self) -> str:
        """The learning rate with the fewest bits per byte."""
        return min(self.tuning, key=lambda rate: self.tuning[rate])

    def seconds(self, tokens: int) -> float:
        """How long it trains on so many tokens, by the probe."""
        assert self.tokens_per_second is not None
        return tokens / self.tokens_per_second


def curve(validations: Sequence[dict[str, Any]]) -> Curve:
    """The learning curve from a run's lines of validation."""
    return [(line["tokens"], line["bits_per_byte"]) for line in validations]


def summary(model: Model, grid: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: what was measured of a model, and the hours that the rest would take."""
    row: dict[str, Any] = {"model": model.name, "fields": model.fields}
    tuning = {rate: value if math.isfinite(value) else None for rate, value in model.tuning.items()}
    row |= {"tokens_per_second": model.tokens_per_second, "tuning": tuning, "final": model.final}
    row |= model.settings
    row["curves"] = model.curves
    if model.tuning:
        row["learning_rate"] = float(model.best_rate)
    if model.tokens_per_second is not None:
        missing = (len(grid["learning_rates"]) - len(model.tuning)) * grid["tuning_tokens"]
        missing += (len(grid["seeds"]) - len(model.final)) * grid["tokens"]
        row["hours_left"] = round(model.seconds(missing) / 3600, 2)
    if model.reason:
        row["reason"] = model.reason
    return row


COLUMNS = {
    "model": lambda row: row["model"],
    "bits/byte": lambda row: ", ".join(f"{value:.4f}" for value in row["final"].values()) or "-",
    "lr": lambda row: f"{row['learning_rate']:g}" if "learning_rate" in row else "-",
    "tokens/s": lambda row: "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
    "hours left": lambda row: f"{row.get('hours_left', 0):.2f}",
    "limits": lambda row: "; ".join(row.get("limits", [])),
}


def docs_text(name: str = "books") -> str:
    """The part of docs/compare.md: the table of a results file, the best first; models that were not trained
    have the hours that they would take."""
    source = RESULTS / f"families-{name}.json"
    record = json.loads(source.read_text())
    grid, rows = record["grid"], record["rows"]
    rows = sorted(rows, key=lambda row: statistics.mean(row["final"].values()) if row["final"] else math.inf)
    lines = ["| model | bits per byte | learning rate | tokens/s | limits |", "|---|---|---|---|---|"]
    for row in rows:
        result = COLUMNS["bits/byte"](row)
        if not row["final"]:
            result = f"not trained: {row['hours_left']:.1f} hours" if "hours_left" in row else "not measured"
        cells = (row["model"], result, *(COLUMNS[column](row) for column in ("lr", "tokens/s", "limits")))
        lines.append(f"| {' | '.join(cells)} |")
    size = grid["recipe"]["model"]["num_parameters"]
    rates = ", ".join(f"{rate:g}" for rate in grid["learning_rates"])
    machine = record["machine"]
    head = (
        f"English {name}, {size / 1e6:.1f}M parameters (embeddings included), {grid['tokens']:,} tokens "
        f"(bytes), {len(grid['seeds'])} seeds; of the learning rates {rates}, the best after "
        f"{grid['tuning_tokens']:,} tokens. {machine['cores']} cores of an {machine['cpu']}, "
        f"{rows[0]['precision']} ([file](../evals/results/{source.name})). Llama, Mamba-2, GRU and LSTM "
        "run as `transformers` and torch compute them on a CPU:"
    )
    return "\n\n".join([head, "\n".join(lines), f"![Learning curves](../evals/results/{source.stem}.png)"])


def draw_curves(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """Bits per byte by tokens, and by seconds at the measured speed; a line per model and seed.

    Nothing is drawn before the first full run has ended.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["curves"]]
    if not rows:
        return
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for i, row in enumerate(rows):
        style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "marker": "o", "markersize": 3}
        for j, points in enumerate(row["curves"].values()):
            tokens, losses = zip(*points, strict=True)
            seconds = [count / row["tokens_per_second"] for count in tokens]
            axes[0].plot(tokens, losses, label=row["model"] if j == 0 else None, **style)
            axes[1].plot(seconds, losses, **style)
    axes[0].set(xlabel="tokens", ylabel="held-out bits per byte", xscale="log")
    axes[1].set(xlabel="seconds of training, at the measured tokens per second", xscale="log")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    figure.savefig(picture, dpi=110)
