"""`minrnn figures carrying`: what carrying the state buys, from the runs of distance.yaml or long-books.yaml.

sweeps -> each finished run: its export reads the held-out documents, state carried and reset at its chunk
          (SWEEP/runs/NAME/evals/carrying.json, so a run is measured once)
       -> mean over seeds with its interval, by distance or by position
       -> evals/results/carrying-NAME.json and .png -> the part `carrying-NAME` of docs/long-context.md
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ...common.errors import UserError
from ...common.files import make_folder, user_path, write_json
from ...common.output import warn
from ...data import Task, build_task, is_task, load_held_out
from ...pipeline.loading import load, require_state
from ...pipeline.machine import resolve_device
from ...pipeline.options import new_parser
from ...pipeline.pictures import save_figure
from ..long_context.distance import measure_task
from ..long_context.positions import bucket_edges, token_nats
from ..output import RESULTS
from ..record import command_line, commit, machine, versions
from ..report.carrying import UNITS, carrying_blocks
from ..report.compare import estimate

NOT_TRAINED = "No results are committed yet."
MODES = ("carried", "reset")
DESCRIPTION = """Measure the runs of the sweeps of evals/figures/distance.yaml or long-books.yaml, and write
evals/results/carrying-NAME.json and .png. `make docs` then writes docs/long-context.md anew."""
EPILOG = """examples:
  minrnn figures carrying runs/distance runs/distance-later --name distance
  minrnn figures carrying runs/long-books runs/long-books-later --name books"""


def main(argv: list[str]) -> None:
    """Measure what is finished, and write the results.

    Raises:
        UserError: a folder is no sweep, or no run is finished.
    """
    parser = new_parser("minrnn figures carrying", DESCRIPTION, EPILOG)
    parser.add_argument("sweeps", nargs="+", type=user_path, metavar="SWEEP", help="folders of sweeps")
    parser.add_argument("--name", choices=UNITS, required=True, help="of the study")
    parser.add_argument(
        "--piece", type=int, default=8192, help="tokens per forward pass (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    runs = [run for sweep in arguments.sweeps for run in finished_runs(sweep)]
    if not runs:
        raise UserError("SWEEP", f"no run of {', '.join(map(str, arguments.sweeps))} is finished yet")
    measured = [(family, measured_run(folder, arguments.piece)) for family, folder in runs]
    record = {
        "kind": "carrying",
        "study": arguments.name,
        "command": command_line("minrnn figures carrying", argv),
        "commit": commit(),
        "machine": machine(resolve_device("auto")),
        "versions": versions(),
        "rows": pooled(measured),
        "chance": measured[0][1].get("chance"),
    }
    write_json(result_path(arguments.name), record)
    draw(record, result_path(arguments.name).with_suffix(".png"))
    print(docs_text(arguments.name))


def result_path(name: str) -> Path:
    """The results file of a study."""
    return RESULTS / f"carrying-{name}.json"


def finished_runs(sweep: Path) -> list[tuple[str, Path]]:
    """(variant, folder) of the finished runs of a sweep. Variants that differ in the seed of the model that
    they begin with are one: NAME-of-SEED.

    Raises:
        UserError: the folder is no sweep.
    """
    try:
        planned = json.loads((sweep / "sweep.json").read_text())["runs"]
    except (OSError, ValueError, KeyError):
        raise UserError("SWEEP", f"{sweep} is not the folder of a sweep; minrnn sweep makes it") from None
    runs = [(re.sub(r"-of-\d+$", "", run["family"]), sweep / "runs" / run["name"]) for run in planned]
    finished = [(family, folder) for family, folder in runs if (folder / ".finished").exists()]
    if len(finished) < len(runs):
        warn(f"{len(runs) - len(finished)} of {len(runs)} runs of {sweep} are not finished and left out")
    return finished


def measured_run(folder: Path, piece: int) -> dict[str, Any]:
    """How a run was trained, and what its model loses with the state carried and reset at its chunk:
    {"trained": MODE, "points": [{"from", "to", "carried", "reset"}], "chance"}."""
    out = folder / "evals" / "carrying.json"
    if out.exists():
        return json.loads(out.read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data, chunk = config["data"], config["batch"]["chunk"]
    model = require_state(load(str(folder), "fp32", "auto", spells_text=not is_task(data["corpus"]))[0])
    print(f"measuring {folder}", flush=True)
    if is_task(data["corpus"]):
        task = build_task(data["corpus"], data["task"])
        assert isinstance(task, Task)
        result = measure_task(model, task, [chunk], [], piece)
        points = [
            {
                "from": row["from"],
                "to": row["to"],
                "carried": 100 * row["accuracy"]["carried"],
                "reset": 100 * row["accuracy"][str(chunk)],
            }
            for row in result["distance"][:-1]
        ]
        result: dict[str, Any] = {"points": points, "chance": 100 * result["chance"]}
    else:
        documents = [
            tokens.astype(np.int64) for tokens in held_out_documents(folder / "validation") if len(tokens) > 1
        ]
        nats = [token_nats(model, tokens, (None, chunk), piece) for tokens in documents]
        result = {"points": position_points(nats)}
    result["trained"] = "carried" if config["batch"]["carry_state"] else "reset"
    make_folder(out.parent)
    write_json(out, result)
    return result


def held_out_documents(folder: Path) -> list[np.ndarray]:
    """The tokens of each held-out document of a run."""
    held_out = load_held_out(folder, json.loads((folder / "manifest.json").read_text())["made_from"])
    assert held_out is not None
    ends = np.cumsum(held_out.lengths)
    return [held_out.tokens[end - length : end] for end, length in zip(ends, held_out.lengths, strict=True)]


def position_points(nats: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Mean losses between positions that double, over the documents that reach them.

    Args:
        nats: of each document, carried and reset, [2, n].
    """
    points = []
    for first, last in itertools.pairwise(bucket_edges(max(own.shape[1] for own in nats))):
        values = np.concatenate([own[:, first:last] for own in nats], axis=1).mean(1)
        points.append({"from": first, "to": last, **dict(zip(MODES, values.tolist(), strict=True))})
    return points


