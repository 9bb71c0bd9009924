"""`minrnn ablate`: tune the learning rate of each variant, train each with each seed, compare."""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import write_json, write_text
from ...common.output import warn
from ...evals.ablation.measure import compared, read_runs, tuned_rates
from ...evals.ablation.show import draw, text
from ...evals.record import command_line, commit, machine, versions
from ...evals.scaling.points import PLAN
from ...pipeline.machine import resolve_device
from ...pipeline.options import new_parser
from ..sweep.command import add_options, check_options, plan_text, settings_options, train_sweep
from ..sweep.expand import expand
from ..sweep.spec import Sweep
from .spec import LR, Ablation, read_ablation, shipped_ablations

RESULT = "ablation.json"
DESCRIPTION = """Compare variants of a recipe. The learning rate of each variant is tuned on a grid; then each
is trained with each seed, and compared with the first variant seed by seed, on the same data in the same
order. ABLATION is a YAML file, or the name of one that comes with minrnn ({names}). The same command goes on
with an ablation that was stopped; variants may be added to the file later. Several may work on one folder."""
EPILOG = """examples:
  minrnn ablate block --plan            what would be trained, and how long it takes
  minrnn ablate block --workers 2       two runs at a time, each on half of the cores

ABLATION.yaml:
  out: runs/ablation
  base: quickstart
  settings: {train.precision: fp32, train.steps: 400}
  seeds: [0, 1, 2]
  tuning: {learning_rates: [2.0e-3, 4.0e-3, 8.0e-3], settings: {train.steps: 150}}
  variants:
    default: {}                         the first is compared with
    muon: {optim.name: muon}"""


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(shipped_ablations()) or "none"
    parser = new_parser("minrnn ablate", DESCRIPTION.format(names=names), EPILOG)
    parser.add_argument("ablation", metavar="ABLATION", help="a YAML file, or the name of a shipped ablation")
    add_options(parser, "ABLATION")
    return parser


def main(argv: Sequence[str]) -> None:
    """Plan an ablation, or train and compare. The exit status is 1 if a compared run failed.

    Raises:
        UserError: all errors of the ablation and the options, before anything is trained; or every run of a
            variant's tuning failed.
    """
    words, overrides = settings_options(argv)
    arguments = _parser().parse_args(words)
    check_options(arguments)
    ablation = read_ablation(arguments.ablation, overrides)
    if arguments.out is not None:
        ablation.out = os.path.expanduser(arguments.out)
    rates = dict.fromkeys(ablation.variants, ablation.tuning.learning_rates[0])
    tuning, comparison = ablation.tuning_sweep(), ablation.sweep(rates)
    errors: dict[tuple[str, str], None] = {}
    for sweep in filter(None, (tuning, comparison)):
        try:
            expand(sweep)
        except UserError as error:
            errors |= dict.fromkeys(error.errors)
    if errors:
        raise UserError.from_list(errors)
    if arguments.plan:
        for title, sweep in (("tuning", tuning), ("comparison", comparison)):
            if sweep is not None:
                print(f"{title}: {plan_text(sweep, expand(sweep), arguments)}\n")
        return
    tuned = [] if tuning is None else _tune(ablation, tuning, arguments.workers)
    rates |= {row["variant"]: row["lr"] for row in tuned}
    comparison = ablation.sweep(rates)
    _check_rates(Path(comparison.out), rates)
    has_failed = train_sweep(comparison, expand(comparison), arguments.workers)
    runs = read_runs(Path(comparison.out))
    rows = compared(runs, ablation.reference)
    if not rows:
        raise UserError("ablate", f"no run of {ablation.reference} is finished, so nothing can be compared")
    at_the_end = {row["variant"]: row["is_at_the_end"] for row in tuned}
    record = {
        "kind": "ablation",
        "command": command_line("minrnn ablate", argv),
        "commit": commit(),
        "machine": machine(resolve_device("auto")),
        "versions": versions(),
        "base": ablation.reference,
        "unit": runs[0].unit,
        "tuning": [{**row, "losses": _finite(row["losses"])} for row in tuned],
        "rows": [{**row, "is_at_the_end": at_the_end.get(row["variant"], False)} for row in rows],
    }
    out = Path(ablation.out)
    write_json(out / RESULT, record)
    write_text((out / RESULT).with_suffix(".txt"), text(record) + "\n")
    draw(record, (out / RESULT).with_suffix(".png"))
    print(f"\n{text(record)}\n{out / RESULT}, .txt and .png written")
    if has_failed:
        raise SystemExit(1)


def _check_rates(folder: Path, rates: dict[str, float]) -> None:
    """Raises UserError if runs of the comparison have another learning rate: the grid has changed since."""
    try:
        planned = json.loads((folder / PLAN).read_text())["runs"]
    except FileNotFoundError:
        return
    for entry in planned:
        best, trained = rates.get(entry["family"]), entry["settings"][LR]
        if best is not None and best != trained:
            message = (
                f"the best rate of {entry['family']} is now {best:g}, and {folder} has runs at {trained:g}"
            )
            raise UserError("tuning", f"{message}; name another out")


def _finite(losses: dict[float, float]) -> dict[str, float | None]:
    """Losses by learning rate for JSON, which has no number for those of failed runs."""
    return {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()}


def _tune(ablation: Ablation, sweep: Sweep, workers: int) -> list[dict[str, Any]]:
    """Train the tuning; the rows of `tuned_rates`."""
    if train_sweep(sweep, expand(sweep), workers):
        warn("runs of the tuning failed, as those with too high a learning rate do; they count as the worst")
    grid = ablation.tuning.learning_rates
    names = {ablation.tuning_name(name, rate): name for name in ablation.variants for rate in grid}
    tuned = tuned_rates(read_runs(Path(sweep.out), names), list(ablation.variants), grid)
    if failed := [row["variant"] for row in tuned if not math.isfinite(min(row["losses"].values()))]:
        raise UserError("tuning", f"every run of {', '.join(failed)} failed; {sweep.out}/logs say why")
    return tuned
