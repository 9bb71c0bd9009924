"""`minrnn figures docs`: writes the generated parts of README.md and docs/ (`make docs`).

A generated part stands between `<!-- name -->` and `<!-- /name -->`. It comes from the committed results, or
from the docstrings of the settings. `tests/docs/test_generated.py` compares every part with its source.
"""

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path

from ..output import RESULTS
from . import ablation, carrying, families_table, quality, settings, speed, study

REPOSITORY = RESULTS.parents[1]
Parts = dict[str, Callable[[], str]]
PAGES: dict[str, Parts] = {
    "README.md": {
        "quickstart": speed.quickstart_line,
        "comparison": speed.comparison,
        "scaling": study.readme_text,
    },
    "docs/results.md": {
        "speed": speed.text,
        "gpu": speed.gpu_lines,
        "quality": quality.text,
    },
    "docs/ablations.md": {
        f"ablation-{name}": functools.partial(ablation.docs_text, name) for name in ablation.NAMES
    },
    "docs/compare.md": {"families": families_table.docs_text},
    "docs/guarantees.md": {"soak": speed.soak_line},
    "docs/long-context.md": {
        f"carrying-{name}": functools.partial(carrying.docs_text, name) for name in carrying.UNITS
    },
    "docs/settings.md": {"settings": settings.text},
    "docs/sweeps.md": {"study": study.docs_text},
    "docs/transformers.md": {"counts": quality.transformers_lines},
}


def generated(page: str) -> str:
    """The text of a page, with every generated part made anew.

    Args:
        page: path relative to the repository.
    """
    text = (REPOSITORY / page).read_text()
    for name, make in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", flags=re.DOTALL)
        assert len(pattern.findall(text)) == 1, f"{page} has no part {name}, or several"
        content = make()
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}{match[2]}", text)
    return text


def stale_pages() -> list[str]:
    """The pages whose generated parts differ from their sources."""
    return [page for page in PAGES if generated(page) != (REPOSITORY / page).read_text()]


def main(argv: list[str]) -> None:
    """Write the generated parts of all pages, and print the pages that changed."""
    argparse.ArgumentParser("minrnn figures docs", description=__doc__).parse_args(argv)
    pages = stale_pages()
    for page in pages:
        Path(REPOSITORY / page).write_text(generated(page))
    print("\n".join(pages) or "all pages are up to date")
