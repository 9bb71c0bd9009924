"""What carrying the state buys (`minrnn figures carrying`): its table, and the report's section."""

from collections.abc import Sequence
from typing import Any

from .page import NOT_RUN, table
from .sources import ResultSource, blocks_by_file

UNITS = {"distance": "accuracy (%)", "books": "nats per byte"}
"""Of each study."""


def carrying_blocks(record: dict[str, Any]) -> str:
    """Caption and table in Markdown."""
    study = record["study"]
    lines: dict[tuple[str, str, int], dict[int, str]] = {}
    for row in record["rows"]:
        for mode in dict.fromkeys((row["trained"], "carried")):
            line = lines.setdefault((row["variant"], mode, row["seeds"]), {})
            line[row["from"]] = _cell(row[mode], study)
    edges = sorted({row["from"] for row in record["rows"]})
    header = ("trained", "tested", "seeds", *(f"{edge:,}" for edge in edges))
    body = [
        [variant, mode, str(seeds), *(line.get(edge, "-") for edge in edges)]
        for (variant, mode, seeds), line in lines.items()
    ]
    kind = "distance of the answer" if study == "distance" else "position"
    chance = f"; chance {record['chance']:.1f}" if record["chance"] else ""
    caption = f"{UNITS[study]} by {kind}, from the number of tokens in the head to twice that{chance}"
    made_by = f"mean over seeds ± half of a 95 % t-interval. Made by `{record['command']}`."
    return f"{caption}; {made_by}\n\n{table(header, body)}"


def _cell(value: dict[str, Any], study: str) -> str:
    digits = 1 if study == "distance" else 4
    half = "" if value["half_width"] is None else f" ± {value['half_width']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"


def carrying_section(sources: Sequence[ResultSource]) -> str:
    """One block for each file."""
    blocks = blocks_by_file(sources, "carrying", carrying_blocks)
    return blocks or f"Models trained with the state carried and reset: {NOT_RUN}."
