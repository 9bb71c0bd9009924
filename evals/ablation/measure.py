"""What the runs of an ablation say: a row for each variant, compared with the base seed by seed.

Runs of the same seed read the same data in the same order, so the difference of two variants varies less than
their losses do.
"""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..report.compare import estimate
from ..scaling.points import PLAN, last_validation


@dataclass(frozen=True)
class AblationRun:
    """A finished run."""

    variant: str
    seed: int
    loss: float
    """Held out, after the last step: bits per byte where they are known, else nats per token."""
    unit: str
    curve: list[tuple[int, float]]
    """Step and loss of each validation."""
    seconds_per_step: float
    """Of training, without validation: the median over the logged steps but the first."""
    tokens_per_step: int
    parameters: int
    lr: float

    def step_reaching(self, loss: float) -> float | None:
        """The first step with at most this loss, interpolated between validations; None for no step, or with
        a single validation."""
        if len(self.curve) < 2:
            return None
        if self.curve[0][1] <= loss:
            return float(self.curve[0][0])
        for (step, above), (next_step, below) in itertools.pairwise(self.curve):
            if below <= loss < above:
                return step + (next_step - step) * (above - loss) / (above - below)
        return None


def read_runs(sweep: Path, names: Mapping[str, str] | None = None) -> list[AblationRun]:
    """The finished runs of a sweep of variants, in the plan's order.

    Args:
        names: of the ablation's variants, by those of the sweep, where they differ.
    """
    planned = json.loads((sweep / PLAN).read_text())["runs"]
    runs = []
    for entry in planned:
        name = entry["family"] if names is None else names.get(entry["family"])
        run = None if name is None else _read_run(sweep / "runs" / entry["name"], name, entry)
        runs += [] if run is None else [run]
    return runs


def _read_run(folder: Path, variant: str, entry: dict[str, Any]) -> AblationRun | None:
    end = last_validation(folder)
    if end is None:
        return None
    config = yaml.safe_load((folder / "config.yaml").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    unit = "bits_per_byte" if "bits_per_byte" in end else "loss"
    curve = {line["step"]: line[unit] for line in lines if line["kind"] == "validation" and unit in line}
    rates = [line["tokens_per_second"] for line in lines if line["kind"] == "train"]
    tokens_per_step = end["tokens"] // end["step"]
    return AblationRun(
        variant=variant,
        seed=config["run"]["seed"],
        loss=end[unit],
        unit="bits per byte" if unit == "bits_per_byte" else "nats per token",
        curve=sorted(curve.items()),
        seconds_per_step=tokens_per_step / statistics.median(rates[1:] or rates),
        tokens_per_step=tokens_per_step,
        parameters=entry["parameters"]["all"],
        lr=config["optim"]["lr"],
    )


def tuned_rates(
    runs: Sequence[AblationRun], variants: Sequence[str], rates: Sequence[float]
) -> list[dict[str, Any]]:
    """The best learning rate of each variant: {"variant", "lr", "is_at_the_end", "losses": {rate: loss}}.

    Args:
        runs: those of the tuning that finished; a rate without one has an infinite loss.
        rates: of the grid.
    """
    rows = []
    for variant in variants:
        finished = {run.lr: run.loss for run in runs if run.variant == variant and math.isfinite(run.loss)}
        losses = {rate: finished.get(rate, math.inf) for rate in rates}
        best = min(losses, key=losses.__getitem__)
        is_at_the_end = len(rates) > 1 and best in (min(rates), max(rates))
        rows.append({"variant": variant, "lr": best, "is_at_the_end": is_at_the_end, "losses": losses})
    return rows


def compared(runs: Sequence[AblationRun], base: str) -> list[dict[str, Any]]:
    """A row for each variant, the base first.

    Differences are in percent of the base's loss of the same seed: {"value", "half_width"}, with half of
    the 95 % t-interval over seeds (None for one seed). `steps` and `seconds` are what the variant takes to
    the loss that the base has at its end, as a fraction of what the base takes in all; None where a seed
    does not reach it.
    """
    of_base = {run.seed: run for run in runs if run.variant == base}
    rows = []
    for variant in dict.fromkeys([base, *(run.variant for run in runs)]):
        own = [run for run in runs if run.variant == variant and run.seed in of_base]
        if not own:
            continue
        pairs = [(run, of_base[run.seed]) for run in own]
        difference = estimate([100 * (run.loss / other.loss - 1) for run, other in pairs])
        rows.append(
            {
                "variant": variant,
                "seeds": [run.seed for run in own],
                "lr": own[0].lr,
                "parameters": own[0].parameters,
                "tokens": own[0].tokens_per_step * own[0].curve[-1][0],
                "loss": statistics.fmean(run.loss for run in own),
                "difference": {"value": difference.mean, "half_width": difference.half_width},
                "tokens_per_second": statistics.fmean(
                    run.tokens_per_step / run.seconds_per_step for run in own
                ),
                **_to_the_loss_of_the_base(pairs),
            }
        )
    return rows


def _to_the_loss_of_the_base(pairs: Sequence[tuple[AblationRun, AblationRun]]) -> dict[str, float | None]:
    """Mean over seeds of steps and seconds, as fractions of those of the base."""
    steps, seconds = [], []
    for run, base in pairs:
        step = run.step_reaching(base.loss)
        if step is None:
            return {"steps": None, "seconds": None}
        steps.append(step / base.curve[-1][0])
        seconds.append(steps[-1] * run.seconds_per_step / base.seconds_per_step)
    return {"steps": statistics.fmean(steps), "seconds": statistics.fmean(seconds)}
