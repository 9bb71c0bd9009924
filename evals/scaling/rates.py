"""Check of a ladder's rule of the learning rate: `minrnn fit PATH --check-rules`.

    runs of a ladder with lr_factors -> curves loss(factor), one for each family, size and budget
      -> the best factor that was measured; the rule holds if it is within FACTOR of 1

A grid with steps of at most FACTOR can show that; with a best factor at its end, it shows nothing.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ...common.errors import UserError
from ..output import table
from .points import PLAN, held_out_loss

FACTOR = 1.5
MIN_FACTORS, MIN_SIZES = 3, 3


@dataclass(frozen=True)
class Curve:
    """Losses over learning rates, of one family, size and budget; the means over seeds."""

    family: str
    size: int
    """Parameters that were asked for."""
    tokens: int
    rates: dict[float, float]
    """Learning rate by factor, in ascending order of factors."""
    losses: dict[float, float]
    """Loss on held-out data by factor; infinite for a run that diverged."""

    @property
    def best(self) -> float:
        """The factor with the lowest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def is_at_the_end(self) -> bool:
        """Whether the best factor is the smallest or the largest, so that a better one may lie outside."""
        return self.best in (min(self.losses), max(self.losses))

    @property
    def holds(self) -> bool:
        """Whether the rule's learning rate is within FACTOR of the best."""
        return not self.is_at_the_end and abs(math.log(self.best)) <= math.log(FACTOR) + 1e-9

    @property
    def optimum(self) -> float | None:
        """The factor at the minimum of the parabola through the best and its neighbours, in logarithms; None
        at the end of the grid."""
        if self.is_at_the_end:
            return None
        factors = list(self.losses)
        i = factors.index(self.best)
        x = np.log(factors[i - 1 : i + 2])
        y = np.array([self.losses[factor] for factor in factors[i - 1 : i + 2]])
        if not np.isfinite(y).all():
            return None
        a, b, _ = np.polyfit(x, y, 2)
        return float(np.exp(-b / (2 * a))) if a > 0 else None

    @property
    def excess(self) -> float:
        """Loss of the rule's learning rate less the lowest; infinite if the rule's diverged."""
        own = self.losses[1.0]
        return own - self.losses[self.best] if math.isfinite(own) else math.inf

    def to_json(self) -> dict[str, Any]:
        """All of it, with the verdict; null in place of a number that is not finite."""
        return {
            "family": self.family,
            "size": self.size,
            "tokens": self.tokens,
            "best": self.best,
            "optimum": self.optimum,
            "excess": _finite(self.excess),
            "is_at_the_end": self.is_at_the_end,
            "holds": self.holds,
            "points": [
                {"factor": factor, "lr": self.rates[factor], "loss": _finite(loss)}
                for factor, loss in self.losses.items()
            ],
        }


def _finite(value: float) -> float | None:
    """The value, or None if JSON has no number for it."""
    return value if math.isfinite(value) else None


def read_curves(path: Path) -> list[Curve]:
    """The curves of a ladder's folder.

    Raises:
        UserError: the folder holds no ladder with enough factors or sizes, or runs that are not finished.
    """
    if not (path / PLAN).is_file():
        raise UserError(str(path), f"holds no {PLAN}; --check-rules reads the folder of a ladder")
    document = json.loads((path / PLAN).read_text())
    ladder = document["sweep"].get("ladder") or {}
    factors, sizes = ladder.get("lr_factors", []), ladder.get("sizes", [])
    if len(factors) < MIN_FACTORS or len(sizes) < MIN_SIZES or 1.0 not in factors:
        message = (
            f"has {len(factors)} learning rates for {len(sizes)} sizes; the check needs a ladder of at least "
            f"{MIN_SIZES} sizes and {MIN_FACTORS} lr_factors, 1 among them (as launch/sweeps/rules.yaml)"
        )
        raise UserError(str(path), message)
    losses: dict[tuple[str, int, int], dict[float, list[tuple[float, float]]]] = {}
    unfinished = []
    for entry in document["runs"]:
        loss = _loss(path, entry["name"])
        if loss is None:
            unfinished.append(entry["name"])
            continue
        settings = entry["settings"]
        key = entry["family"], settings["model.num_parameters"], entry["tokens"]
        at = losses.setdefault(key, defaultdict(list))
        at[entry["lr_factor"]].append((settings["optim.lr"], loss))
    if unfinished:
        names = ", ".join(unfinished[:5]) + (" ..." if len(unfinished) > 5 else "")
        raise UserError(str(path), f"{len(unfinished)} runs are not finished: {names}; minrnn sweep goes on")
    return [
        Curve(
            *key,
            rates={factor: at[factor][0][0] for factor in sorted(at)},
            losses={factor: float(np.mean([loss for _, loss in at[factor]])) for factor in sorted(at)},
        )
        for key, at in losses.items()
    ]


