"""`minrnn fit`: a scaling law with intervals, from runs, a sweep or a CSV; the check of a ladder's rules."""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...common.checks import option_minimum_errors
from ...common.errors import UserError
from ...common.files import user_path, write_json
from ...pipeline.options import new_parser
from ..output import table
from ..record import command_line, commit, machine, versions
from .compare import Comparison, compare
from .figure import draw
from .points import COUNTS, PointSet, read_points
from .rates import FACTOR, Curve, draw_rates, optimizers_of, rates_table, read_curves, verdict
from .resample import NAMES, Fitted, fit_family, interval_of, missing_for_a_fit
from .words import BEYOND, paragraph

NUM_FRONTIER = 5  # computes of the frontier in the results
DESCRIPTION = """Fit L(N, D) = E + A / N^alpha + B / D^beta to the losses of runs: N parameters, D tokens.
PATH is a sweep's folder, a folder of runs, or a CSV file with the columns family, parameters, tokens, loss
(and flops, run). Intervals come from resampling the runs. Writes fit.json, fit.png and fit.txt."""
EPILOG = """examples:
  minrnn fit runs/laptop
  minrnn fit losses.csv --out fits/losses --replicates 1000
  minrnn fit runs/rules --check-rules     is the ladder's learning rate near the best?"""


def main(argv: Sequence[str]) -> None:
    """Fit, print a table and a paragraph, and write the results.

    Raises:
        UserError: points that cannot be read or are too few, or a wrong option.
    """
    arguments = _parser().parse_args(argv)
    if errors := option_minimum_errors(arguments, replicates=20, seed=0):
        raise UserError.from_list(errors)
    path, out = arguments.path, arguments.out or _default_out(arguments.path)
    if not path.exists():
        raise UserError(str(path), "there is no such file or folder")
    header = _header(argv, arguments)
    if arguments.check_rules:
        curves = read_curves(path)
        _check_out(out)
        _check_rules(path, curves, header, out)
        return
    points = read_points(path, arguments.count, arguments.leave_out_failed)
    missing = [text for each in points.families if (text := missing_for_a_fit(each)) is not None]
    if missing:
        raise UserError.from_list((str(path), text) for text in missing)
    _check_out(out)
    fitted = [
        fit_family(each, arguments.replicates, [arguments.seed, i]) for i, each in enumerate(points.families)
    ]
    comparisons = [
        comparison for pair in itertools.combinations(fitted, 2) if (comparison := compare(*pair)) is not None
    ]
    text = paragraph(fitted, comparisons, points.unit, points.notes)
    print(_table(fitted))
    print(f"\n{text}\n")
    write_json(out / "fit.json", header | _results(points, fitted, comparisons, text))
    (out / "fit.txt").write_text(text + "\n")
    _draw(out / "fit.png", (15, 4.8), lambda figure: draw(figure, fitted, points.unit))
    print(f"{out / 'fit.json'}, fit.png and fit.txt written")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn fit", DESCRIPTION, EPILOG)
    parser.add_argument(
        "path", type=user_path, metavar="PATH", help="a sweep, a folder of runs, or a CSV file"
    )
    parser.add_argument(
        "--out", type=user_path, help="folder to write to (default: PATH/fit; of a CSV, NAME-fit beside it)"
    )
    parser.add_argument(
        "--count",
        choices=COUNTS,
        default="blocks_and_head",
        help="the parameters of a run that are N. Exponents depend on it (default: %(default)s)",
    )
    parser.add_argument(
        "--replicates", type=int, default=400, help="resampled fits for the intervals (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")
    parser.add_argument(
        "--leave-out-failed",
        action="store_true",
        help="leave out runs that diverged or failed, and count them",
    )
    parser.add_argument(
        "--check-rules",
        action="store_true",
        help="fit no law: compare the learning rate of the ladder's rule with the best of its lr_factors, at "
        "each size; writes rules.json, rules.png and rules.txt",
    )
    return parser


