"""metrics.jsonl is the truth about a run; loss.png draws it."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .storage import replace, sync


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the last one may have been cut by a crash."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def cut_metrics(path: Path, step: int) -> int:
    """Remove, in one atomic step, what was written after `step`: it will be written again. Returns how many lines that were."""
    num_cut = 0
    if path.exists():
        entries = read_metrics(path)
        kept = [entry for entry in entries if entry["step"] <= step]
        num_cut = len(entries) - len(kept)
        replace(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return num_cut


class MetricsFile:
    """metrics.jsonl, one line after another, visible at once. Lines that a full disk does not take are kept until it does."""

    def __init__(self, path: Path, warn: Callable[[str], object]):
        self.path, self.warn = path, warn
        self._waiting = ""

    def append(self, entry: dict[str, Any]) -> None:
        """One more line."""
        was_waiting = bool(self._waiting)
        self._waiting += json.dumps(entry) + "\n"
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("a") as file:
                    file.write(self._waiting)
            except OSError:
                os.truncate(self.path, size)  # no half lines
                raise
        except OSError as error:
            if not was_waiting:
                self.warn(f"{self.path} takes no more lines ({error.strerror}); they are kept until it does")
            return
        self._waiting = ""

    def sync(self) -> None:
        """To the disk: a checkpoint must not outlive the lines before it."""
        with contextlib.suppress(OSError):  # a disk that fails here fails the checkpoint too
            sync(self.path)


def draw_loss(metrics: Path, picture: Path, title: str) -> None:
    """Training loss (thin: every logged step, thick: smoothed) and validation loss over tokens, with bits per byte (or accuracy) at those."""
    entries = read_metrics(metrics)
    train = [(entry["tokens"], entry["loss"]) for entry in entries if entry["kind"] == "train" and math.isfinite(entry["loss"])]
    validation = [entry for entry in entries if entry["kind"] == "validation"]
    figure, axes = _empty_figure()
    if train:
        tokens, losses = zip(*train, strict=True)
        axes.plot(tokens, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(tokens, _smoothed(losses), color="tab:blue", label="training (smoothed)")
        axes.set_ylim(0.9 * min(losses[len(losses) // 10 :]), min(max(losses), 2.5 * sorted(losses)[len(losses) // 2]))
    if validation:
        axes.plot([e["tokens"] for e in validation], [e["loss"] for e in validation], "o-", color="tab:orange", label="held out")
        for entry in validation:
            note = f"{entry['bits_per_byte']:.2f} bits/byte" if "bits_per_byte" in entry else f"accuracy {entry['accuracy']:.3f}"
            side = "right" if entry is validation[-1] else "center"  # the last stands at the edge
            axes.annotate(note, (entry["tokens"], entry["loss"]), textcoords="offset points", xytext=(0, 9), ha=side, fontsize=8)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    _save_figure(figure, picture)


def draw_accuracy(metrics: Path, picture: Path, title: str) -> None:
    """Accuracy over test lengths: every validation (thin) and the last, with what a guess has."""
    validations = [entry for entry in read_metrics(metrics) if entry.get("by_length")]
    figure, axes = _empty_figure()
    for entry in validations:
        lengths = [int(length) for length in entry["by_length"]]
        style = {"alpha": 0.25, "linewidth": 0.8} if entry is not validations[-1] else {"marker": "o", "label": f"step {entry['step']}"}
        axes.plot(lengths, list(entry["by_length"].values()), color="tab:blue", **style)
    if validations:
        axes.axhline(validations[-1]["chance"], color="tab:gray", linestyle="--", label="a guess")
        axes.legend()
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length", ylabel="accuracy", title=title, ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    _save_figure(figure, picture)


def _empty_figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.08, 0.12, 0.9, 0.8))


def _save_figure(figure: Any, picture: Path) -> None:
    """Whole or not at all."""
    unfinished = picture.with_suffix(".part.png")
    figure.savefig(unfinished, dpi=120)
    os.replace(unfinished, picture)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over the neighbours on both sides, a fifteenth of all; it does not lag behind a falling loss."""
    window = np.ones(2 * (len(values) // 30) + 1)
    return (np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")).tolist()
