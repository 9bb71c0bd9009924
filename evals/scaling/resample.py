"""A law with intervals: the fit again and again, on resampled runs; and its error on the largest run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...common.errors import UserError
from .law import Array, Cost, Fit, Law
from .points import Points

NAMES = ("E", "A", "B", "alpha", "beta")
LEVEL = 95  # percent of the intervals
MIN_POINTS, MIN_DISTINCT = 6, 3  # one more than the law has numbers; sizes, and numbers of tokens
MIN_GROUPS = 8  # groups of points with a common run that can be resampled; with fewer, points are


@dataclass(frozen=True)
class Interval:
    """A value, and the interval that holds LEVEL percent of its replicates."""

    value: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether a value is in the interval."""
        return self.low <= value <= self.high

    def to_json(self) -> dict[str, float | None]:
        """As in fit.json; null for a side that has no bound."""
        sides = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if np.isfinite(number) else None for name, number in sides.items()}


def interval_of(value: float | Array, replicates: float | Array) -> Interval:
    """The interval of a value from its replicates [R]."""
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(replicates, [tail, 100 - tail], method="nearest")
    return Interval(float(value), float(low), float(high))


@dataclass(frozen=True)
class Fitted:
    """The law of one family, with its replicates."""

    points: Points
    law: Law
    replicates: Law
    """Each number an array [R]."""
    cost: Cost
    is_by_run: bool
    """Whether runs were resampled; otherwise points, because there are too few runs."""
    leave_largest_out: dict[str, float] | None
    """Compute, loss, prediction and relative error of the largest run, by the law of the others; None if
    those are too few."""

    def columns(self) -> Law:
        """The replicates as columns [R, 1]."""
        return Law(*(np.asarray(getattr(self.replicates, name))[:, None] for name in NAMES))

    def frontier(self, compute: float | Array, laws: Law) -> tuple[Array, Array, Array]:
        """N, D and L at the lowest loss of each compute, with D / N between the smallest and the largest that
        was measured.

        A law of few runs may have its optimum where nothing was measured (at no parameters, if alpha is near
        0); its loss there means nothing.

        Args:
            compute: [C], or one.
            laws: the law, or all replicates as `columns`.
        """
        least, most = (self.cost.parameters(compute, ratio) for ratio in self.ratios[::-1])
        parameters = np.clip(laws.optimal_parameters(compute, self.cost), least, most)
        tokens = self.cost.tokens(compute, parameters)
        return parameters, tokens, laws.loss(parameters, tokens)

    @property
    def ratios(self) -> tuple[float, float]:
        """The smallest and the largest number of tokens per parameter."""
        ratios = self.points.tokens / self.points.parameters
        return float(ratios.min()), float(ratios.max())

    @property
    def middle_compute(self) -> float:
        """The geometric middle of the smallest and the largest run's FLOPs."""
        return float(np.sqrt(self.points.compute.min() * self.points.compute.max()))

    def side_of_the_optimum(self) -> int:
        """Whether the law's optimum at `middle_compute` has fewer tokens per parameter than any run (-1),
        more (1), or a number that was measured (0)."""
        parameters, tokens = self.law.optimum(self.middle_compute, self.cost)
        least, most = self.ratios
        return int(tokens > most * parameters) - int(tokens < least * parameters)

    def intervals(self) -> dict[str, Interval]:
        """The five numbers."""
        return {name: interval_of(getattr(self.law, name), getattr(self.replicates, name)) for name in NAMES}

    def residuals(self) -> Array:
        """log L - log L(N, D) of each point."""
        return np.log(self.points.losses) - np.log(self.law.loss(self.points.parameters, self.points.tokens))


def missing_for_a_fit(points: Points) -> str | None:
    """What the points lack for a fit; None if they are enough."""
    sizes, budgets = (len(np.unique(x)) for x in (points.parameters, points.tokens))
    if len(points.losses) >= MIN_POINTS and sizes >= MIN_DISTINCT and budgets >= MIN_DISTINCT:
        return None
    return (
        f"{points.family} has {len(points.losses)} runs of {sizes} sizes and {budgets} numbers of tokens; "
        f"the five numbers of the law need at least {MIN_POINTS} runs, {MIN_DISTINCT} sizes (for alpha) and "
        f"{MIN_DISTINCT} numbers of tokens (for beta)"
    )


def fit_family(points: Points, num_replicates: int, seed: int | Sequence[int]) -> Fitted:
    """Fit the law of one family, with intervals.

    Each replicate draws as many runs as there are, with replacement. A draw of fewer than MIN_DISTINCT sizes
    or numbers of tokens determines no law and is drawn again.

    Args:
        num_replicates: R.
        seed: of the draws.

    Raises:
        UserError: there are too few points.
    """
    if (missing := missing_for_a_fit(points)) is not None:
        raise UserError("fit", missing)
    fit = Fit(points.parameters, points.tokens, points.losses)
    law = fit.best()
    is_by_run = len(set(points.runs)) >= MIN_GROUPS or len(set(points.runs)) == len(points.runs)
    groups = points.runs if is_by_run else list(range(len(points.runs)))
    weights = _draws(points, groups, num_replicates, np.random.default_rng(seed))
    starts = np.tile(fit.values(law), (num_replicates, 1))
    losses = np.broadcast_to(fit.log_l, weights.shape)
    replicates = fit.law(fit.refine_many(starts, losses, weights))
    flops = points.flops
    cost = Cost() if flops is None else Cost.fitted(points.parameters, points.tokens, flops)
    return Fitted(points, law, replicates, cost, is_by_run, _leave_largest_out(points))


def _draws(points: Points, groups: list[Any], num_replicates: int, generator: np.random.Generator) -> Array:
    """How often each replicate draws each point, [R, P]."""
    names, index = np.unique(np.array(groups, dtype=str), return_inverse=True)
    weights = np.empty((num_replicates, len(groups)))
    for row in range(num_replicates):
        while True:
            drawn = generator.integers(0, len(names), len(names))
            weights[row] = np.bincount(drawn, minlength=len(names))[index]
            is_there = weights[row] > 0
            distinct = (len(np.unique(x[is_there])) for x in (points.parameters, points.tokens))
            if min(distinct) >= MIN_DISTINCT:
                break
    return weights


def _leave_largest_out(points: Points) -> dict[str, float] | None:
    """Predict the run with the largest compute from all others."""
    is_largest = np.arange(len(points.losses)) == points.compute.argmax()
    others, largest = points.without(is_largest), points.without(~is_largest)
    if missing_for_a_fit(others) is not None:
        return None
    law = Fit(others.parameters, others.tokens, others.losses).best()
    (loss,) = largest.losses
    (prediction,) = law.loss(largest.parameters, largest.tokens)
    return {
        "parameters": float(largest.parameters[0]),
        "tokens": float(largest.tokens[0]),
        "flops": float(largest.compute[0]),
        "next_flops": float(others.compute.max()),
        "loss": float(loss),
        "prediction": float(prediction),
        "relative_error": float(prediction / loss - 1),
    }
