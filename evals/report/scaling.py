"""The section on scaling laws (`minrnn fit`, `minrnn figures study`)."""

from collections.abc import Sequence
from typing import Any

from .page import NOT_RUN, link, table, text
from .sources import ResultSource

COLUMNS = ("family", "runs", "E", "alpha", "beta", "error on the largest run")


def scaling_section(sources: Sequence[ResultSource]) -> str:
    """The laws and the checks of the ladder's rules, one block for each file."""
    blocks = [fit_blocks(source) for source in sources if source.kind == "fit"]
    blocks += [rules_line(source) for source in sources if source.kind == "rules"]
    return "\n\n".join(blocks) or f"Scaling laws: {NOT_RUN}."


def fit_blocks(source: ResultSource) -> str:
    """The numbers of each family with intervals, and the paragraph of the fit."""
    rows = [[link(text(name), source.name), *law_cells(law)] for name, law in source.data["families"].items()]
    return f"{table(COLUMNS, rows)}\n\n{text(source.data['text'])}"


def rules_line(source: ResultSource) -> str:
    """Whether the ladder's learning rate is near the best."""
    return f"{text(source.data['text'])} From {link(text(source.name), source.name)}."


def law_cells(law: dict[str, Any]) -> list[str]:
    """What the columns say about a family's law, after its name."""
    held_out = law["leave_largest_out"]
    return [
        str(len(law["points"])),
        *(interval_text(law[key]) for key in ("E", "alpha", "beta")),
        "-" if held_out is None else f"{held_out['relative_error']:+.2%}",
    ]


def interval_text(interval: dict[str, float]) -> str:
    """A value with its interval."""
    return "{value:.3g} ({low:.3g} to {high:.3g})".format(**interval)
