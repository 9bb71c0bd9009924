"""`minrnn figures study`: the committed study of scaling laws, and the text of docs/sweeps.md made from it.

runs of launch/sweeps/laptop.yaml -> minrnn fit -> evals/results/study-NAME.json and .png
  -> the part `study` of docs/sweeps.md (docs.py)
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import user_path, write_json
from ...pipeline.options import new_parser
from ..output import RESULTS, si
from ..record import command_line
from ..report.page import table
from ..report.scaling import COLUMNS, interval_text, law_cells
from ..scaling import command as fit
from ..scaling.words import BEYOND

NAME = "books"
NOT_TRAINED = "No study is committed yet."
DESCRIPTION = """Fit the laws of a study's sweep and write evals/results/study-NAME.json and .png.
`make docs` then writes docs/sweeps.md anew."""
EPILOG = """examples:
  minrnn sweep laptop --workers 2 --settings.data.corpus 'books/*.parquet' --out runs/books
  minrnn figures study runs/books --name books"""


def main(argv: list[str]) -> None:
    """Write the results of a study.

    Raises:
        UserError: the sweep cannot be fitted.
    """
    parser = new_parser("minrnn figures study", DESCRIPTION, EPILOG)
    parser.add_argument("sweep", type=user_path, metavar="SWEEP", help="folder of the sweep")
    parser.add_argument("--name", default=NAME, help="of the study (default: %(default)s)")
    parser.add_argument(
        "--leave-out-failed", action="store_true", help="leave out runs that diverged or failed"
    )
    parser.add_argument(
        "--replicates", type=int, default=400, help="resampled fits for the intervals (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if not arguments.name.replace("-", "").isalnum():
        raise UserError("--name", f"must be of letters, digits and -, not {arguments.name!r}")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--replicates", str(arguments.replicates)]
        options += ["--leave-out-failed"] if arguments.leave_out_failed else []
        fit.main([str(arguments.sweep), "--out", folder, *options])
        record = json.loads((Path(folder) / "fit.json").read_text())
        command = command_line("minrnn figures study", argv)
        write_json(result_path(arguments.name), record | {"command": command, "study": arguments.name})
        picture = (Path(folder) / "fit.png").read_bytes()
        result_path(arguments.name).with_suffix(".png").write_bytes(picture)
    print(f"{result_path(arguments.name)} and .png written; `make docs` writes docs/sweeps.md anew")


def result_path(name: str) -> Path:
    """The results file of a study."""
    return RESULTS / f"study-{name}.json"


def docs_text(name: str = NAME) -> str:
    """The text of docs/sweeps.md: the laws, and the verdict on each pair."""
    record = _load(name)
    if record is None:
        return NOT_TRAINED
    laws = [[family, *law_cells(law)] for family, law in record["families"].items()]
    blocks = [
        record["text"],
        table(COLUMNS, laws),
        table(("pair", "difference of the loss", "at FLOPs", "verdict"), [*map(_pair, record["pairs"])]),
        f"![Scaling laws](../evals/results/study-{name}.png)",
    ]
    return "\n\n".join(blocks)


def readme_text(name: str = NAME) -> str:
    """The part `scaling` of README.md: the range, the figure, and the verdicts against Llama."""
    record = _load(name)
    if record is None:
        return NOT_TRAINED
    points = [point for law in record["families"].values() for point in law["points"]]
    sizes = [point["parameters"] for point in points]
    ratios = [point["tokens"] / point["parameters"] for point in points]
    compute = max(point["flops"] for point in points)
    pairs = [pair for pair in record["pairs"] if "Llama" in (pair["first"], pair["second"])]
    differences = ", ".join(difference_from("Llama", pair) for pair in pairs)
    return "\n\n".join(
        [
            f"{len(points)} byte models of books with {si(min(sizes))} to {si(max(sizes))} parameters, "
            f"trained on {min(ratios):.0f} to {max(ratios):.0f} bytes per parameter with two CPU cores "
            "([the laws, and how they were made](docs/sweeps.md)):",
            f"![Scaling laws](evals/results/study-{name}.png)",
            f"Loss less that of Llama, in bits per byte with 95 % intervals: {differences}. Nothing here "
            f"says anything about more than {BEYOND * compute:.0e} FLOPs.",
        ]
    )


def difference_from(family: str, pair: dict[str, Any]) -> str:
    """The loss of the other family of a pair less that of this one, with its interval and compute."""
    sign, other = (1, pair["first"]) if pair["second"] == family else (-1, pair["second"])
    value, *sides = (sign * pair["difference"][name] for name in ("value", "low", "high"))
    low, high = sorted(sides)
    return f"{other} {value:+.2f} ({low:+.2f} to {high:+.2f}) at {pair['compute'][1]:.2g} FLOPs"


def _load(name: str) -> dict[str, Any] | None:
    path = result_path(name)
    return json.loads(path.read_text()) if path.exists() else None


def _pair(pair: dict[str, Any]) -> list[str]:
    lower, higher = pair["first"], pair["second"]
    if pair["difference"]["value"] > 0:
        lower, higher = higher, lower
    verdict = f"{lower} is lower" if pair["is_distinguishable"] else "not distinguishable"
    if pair["crossing"] is not None:
        verdict += f"; they cross at {pair['crossing']['value']:.2g} FLOPs"
    return [
        f"{pair['first']} - {pair['second']}",
        interval_text(pair["difference"]),
        f"{pair['compute'][1]:.2g}",
        verdict,
    ]
