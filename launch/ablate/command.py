"""`minrnn ablate`: tune the learning rate of each variant, train each with each seed, compare."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import write_json, write_text
from ...common.output import warn
from ...evals.ablation.measure import compared, read_runs, tuned_rates
from ...evals.ablation.show import draw, text
from ...evals.record import command_line, commit, machine, versions
from ...evals.scaling.points import PLAN, SAME_DATA
from ...pipeline.machine import resolve_device
from ...pipeline.options import new_parser
from ..sweep.command import add_options, parse, plan_text, train_sweep
from ..sweep.expand import PlannedRun, expand
from ..sweep.spec import Sweep
from .spec import COMPARISON, LR, Ablation

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
    parser = new_parser("minrnn ablate", DESCRIPTION.format(names=", ".join(Ablation.shipped())), EPILOG)
    parser.add_argument("file", metavar="ABLATION", help="a YAML file, or the name of a shipped ablation")
    add_options(parser, "ABLATION")
    return parser


def main(argv: Sequence[str]) -> None:
    """Plan an ablation, or train and compare. The exit status is 1 if a compared run failed.

    Raises:
        UserError: all errors of the ablation and the options, before anything is trained; or every run of the
            first variant's tuning failed.
    """
    ablation, arguments = parse(_parser(), argv, Ablation)
    parts = {"tuning": ablation.tuning_sweep(), "comparison": ablation.sweep(_first_rates(ablation))}
    expanded = _expand_all([sweep for sweep in parts.values() if sweep is not None])
    if arguments.plan:
        for title, sweep in parts.items():
            if sweep is not None:
                print(f"{title}: {plan_text(sweep, expanded[sweep.out], arguments)}\n")
        return
    tuned = []
    if (tuning := parts["tuning"]) is not None:
        tuned = _tune(ablation, tuning, expanded[tuning.out], arguments.workers)
    rates = {row["variant"]: row["lr"] for row in tuned}
    rates = rates or dict.fromkeys(ablation.variants, ablation.tuning.learning_rates[0])
    comparison = ablation.sweep(rates)
    _check_rates(Path(comparison.out), rates)
    runs = expand(comparison)
    has_failed = train_sweep(comparison, runs, arguments.workers)
    record = _result(ablation, tuned, runs, argv)
    out = Path(ablation.out)
    write_json(out / RESULT, record)
    write_text((out / RESULT).with_suffix(".txt"), text(record) + "\n")
    draw(record, (out / RESULT).with_suffix(".png"))
    print(f"\n{text(record)}\n{out / RESULT}, .txt and .png written")
    if has_failed:
        raise SystemExit(1)


def _first_rates(ablation: Ablation) -> dict[str, float]:
    """The learning rates that runs of the comparison have, or the grid's first for those not yet planned."""
    trained = _trained_rates(Path(ablation.out) / COMPARISON)
    return {name: trained.get(name, ablation.tuning.learning_rates[0]) for name in ablation.variants}


def _trained_rates(folder: Path) -> dict[str, float]:
    """The learning rate of each variant in the plan of a comparison; empty before it is planned."""
    try:
        planned = json.loads((folder / PLAN).read_text())["runs"]
    except FileNotFoundError:
        return {}
    return {entry["family"]: entry["settings"][LR] for entry in planned}


def _expand_all(sweeps: Sequence[Sweep]) -> dict[str, list[PlannedRun]]:
    """The runs of each sweep, by its folder.

    Raises:
        UserError: all errors of all runs, and runs whose losses would not compare.
    """
    errors: dict[tuple[str, str], None] = {}
    expanded = {}
    for sweep in sweeps:
        try:
            runs = expanded[sweep.out] = expand(sweep)
        except UserError as error:
            errors |= dict.fromkeys(error.errors)
            continue
        data = {run.family: _data(run) for run in runs}
        reference = next(iter(data.values()))
        if reference["is_task"]:
            message = "is a task; minrnn ablate compares losses on texts, and minrnn sweep trains tasks"
            errors["data.corpus", message] = None
        for family, own in data.items():
            if different := [key for key, value in own.items() if value != reference[key]]:
                message = f"differs in {', '.join(different)}: losses on different data do not compare"
                errors[f"variants.{family}", message] = None
    if errors:
        raise UserError.from_list(errors)
    return expanded