def _check_rules(path: Path, curves: list[Curve], header: dict[str, Any], out: Path) -> None:
    """Print and write the check of the ladder's rule of the learning rate."""
    optimizers = optimizers_of(path)
    text = verdict(curves, optimizers)
    print(rates_table(curves))
    print(f"\n{text}\n")
    results = {"optimizers": optimizers, "curves": [curve.to_json() for curve in curves], "text": text}
    write_json(out / "rules.json", header | {"kind": "rules", "factor": FACTOR, **results})
    (out / "rules.txt").write_text(text + "\n")
    num_families = len({curve.family for curve in curves})
    _draw(out / "rules.png", (1 + 4 * num_families, 4), lambda figure: draw_rates(figure, curves))
    print(f"{out / 'rules.json'}, rules.png and rules.txt written")


def _default_out(path: Path) -> Path:
    return path / "fit" if path.is_dir() else path.with_name(f"{path.stem}-fit")


def _check_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--out", f"cannot write {out}: {error.strerror}") from None


def _header(argv: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("count", "replicates", "seed", "leave_out_failed")
    return {
        "command": command_line("minrnn fit", argv),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "config": {name: getattr(arguments, name) for name in names},
    }


def _results(
    points: PointSet, fitted: list[Fitted], comparisons: list[Comparison], text: str
) -> dict[str, Any]:
    return {
        "kind": "fit",
        "fit": "E + A / N^alpha + B / D^beta",
        "unit": points.unit,
        "left_out": points.notes,
        "families": {each.points.family: _family(each) for each in fitted},
        "pairs": [each.to_json() for each in comparisons],
        "text": text,
    }


def _family(each: Fitted) -> dict[str, Any]:
    points = each.points
    exponent = interval_of(
        each.law.exponent_of_compute(each.cost), each.replicates.exponent_of_compute(each.cost)
    )
    rows = zip(points.runs, points.parameters, points.tokens, points.compute, points.losses, strict=True)
    return {
        **{name: interval.to_json() for name, interval in each.intervals().items()},
        "exponent_of_compute": exponent.to_json(),
        "flops": {
            "is_counted": points.flops is not None,
            "factor": each.cost.factor,
            "power": each.cost.power,
        },
        "resampled": "runs" if each.is_by_run else "points",
        "root_mean_square_of_log_residuals": float(np.sqrt((each.residuals() ** 2).mean())),
        "leave_largest_out": each.leave_largest_out,
        "frontier": _frontier(each),
        "points": [
            {"run": run, "parameters": n, "tokens": d, "flops": c, "loss": loss}
            for run, n, d, c, loss in rows
        ],
    }


def _frontier(each: Fitted) -> list[dict[str, Any]]:
    """The compute-optimal sizes from the smallest run to BEYOND times the largest."""
    compute = each.points.compute
    rows = []
    for flops in np.geomspace(compute.min(), BEYOND * compute.max(), NUM_FRONTIER):
        values, others = (each.frontier(flops, laws) for laws in (each.law, each.columns()))
        row: dict[str, Any] = {"flops": float(flops)}
        for name, value, other in zip(("parameters", "tokens", "loss"), values, others, strict=True):
            row[name] = interval_of(value, other[:, 0]).to_json()
        rows.append(row)
    return rows


def _table(fitted: list[Fitted]) -> str:
    def cell(name: str) -> Any:
        return lambda row: "{value:.3g} ({low:.3g}, {high:.3g})".format(**row[name])

    rows = []
    for each in fitted:
        intervals = each.intervals()
        error = each.leave_largest_out
        rows.append(
            {
                "family": each.points.family,
                "runs": len(each.points.losses),
                "error": "-" if error is None else f"{error['relative_error']:+.2%}",
                **{name: vars(interval) for name, interval in intervals.items()},
            }
        )
    columns: dict[str, Any] = {"family": lambda row: row["family"], "runs": lambda row: str(row["runs"])}
    columns |= {name: cell(name) for name in NAMES}
    columns["largest run"] = lambda row: row["error"]
    return table(rows, columns, "L(N, D) = E + A / N^alpha + B / D^beta, with 95 % intervals")


def _draw(path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> None:
    """Write a picture of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    fill(figure)
    FigureCanvasAgg(figure).print_png(str(path))
