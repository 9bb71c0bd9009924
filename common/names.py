"""Suggestions for a name that is not known."""

import difflib
from collections.abc import Iterable


def nearest_names(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The known names most similar to `name`, best first: at most `count`, of at least `cutoff` (0 to 1)."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)


def did_you_mean(names: Iterable[str], otherwise: str = "") -> str:
    """`did you mean A or B?`, or `otherwise` if there are no names."""
    suggested = " or ".join(names)
    return f"did you mean {suggested}?" if suggested else otherwise


def counted(count: int, noun: str) -> str:
    """`1 document`, `2,000 documents`; of a noun with a regular plural."""
    sibilant = noun.endswith(("s", "x", "ch", "sh"))
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if sibilant else "s")
