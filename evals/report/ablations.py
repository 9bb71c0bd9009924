"""Ablations (`minrnn ablate`): the columns of their tables, and the report's section on them."""

from collections.abc import Sequence
from typing import Any

from ..output import si
from .page import NOT_RUN, table, text
from .sources import ResultSource, blocks_by_file


def difference_text(row: dict[str, Any]) -> str:
    """`-2.31 ± 0.20 %`."""
    value, half_width = row["difference"]["value"], row["difference"]["half_width"]
    return f"{value:+.2f} %" if half_width is None else f"{value:+.2f} ± {half_width:.2f} %"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


COLUMNS: dict[str, Any] = {
    "variant": lambda row: row["variant"],
    "parameters": lambda row: si(row["parameters"]),
    "lr": lambda row: f"{row['lr']:g}" + ("*" if row.get("is_at_the_end") else ""),
    "seeds": lambda row: str(len(row["seeds"])),
    "loss": lambda row: f"{row['loss']:.4f}",
    "difference": difference_text,
    "tokens/s": lambda row: si(row["tokens_per_second"]),
    "steps": lambda row: _fraction(row["steps"]),
    "seconds": lambda row: _fraction(row["seconds"]),
}


def caption(record: dict[str, Any]) -> str:
    """What the columns mean, and what is missing."""
    rows, base = record["rows"], record["base"]
    sentences = [
        f"Held-out loss in {record['unit']}, after {si(rows[0]['tokens'])} tokens.",
        f"difference: from {base}, in percent, paired by seed, with a 95 % interval.",
        f"steps, seconds: to the loss that {base} has at its end, as a fraction of its own.",
    ]
    if any(row.get("is_at_the_end") for row in rows):
        sentences.append("*: the best learning rate is at the end of the grid.")
    if record["missing"]:
        sentences.append(f"Not finished, and left out: {', '.join(record['missing'])}.")
    return " ".join(sentences)


def ablation_blocks(record: dict[str, Any]) -> str:
    """Caption and table in Markdown."""
    rows = [[text(cell(row)) for cell in COLUMNS.values()] for row in record["rows"]]
    return f"{text(caption(record))}\n\n{table(tuple(COLUMNS), rows)}"


def ablation_section(sources: Sequence[ResultSource]) -> str:
    """One block for each file."""
    return (
        blocks_by_file(sources, "ablation", ablation_blocks)
        or f"Changes to a recipe, one at a time: {NOT_RUN}."
    )