def pooled(measured: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean over seeds of each variant and point: {"variant", "trained", "from", "to", "seeds", MODE: {"mean",
    "half_width"}}."""
    rows = []
    for variant, trained in dict.fromkeys((variant, result["trained"]) for variant, result in measured):
        seeds = [result["points"] for other, result in measured if other == variant]
        for points in zip(*seeds, strict=True):
            row = {"variant": variant, "trained": trained, "seeds": len(seeds)}
            row |= {edge: points[0][edge] for edge in ("from", "to")}
            for mode in MODES:
                mean = estimate([point[mode] for point in points])
                row[mode] = {"mean": mean.mean, "half_width": mean.half_width}
            rows.append(row)
    return rows


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw a curve for each variant: as it was trained, and dotted if tested with a carried state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    variants = dict.fromkeys((row["variant"], row["trained"]) for row in record["rows"])
    for number, (variant, trained) in enumerate(variants):
        rows = [row for row in record["rows"] if row["variant"] == variant]
        positions = [(max(row["from"], 1) * row["to"]) ** 0.5 for row in rows]
        for mode in dict.fromkeys((trained, "carried")):
            label = variant if mode == trained else f"{variant}, tested carried"
            axes.errorbar(
                positions,
                [row[mode]["mean"] for row in rows],
                [row[mode]["half_width"] or 0 for row in rows],
                color=f"C{number}",
                linestyle="-" if mode == trained else ":",
                marker="o",
                markersize=3,
                capsize=2,
                label=label,
            )
    if record["chance"]:
        axes.axhline(record["chance"], color="tab:gray", linestyle="--", label="chance")
    axes.set_xscale("log", base=2)
    what = "distance of the answer" if record["study"] == "distance" else "position in the document"
    axes.set(xlabel=f"{what} (tokens)", ylabel=UNITS[record["study"]])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure)
    save_figure(figure, path)


def docs_text(name: str) -> str:
    """The part of docs/long-context.md: a table and the figure."""
    if not result_path(name).exists():
        return NOT_TRAINED
    record = json.loads(result_path(name).read_text())
    picture = f"![What carrying buys: {name}](../evals/results/carrying-{name}.png)"
    return f"{carrying_blocks(record)}\n\n{picture}"