def _loss(path: Path, name: str) -> float | None:
    """The loss of a run on held-out data: infinite if it failed, as a learning rate that is too high does;
    None if it is not finished."""
    if (path / "failed" / f"{name}.json").exists():
        return math.inf
    return held_out_loss(path / "runs" / name)


def optimizers_of(path: Path) -> list[str]:
    """The optimizers of the runs in a sweep's folder."""
    configs = sorted((path / "runs").glob("*/config.yaml"))
    names = {yaml.safe_load(config.read_text())["optim"].get("name", "adamw") for config in configs}
    return sorted(names)


def verdict(curves: list[Curve], optimizers: list[str]) -> str:
    """The result in words, a sentence for each family."""
    sentences = []
    for family in dict.fromkeys(curve.family for curve in curves):
        own = [curve for curve in curves if curve.family == family]
        held = [curve for curve in own if curve.holds]
        text = (
            f"{family}: the rule's learning rate is within a factor of {FACTOR} of the best at {len(held)} "
        )
        text += f"of {len(own)} sizes and budgets."
        if ends := [curve for curve in own if curve.is_at_the_end]:
            places = ", ".join(f"{curve.size:,}" for curve in ends)
            text += f" At {places} parameters the best is at the end of the grid; add lr_factors beyond it."
        if failed := [curve for curve in own if not math.isfinite(curve.excess)]:
            places = ", ".join(f"{curve.size:,}" for curve in failed)
            text += f" At {places} parameters the rule's learning rate diverged or failed."
        if excess := [curve.excess for curve in own if math.isfinite(curve.excess)]:
            text += f" It costs at most {max(excess):.4f} against the best that was measured."
        sentences.append(text)
    return " ".join([*sentences, f"Optimizers: {', '.join(optimizers)}."])


def rates_table(curves: list[Curve]) -> str:
    """A row for each curve: losses by factor, the best, the minimum between the measured ones."""
    factors = sorted({factor for curve in curves for factor in curve.losses})
    columns: dict[str, Any] = {
        "family": lambda curve: curve["family"],
        "parameters": lambda curve: f"{curve['size']:,}",
        **{
            f"{factor:g}": lambda curve, factor=factor: f"{curve['losses'].get(factor, math.nan):.4f}"
            for factor in factors
        },
        "best": lambda curve: f"{curve['best']:g}",
        "minimum": lambda curve: "-" if curve["optimum"] is None else f"{curve['optimum']:.2f}",
        f"within {FACTOR:g}": lambda curve: "yes" if curve["holds"] else "no",
    }
    rows = [{**curve.to_json(), "losses": curve.losses} for curve in curves]
    return table(rows, columns, "loss by factor of the rule's learning rate")


def draw_rates(figure: Any, curves: list[Curve]) -> None:
    """Fill a matplotlib figure: loss less the lowest over the factor, for each family."""
    families = list(dict.fromkeys(curve.family for curve in curves))
    axes = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    for ax, family in zip(axes, families, strict=True):
        for curve in (curve for curve in curves if curve.family == family):
            lowest = curve.losses[curve.best]
            values = [loss - lowest if math.isfinite(loss) else math.nan for loss in curve.losses.values()]
            ax.plot(list(curve.losses), values, ".-", label=f"{curve.size:,} parameters")
        ax.axvspan(1 / FACTOR, FACTOR, color="0.9")
        ax.set(xscale="log", xlabel="factor of the rule's learning rate", title=family)
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].set(ylabel="held-out loss above the best")
