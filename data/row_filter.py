"""How a row becomes a document: `data.template` puts several fields together, `data.filter` leaves rows out.

    row -> text (data.text_field or data.template) -> conditions of data.filter -> document, or left out

Both are pure functions of the row. A row that does not pass is counted apart from broken rows.
"""

import math
import re
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import UserError
from ..common.names import did_you_mean, nearest_names

MIN_BYTES, MAX_BYTES = "min_bytes", "max_bytes"  # conditions on the text itself
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
SCALARS = (str, int, float, bool)


@dataclass(frozen=True)
class Template:
    """A text with fields in braces, e.g. `{title}\\n\\n{text}`.

    Args:
        parts: texts and the fields that follow them.
    """

    source: str
    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, source: str) -> "Template":
        """Parse a template. `{{` and `}}` are braces, and backslash n and t a newline and a tab, which are
        hard to type in a shell. A name is taken as it is, without attributes, indices and formats.

        Raises:
            UserError: it is malformed or has no fields.
        """
        try:
            parsed = list(string.Formatter().parse(source))
        except ValueError as error:
            message = f"{source!r} is malformed ({error}); write {{{{ and }}}} for braces"
            raise UserError("data.template", message) from None
        parts = []
        for literal, name, format_spec, conversion in parsed:
            if name is not None and (format_spec or conversion or not name):
                message = f"{source!r} may hold names of fields in braces only, such as {{title}}"
                raise UserError("data.template", message)
            literal = re.sub(r"\\([nt\\])", lambda match: ESCAPES[match[1]], literal)
            parts.append((literal, name))
        if all(name is None for _, name in parts):
            raise UserError("data.template", f"{source!r} has no field in braces, such as {{title}}")
        return cls(source, tuple(parts))

    @property
    def fields(self) -> list[str]:
        """The names of the fields, each once."""
        return list(dict.fromkeys(name for _, name in self.parts if name is not None))

    def text(self, row: Mapping[str, Any], name: str) -> str:
        """The text of a row.

        Raises:
            UserError: the row lacks a field, or a field is null or neither text nor a number.
        """
        check_fields(self.fields, row.keys(), name, "data.template")
        values = {field: _as_text(row[field], field, name) for field in self.fields}
        return "".join(
            literal + ("" if field is None else values[field]) for literal, field in self.parts
        ).removeprefix("\ufeff")


def _as_text(value: Any, field: str, name: str) -> str:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            value = None  # half of a surrogate pair
        else:
            return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    kind = "no text" if value is None else f"{value!r:.40} ({type(value).__name__})"
    message = f"{name} holds {kind} in field {field!r} of the template; name a field of text or numbers"
    raise UserError("data.corpus", f"{message}, or set data.skip_broken to leave such documents out")


@dataclass(frozen=True)
class Condition:
    """What a field must hold: one of some values, or a number of a range."""

    field: str
    values: tuple[Any, ...] = ()
    """The allowed values; empty for a range."""
    minimum: float = -math.inf
    maximum: float = math.inf

    def allows(self, value: Any, name: str) -> bool:
        """Whether a value passes. Null and NaN never do.

        Raises:
            UserError: a range is asked of a value that is not a number.
        """
        if value is None:
            return False
        if self.values:
            return any(_is_equal(value, allowed) for allowed in self.values)
        try:  # csv holds numbers as text
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        if number is None:
            problem = (
                f"{name} holds {value!r:.40} in field {self.field!r}, of which data.filter asks a number"
            )
            raise UserError("data.filter", f"{problem}; ask for values instead, e.g. {self.field}: [a, b]")
        return self.minimum <= number <= self.maximum


def _is_equal(value: Any, allowed: Any) -> bool:
    if isinstance(value, bool) != isinstance(allowed, bool):
        return isinstance(value, str) and value.lower() == str(allowed).lower()
    if isinstance(value, str) and not isinstance(allowed, str):  # csv holds numbers as text
        return value == str(allowed)
    return value == allowed