def _data(run: PlannedRun) -> dict[str, Any]:
    """What must be equal for losses to compare; tokenizers may differ, as bits per byte do compare."""
    own = run.recipe.data.model_dump(mode="json")
    keys = (key for key in SAME_DATA if key != "data.tokenizer")
    data = {key: own.get(key.removeprefix("data.")) for key in keys}
    return {"is_task": run.recipe.task() is not None, **data}


def _tune(ablation: Ablation, sweep: Sweep, expanded: list[PlannedRun], workers: int) -> list[dict[str, Any]]:
    """Train the tuning; the rows of `tuned_rates`, without variants of which every run failed.

    Args:
        expanded: the runs of the sweep.
    """
    if train_sweep(sweep, expanded, workers):
        warn("runs of the tuning failed, as those with too high a learning rate do; they count as the worst")
    grid = ablation.tuning.learning_rates
    names = {ablation.tuning_name(name, rate): name for name in ablation.variants for rate in grid}
    tuned = tuned_rates(read_runs(Path(sweep.out), names), list(ablation.variants), grid)
    failed = [row["variant"] for row in tuned if not math.isfinite(min(row["losses"].values()))]
    if ablation.reference in failed:
        message = f"every run of {ablation.reference} failed, which all others are compared with"
        raise UserError("tuning", f"{message}; {sweep.out}/logs say why")
    for name in failed:
        warn(f"every run of the tuning of {name} failed, so it is left out; {sweep.out}/logs say why")
    return [row for row in tuned if row["variant"] not in failed]


def _check_rates(folder: Path, rates: dict[str, float]) -> None:
    """Raises UserError if runs of the comparison have another learning rate: the grid has changed since."""
    for variant, trained in _trained_rates(folder).items():
        if (best := rates.get(variant, trained)) != trained:
            message = f"the best rate of {variant} is now {best:g}, and {folder} has runs at {trained:g}"
            raise UserError("tuning", f"{message}; name another out")


def _result(
    ablation: Ablation, tuned: list[dict[str, Any]], expanded: list[PlannedRun], argv: Sequence[str]
) -> dict[str, Any]:
    """The content of the results file.

    Args:
        tuned: from `_tune`.
        expanded: the runs of the comparison.

    Raises:
        UserError: no run of the reference is finished.
    """
    runs = [run for run in read_runs(Path(ablation.out) / COMPARISON) if run.variant in ablation.variants]
    rows = compared(runs, ablation.reference)
    if not rows:
        raise UserError("ablate", f"no run of {ablation.reference} is finished, so nothing can be compared")
    finished, trained = {(run.variant, run.seed) for run in runs}, {run.family for run in expanded}
    missing = [run.name for run in expanded if (run.family, run.recipe.run.seed) not in finished]
    missing += [f"{name} (its tuning failed)" for name in ablation.variants if name not in trained]
    at_the_end = {row["variant"]: row["is_at_the_end"] for row in tuned}
    return {
        "kind": "ablation",
        "command": command_line("minrnn ablate", argv),
        "commit": commit(),
        "machine": machine(resolve_device("auto")),
        "versions": versions(),
        "base": ablation.reference,
        "unit": runs[0].unit,
        "missing": missing,
        "tuning": [{**row, "losses": _finite(row["losses"])} for row in tuned],
        "rows": [{**row, "is_at_the_end": at_the_end.get(row["variant"], False)} for row in rows],
    }


def _finite(losses: dict[float, float]) -> dict[str, float | None]:
    """Losses by learning rate for JSON, which has no number for those of failed runs."""
    return {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()}
