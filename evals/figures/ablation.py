"""`minrnn figures ablation`: the committed results of an ablation, and the table of docs/ablations.md.

FOLDER/ablation.json and .png of `minrnn ablate` -> evals/results/ablation-NAME.json and .png
  -> the part `ablation-NAME` of docs/ablations.md (docs.py)
"""

import json
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import user_path, write_json
from ...pipeline.options import new_parser
from ..ablation.show import draw
from ..output import RESULTS
from ..report.ablations import ablation_blocks

NAMES = {"python": "Python's standard library", "books": "books"}
NOT_TRAINED = "No results are committed yet."
DESCRIPTION = """Keep the results of an ablation as evals/results/ablation-NAME.json and .png. `make docs`
then writes docs/ablations.md anew."""
EPILOG = """examples:
  minrnn ablate block --workers 2
  minrnn figures ablation runs/block --name python"""


def main(argv: list[str]) -> None:
    """Write the results file.

    Raises:
        UserError: the folder holds no result of an ablation.
    """
    parser = new_parser("minrnn figures ablation", DESCRIPTION, EPILOG)
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="folder of the ablation")
    parser.add_argument("--name", choices=NAMES, required=True, help="of the text it was trained on")
    arguments = parser.parse_args(argv)
    try:
        record: dict[str, Any] = json.loads((arguments.folder / "ablation.json").read_text())
    except OSError:
        message = f"{arguments.folder} holds no ablation.json; minrnn ablate writes it at its end"
        raise UserError("FOLDER", message) from None
    write_json(result_path(arguments.name), record)
    draw(record, result_path(arguments.name).with_suffix(".png"))
    print(docs_text(arguments.name))


def result_path(name: str) -> Path:
    """The results file of an ablation."""
    return RESULTS / f"ablation-{name}.json"


def docs_text(name: str) -> str:
    """The part of docs/ablations.md: a table and the figure."""
    if not result_path(name).exists():
        return NOT_TRAINED
    record = json.loads(result_path(name).read_text())
    picture = f"![Differences from {record['base']}](../evals/results/ablation-{name}.png)"
    made_by = f"Made by `{record['command']}`, commit {record['commit']}."
    return f"{ablation_blocks(record)}\n\n{made_by}\n\n{picture}"
