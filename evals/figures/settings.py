"""The reference of all settings, docs/settings.md, from the docstrings of their fields."""

import json
import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ...pipeline.config import SECTIONS
from ...pipeline.section import docstring_of

# How a type is written in the column of values.
KINDS = {str: "text", int: "integer", float: "number", bool: "true, false", NoneType: "null"}


def text() -> str:
    """A table for each section: setting, default, values, meaning."""
    sections = []
    for section, cls in SECTIONS.items():
        lines = [f"## {section}", "", _cell(docstring_of(cls)), ""]
        lines += ["| setting | default | values | meaning |", "|---|---|---|---|"]
        for name, field in cls.model_fields.items():
            default = json.dumps(field.get_default(call_default_factory=True))
            values = ", ".join(dict.fromkeys(_kinds(field.annotation)))
            meaning = _cell(field.description or "")
            lines.append(f"| `{section}.{name}` | `{_cell(default)}` | {values} | {meaning} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _cell(text: str) -> str:
    """A text on one line, with links to pages, and with what Markdown reads as columns or tags escaped."""
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", line)


def _kinds(annotation: Any) -> list[str]:
    """The values that a field takes, in words."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    if origin is Literal:
        return [f"`{value}`" for value in get_args(annotation)]
    if origin is list:
        return ["list"]
    if origin is dict:
        return ["mapping"]
    return [KINDS[annotation]]
