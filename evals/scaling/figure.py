"""The figure of a fit: the frontier, and two views for looking only."""

from typing import Any

import numpy as np

from ..output import si
from .law import Array
from .resample import LEVEL, Fitted
from .words import BEYOND

NUM_COMPUTES, NUM_ISO = 80, 4
NEAR = 0.25  # in log FLOPs, of the runs that are drawn at an iso-FLOP line


def draw(figure: Any, fitted: list[Fitted], unit: str) -> None:
    """Fill a matplotlib figure: loss against compute, against parameters, against tokens."""
    from matplotlib.ticker import LogFormatter

    frontier, iso_tokens, iso_flops = figure.subplots(1, 3)
    tokens = _grid([each.points.tokens for each in fitted], NUM_ISO)
    computes = _grid([each.points.compute for each in fitted], NUM_ISO + 2)[1:-1]
    for number, each in enumerate(fitted):
        color, is_labelled = f"C{number}", number == 0
        _draw_frontier(frontier, each, color)
        _draw_iso_tokens(iso_tokens, each, color, tokens, is_labelled)
        _draw_iso_flops(iso_flops, each, color, computes, is_labelled)
    titles = ("runs, and the compute-optimal frontier", "iso-token: equal tokens", "iso-FLOP: equal compute")
    labels = ("FLOPs of training", "parameters", "parameters")
    for axes, title, label in zip((frontier, iso_tokens, iso_flops), titles, labels, strict=True):
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=unit, title=title)
        axes.yaxis.set_major_formatter(LogFormatter())  # 6 in place of 6 x 10^0
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.grid(alpha=0.3, which="both")
    frontier.legend()


def _grid(values: list[Array], count: int) -> Array:
    """Numbers at equal ratios, from the smallest to the largest value of all families."""
    return np.geomspace(min(map(np.min, values)), max(map(np.max, values)), count)


def _draw_frontier(axes: Any, each: Fitted, color: str) -> None:
    compute = each.points.compute
    axes.plot(compute, each.points.losses, ".", color=color)
    grid = np.geomspace(compute.min(), BEYOND * compute.max(), NUM_COMPUTES)
    axes.plot(grid, each.frontier(grid, each.law)[2], color=color, label=each.points.family)
    losses = each.frontier(grid, each.columns())[2]
    tail = (100 - LEVEL) / 2
    axes.fill_between(grid, *np.percentile(losses, [tail, 100 - tail], axis=0), color=color, alpha=0.2, lw=0)
    axes.axvline(compute.max(), color=color, lw=0.8, ls=":")


def _draw_iso_tokens(axes: Any, each: Fitted, color: str, grid: Array, is_labelled: bool) -> None:
    """The law and the runs at some numbers of tokens."""
    points = each.points
    parameters = np.geomspace(points.parameters.min(), points.parameters.max(), 50)
    axes.plot(points.parameters, points.losses, ".", color=color)
    for tokens in grid:
        losses = each.law.loss(parameters, tokens)
        axes.plot(parameters, losses, color=color, lw=0.8)
        if is_labelled:
            axes.annotate(f"{si(float(tokens))} tokens", (parameters[0], losses[0]), fontsize=7)


def _draw_iso_flops(axes: Any, each: Fitted, color: str, grid: Array, is_labelled: bool) -> None:
    """The law at some computes, over the measured parameters and tokens; and its minima."""
    points = each.points
    parameters = np.geomspace(points.parameters.min(), points.parameters.max(), 50)
    for compute in grid:
        losses = each.law.loss(parameters, each.cost.tokens(compute, parameters))
        axes.plot(parameters, losses, color=color, lw=0.8)
        if is_labelled:
            axes.annotate(f"{compute:.1g} FLOPs", (parameters[-1], losses[-1]), fontsize=7, ha="right")
        is_near = np.abs(np.log(points.compute / compute)) < NEAR
        axes.plot(points.parameters[is_near], points.losses[is_near], ".", color=color)
        best, _, loss = each.frontier(compute, each.law)
        axes.plot(best, loss, "*", color=color)