@dataclass(frozen=True)
class RowRules:
    """The template and the filter of a recipe."""

    template: Template | None = None
    conditions: tuple[Condition, ...] = ()
    min_bytes: int = 0
    max_bytes: float = math.inf
    """Of the text in UTF-8."""

    @classmethod
    def from_settings(cls, template: str | None, conditions: Mapping[str, Any]) -> "RowRules":
        """The rules of `data.template` and `data.filter`.

        Raises:
            UserError: one or both are malformed; all errors at once.
        """
        errors, parsed, fields = [], None, []
        if template is not None:
            try:
                parsed = Template.parse(template)
            except UserError as error:
                errors += error.errors
        limits: dict[str, Any] = {}
        for field, value in conditions.items():
            try:
                if field in (MIN_BYTES, MAX_BYTES):
                    limits[field] = _bytes(field, value)
                else:
                    fields.append(_condition(field, value))
            except UserError as error:
                errors += error.errors
        if limits.get(MIN_BYTES, 0) > limits.get(MAX_BYTES, math.inf):
            errors.append(("data.filter", "min_bytes is greater than max_bytes, so nothing can pass"))
        if errors:
            raise UserError.from_list(errors)
        return cls(parsed, tuple(fields), **limits)

    def as_settings(self) -> dict[str, Any]:
        """The settings `template` and `filter` that `from_settings` makes the same rules of; JSON."""
        conditions: dict[str, Any] = {}
        for condition in self.conditions:
            limits = {"min": condition.minimum, "max": condition.maximum}
            finite = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
            conditions[condition.field] = list(condition.values) or finite
        if self.min_bytes > 0:
            conditions[MIN_BYTES] = self.min_bytes
        if self.max_bytes < math.inf:
            conditions[MAX_BYTES] = self.max_bytes
        template = None if self.template is None else self.template.source
        return {"template": template, "filter": conditions or None}

    @property
    def needs_fields(self) -> bool:
        """Whether the rules need rows with fields; a text file has none."""
        return self.template is not None or bool(self.conditions)

    def fields(self, text_field: str) -> list[str]:
        """The fields of a row that are read, each once."""
        of_text = [text_field] if self.template is None else self.template.fields
        return list(dict.fromkeys([*of_text, *(condition.field for condition in self.conditions)]))

    def columns(self, text_field: str, group_field: str | None) -> list[str]:
        """`fields`, and the column that rows are joined by, if there is one."""
        fields = self.fields(text_field)
        return fields if group_field in (None, *fields) else [*fields, group_field]

    def check_columns(self, columns: Collection[str], name: str) -> None:
        """Check that a file has the columns of the template and the filter.

        Raises:
            UserError: it lacks some; all errors at once.
        """
        errors = []
        of_template = [] if self.template is None else self.template.fields
        for key, fields in (
            ("data.template", of_template),
            ("data.filter", [condition.field for condition in self.conditions]),
        ):
            try:
                check_fields(fields, columns, name, key)
            except UserError as error:
                errors += error.errors
        if errors:
            raise UserError.from_list(errors)

    def passes_fields(self, row: Mapping[str, Any], name: str) -> bool:
        """Whether a row passes the conditions on its fields.

        Raises:
            UserError: it lacks a field, or holds no number where one is asked for.
        """
        check_fields([condition.field for condition in self.conditions], row.keys(), name, "data.filter")
        return all(condition.allows(row[condition.field], name) for condition in self.conditions)

    def passes_length(self, text: str) -> bool:
        """Whether a text passes `min_bytes` and `max_bytes`."""
        if self.min_bytes == 0 and self.max_bytes == math.inf:
            return True
        return self.min_bytes <= len(text.encode()) <= self.max_bytes


EVERY_ROW = RowRules()  # one field is the text, and nothing is left out


def check_fields(fields: Collection[str], columns: Collection[str], name: str, key: str) -> None:
    """Check that a row or a file has these fields.

    Raises:
        UserError: under `key`; it names the nearest columns, or all.
    """
    for field in fields:
        if field not in columns:
            suggested = map(repr, nearest_names(field, columns, count=2))
            advice = did_you_mean(suggested, otherwise=f"it has {', '.join(map(repr, columns))}")
            raise UserError(key, f"{name} has no field {field!r} ({advice})")


def _bytes(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError("data.filter", f"{field} must be a number of bytes, not {value!r}")
    return value


def _condition(field: str, value: Any) -> Condition:
    if isinstance(value, Mapping):
        limits = {"min": -math.inf, "max": math.inf}
        for name, limit in value.items():
            if name not in limits:
                raise UserError("data.filter", f"{field}: unknown key {name!r}; a range has min, max or both")
            if isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit):
                raise UserError("data.filter", f"{field}: {name} must be a number, not {limit!r}")
            limits[name] = float(limit)
        if not value or limits["min"] > limits["max"]:
            raise UserError("data.filter", f"{field}: no number is in the range {dict(value)}")
        return Condition(field, minimum=limits["min"], maximum=limits["max"])
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or not all(isinstance(item, SCALARS) for item in values):
        message = f"{field}: must be a value, a list of values or a range {{min: 0, max: 1}}, not {value!r}"
        raise UserError("data.filter", message)
    return Condition(field, values)
