"""loss.png and accuracy_by_length.png, drawn from metrics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import atomic_write
from .metrics import History

NUM_POINTS = 4000  # of a curve; the picture has fewer columns
NUM_NOTES = 12


def draw_loss(history: History, picture: Path, title: str, unit: str = "token") -> None:
    """Draw training loss (thin: every logged step, thick: smoothed) and validation loss (with bits per byte
    or accuracy) over tokens."""
    validations = history.validations
    # Copies, because an array.array cannot grow while a view of it exists.
    tokens, losses = np.array(history.tokens), np.array(history.losses)
    figure, axes = _empty_figure()
    if len(losses):
        axes.plot(*_extremes(tokens, losses), color="tab:blue", alpha=0.3, linewidth=0.8)
        shown = _even_indices(len(losses), NUM_POINTS)
        axes.plot(tokens[shown], _running_mean(losses)[shown], color="tab:blue", label="training (smoothed)")
        axes.set_ylim(
            0.9 * losses[len(losses) // 10 :].min(), min(losses.max(), 2.5 * float(np.median(losses)))
        )
    if validations:
        shown = [validations[i] for i in _even_indices(len(validations), NUM_POINTS)]
        axes.plot(
            [e["tokens"] for e in shown],
            [e["loss"] for e in shown],
            "o-",
            color="tab:orange",
            label="held out",
        )
        for entry in (validations[i] for i in _even_indices(len(validations), NUM_NOTES)):
            note = (
                f"{entry['bits_per_byte']:.2f} bits/byte"
                if "bits_per_byte" in entry
                else f"accuracy {entry['accuracy']:.3f}"
            )
            side = "right" if entry is validations[-1] else "center"  # the last point is at the edge
            axes.annotate(
                note,
                (entry["tokens"], entry["loss"]),
                textcoords="offset points",
                xytext=(0, 9),
                ha=side,
                fontsize=8,
            )
    axes.set(xlabel="tokens", ylabel=f"loss (nats per {unit})", title=title)
    axes.grid(alpha=0.3)
    if len(losses) or validations:
        axes.legend()
    save_figure(figure, picture)


def draw_accuracy(history: History, picture: Path, title: str) -> None:
    """Draw accuracy over test length, for all validations (thin) and the last, and the accuracy of
    guessing."""
    validations = [entry for entry in history.validations if entry.get("by_length")]
    figure, axes = _empty_figure()
    for entry in (validations[i] for i in _even_indices(len(validations), 100)):
        lengths = [int(length) for length in entry["by_length"]]
        style = (
            {"alpha": 0.25, "linewidth": 0.8}
            if entry is not validations[-1]
            else {"marker": "o", "label": f"step {entry['step']}"}
        )
        axes.plot(lengths, list(entry["by_length"].values()), color="tab:blue", **style)
    if validations:
        axes.axhline(validations[-1]["chance"], color="tab:gray", linestyle="--", label="a guess")
        axes.legend()
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length", ylabel="accuracy", title=title, ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    save_figure(figure, picture)


def _empty_figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.08, 0.12, 0.9, 0.8))


def save_figure(figure: Any, picture: Path) -> None:
    """Write the figure as PNG, atomically."""
    with atomic_write(picture) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")


def _even_indices(count: int, limit: int) -> np.ndarray:
    """`limit` evenly spaced indices of `count` items, including the first and the last; all if there are
    fewer."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int)


def _extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a long curve to the minimum and maximum of each segment, which look the same in a picture."""
    if len(y) <= NUM_POINTS:
        return x, y
    starts = np.arange(NUM_POINTS // 2) * len(y) // (NUM_POINTS // 2)
    pairs = np.stack([np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)], axis=1)
    return np.repeat(x[starts], 2), pairs.ravel()


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centered running mean over a fifteenth of all values, so that it does not lag behind a falling loss."""
    reach, index = len(values) // 30, np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)
