"""Two laws against each other: which is lower, and where they cross.

Both are taken along their compute-optimal frontiers, over the computes that both families measured. The
replicates of the two are drawn independently, so replicate r of one is compared with replicate r of the
other.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .law import Array
from .resample import Fitted, Interval, interval_of

NUM_COMPUTES = 60  # of the grid on which a crossing is searched


@dataclass(frozen=True)
class Comparison:
    """What the data say about two families."""

    first: str
    second: str
    low_compute: float
    high_compute: float
    """FLOPs that both measured."""
    difference: Interval
    """Loss of the first less that of the second at the high end, each at its optimum."""
    alpha: Interval
    """The first's less the second's."""
    beta: Interval
    crossing: Interval | None
    """FLOPs where the frontiers cross, if they do in the range; infinite sides are outside of it."""
    crossing_share: float
    """Part of the replicates whose frontiers cross in the range."""

    @property
    def is_distinguishable(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return not self.difference.contains(0.0)

    def to_json(self) -> dict[str, Any]:
        """All of it, with the verdict."""
        crossing = None if self.crossing is None else self.crossing.to_json()
        return {
            "first": self.first,
            "second": self.second,
            "compute": [self.low_compute, self.high_compute],
            "difference": self.difference.to_json(),
            "alpha": self.alpha.to_json(),
            "beta": self.beta.to_json(),
            "is_distinguishable": self.is_distinguishable,
            "crossing": crossing,
            "crossing_share": self.crossing_share,
        }


def compare(first: Fitted, second: Fitted) -> Comparison | None:
    """The comparison of two families; None if they measured no compute in common."""
    low = max(fitted.points.compute.min() for fitted in (first, second))
    high = min(fitted.points.compute.max() for fitted in (first, second))
    if low >= high:
        return None
    computes = np.geomspace(low, high, NUM_COMPUTES)
    best = _frontier(first, computes, False) - _frontier(second, computes, False)
    replicates = _frontier(first, computes, True) - _frontier(second, computes, True)  # [R, C]
    crossings = np.array([_crossing(computes, row) for row in replicates])
    crossing = _crossing(computes, best[0])
    return Comparison(
        first.points.family,
        second.points.family,
        float(low),
        float(high),
        interval_of(best[0, -1], replicates[:, -1]),
        *(
            interval_of(
                getattr(first.law, name) - getattr(second.law, name),
                getattr(first.replicates, name) - getattr(second.replicates, name),
            )
            for name in ("alpha", "beta")
        ),
        crossing=None if np.isnan(crossing) else _crossing_interval(crossing, crossings, replicates),
        crossing_share=float(np.isfinite(crossings).mean()),
    )


def _frontier(fitted: Fitted, computes: Array, of_replicates: bool) -> Array:
    """The lowest loss at each compute, [R, C]; [1, C] for the law itself."""
    return np.atleast_2d(fitted.frontier(computes, fitted.columns() if of_replicates else fitted.law)[2])


def _crossing(computes: Array, differences: Array) -> float:
    """The last compute at which the sign changes, between two of the grid; NaN if there is none."""
    (changes,) = np.nonzero(np.sign(differences[1:]) != np.sign(differences[:-1]))
    if not len(changes):
        return np.nan
    i = changes[-1]
    part = differences[i] / (differences[i] - differences[i + 1])
    return float(computes[i] * (computes[i + 1] / computes[i]) ** part)


def _crossing_interval(crossing: float, crossings: Array, replicates: Array) -> Interval:
    """The interval of a crossing. A replicate without one counts as below the range if its sign at the low
    end is already that of the high end in most, else as above it."""
    final = np.sign(np.median(replicates[:, -1]))
    without = np.where(np.sign(replicates[:, -1]) == final, 0.0, np.inf)
    return interval_of(crossing, np.where(np.isnan(crossings), without, crossings))
