"""Markdown, and the single HTML file made from it.

Links within the page lead to its headings by the anchors that GitHub gives them, so they work in Markdown and
in HTML. The HTML includes its pictures and has no scripts.
"""

import base64
import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported only where a page is made: the extra `eval` installs it
    from markdown_it.token import Token

NOT_RUN = "not run"
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d5d5d5; --shade: #f4f4f4;
  --link: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #444; --shade: #222;
  --link: #79b8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; margin: 2em 0 .5em; }
h1 { margin-top: .5em; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .2em; }
a { color: var(--link); }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3em .7em; text-align: left; white-space: nowrap; }
thead th { background: var(--shade); }
td:first-child { position: sticky; left: 0; background: var(--paper); max-width: 45vw; white-space: normal; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
code { background: var(--shade); padding: .1em .3em; border-radius: 3px; font-size: .9em; }
"""


def text(value: object) -> str:
    """Escape a text for Markdown, also within a table cell."""
    return re.sub(r"([\\`*_\[\]<>|!#&~])", r"\\\1", " ".join(str(value).split()))


def code(value: object) -> str:
    """A text as code in Markdown, also within a table cell."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "\\|") + "`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown."""
    assert all(len(row) == len(header) for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def slug(heading: str) -> str:
    """GitHub's anchor for a heading without Markdown."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def link(words: str, heading: str) -> str:
    """A link to a heading of the same page; `words` are Markdown."""
    return f"[{words}](#{slug(heading)})"


def to_html(markdown: str, title: str, folder: Path) -> str:
    """A single HTML page without external files.

    Args:
        markdown: names pictures relative to `folder`.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token, following in itertools.pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", slug("".join(child.content for child in following.children or [])))
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                _embed(child, folder)
    body = parser.renderer.render(tokens, parser.options, {})  # escapes each < of the text
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n{body}</body>\n</html>\n"
    )


def _embed(image: "Token", folder: Path) -> None:
    picture = base64.b64encode((folder / str(image.attrs["src"])).read_bytes()).decode()
    image.attrSet("src", f"data:image/png;base64,{picture}")
