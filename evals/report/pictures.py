"""Draws learning curves and accuracies by length."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compare import PooledRuns
from .runs import Seed

COLORS = [f"C{i}" for i in range(10)]
LABEL_WIDTH, LINE_HEIGHT = 120, 0.15  # of the legend: characters, inches


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if columns == 1 else 11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _add_legend(figure: Any, ax: Any) -> None:
    """A legend below all axes, so that long labels do not narrow them."""
    lines, labels = ax.get_legend_handles_labels()
    labels = [textwrap.fill(label, LABEL_WIDTH) for label in labels]
    figure.set_figheight(
        figure.get_figheight() + LINE_HEIGHT * sum(len(label.splitlines()) for label in labels)
    )
    figure.legend(lines, labels, loc="outside lower center", fontsize=8)


def _save(figure: Any, picture: Path) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def learning_curves(pooled: Sequence[PooledRuns], picture: Path) -> None:
    """Training loss (thin lines) and held-out loss (dots) by step for every seed; for tasks also accuracy."""
    with_accuracy = any(
        accuracy is not None
        for runs in pooled
        for seed in runs.seeds
        for *_, accuracy in seed.curve.validation
    )
    figure, axes = _figure(2 if with_accuracy else 1)
    for i, runs in enumerate(pooled):
        color = COLORS[i % len(COLORS)]
        for j, seed in enumerate(runs.seeds):
            label = (
                f"{runs.label} ({len(runs.runs)} seed{'s' if len(runs.runs) > 1 else ''})" if j == 0 else None
            )
            _draw_losses(axes[0], seed, color, label)
            if with_accuracy:
                points = [
                    (step, accuracy) for step, _, accuracy in seed.curve.validation if accuracy is not None
                ]
                axes[1].plot(
                    [step for step, _ in points],
                    [100 * accuracy for _, accuracy in points],
                    "o-",
                    color=color,
                    markersize=3,
                    label=label,
                )
    lowest, highest = _loss_range(pooled)
    axes[0].set(xlabel="steps", ylabel="loss (nats); thin: training, dots: held out", ylim=(lowest, highest))
    if with_accuracy:
        axes[1].set(xlabel="steps", ylabel="accuracy (%), lengths as in training", ylim=(-2, 102))
    for ax in axes:
        ax.grid(alpha=0.3)
    _add_legend(figure, axes[-1])
    _save(figure, picture)


def _draw_losses(ax: Any, seed: Seed, color: str, label: str | None) -> None:
    ax.plot(*zip(*seed.curve.train, strict=True), color=color, alpha=0.5, linewidth=0.9, label=label)
    if seed.curve.validation:
        ax.plot(
            [step for step, *_ in seed.curve.validation],
            [loss for _, loss, _ in seed.curve.validation],
            "o",
            color=color,
            markersize=4,
        )


def loss_by_tokens_and_seconds(pooled: Sequence[PooledRuns], picture: Path) -> None:
    """Held-out loss of every seed, against the tokens read and against the time of training.

    A run's time at a validation is taken from its mean rate. Runs whose lines lack times are missing on the
    right.
    """
    figure, axes = _figure(2)
    for i, runs in enumerate(pooled):
        for j, seed in enumerate(runs.seeds):
            label = runs.label if j == 0 else None
            style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "markersize": 3, "label": label}
            style["linestyle"] = "-" if i < len(COLORS) else "--"
            losses = [loss for _, loss, _ in seed.curve.validation]
            for ax, total in zip(axes, (seed.tokens, seed.training_seconds), strict=True):
                if total is not None:
                    x = [step * total / seed.steps for step, *_ in seed.curve.validation]
                    ax.plot(x, losses, marker="o", **style)
    highest = max(
        loss
        for runs in pooled
        for seed in runs.seeds
        for _, loss, _ in seed.curve.validation[len(seed.curve.validation) // 10 :]
    )
    for ax, label in zip(axes, ("tokens", "seconds of training"), strict=True):
        ax.set(xlabel=label, ylabel="held-out loss (nats per token)", xscale="log")
        ax.set_ylim(top=highest)
        ax.grid(alpha=0.3, which="both")
    _add_legend(figure, axes[0])
    _save(figure, picture)


def _loss_range(pooled: Sequence[PooledRuns]) -> tuple[float, float]:
    """The range without the first steps of training, in which the loss falls from that of a guess."""
    curves = [[loss for _, loss in seed.curve.train] for runs in pooled for seed in runs.seeds]
    losses = [loss for curve in curves for loss in curve]
    validated = [loss for runs in pooled for seed in runs.seeds for _, loss, _ in seed.curve.validation]
    later = [loss for curve in curves for loss in curve[len(curve) // 20 :]]
    lowest, highest = min(losses + validated), max(later + validated)
    margin = 0.05 * (highest - lowest) or 0.1
    return lowest - margin, highest + margin


def accuracy_by_length(pooled: Sequence[PooledRuns], picture: Path) -> None:
    """Accuracy at each test length at the last validation, runs line per seed, and the level of guessing."""
    figure, (ax,) = _figure(1)
    chances = set()
    for i, runs in enumerate(pooled):
        for j, seed in enumerate(seed for seed in runs.seeds if seed.final and seed.final.by_length):
            assert seed.final is not None
            points = sorted(
                (int(length), 100 * accuracy) for length, accuracy in (seed.final.by_length or {}).items()
            )
            ax.plot(
                *zip(*points, strict=True),
                "o-",
                color=COLORS[i % len(COLORS)],
                markersize=4,
                label=runs.label if j == 0 else None,
            )
            chances.add(seed.final.chance)
    for chance in sorted(chance for chance in chances if chance is not None):
        ax.axhline(100 * chance, color="tab:gray", linestyle="--", label="chance")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="length", ylabel="accuracy (%)", ylim=(-2, 102))
    ax.grid(alpha=0.3)
    _add_legend(figure, ax)
    _save(figure, picture)
