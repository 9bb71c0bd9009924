"""`data.corpus` as a list: the sources of a weighted mixture, each a name or a mapping."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError
from pydantic_core import PydanticCustomError

from ..common.errors import UserError
from ..common.names import did_you_mean, nearest_names
from ..data import RowRules, is_task
from .public import without_credentials
from .section import Section

EXAMPLE = "[a.txt, {corpus: b, weight: 2}]"


class SourceSection(Section):
    """A source of a mixture."""

    corpus: str = Field(min_length=1)
    """As data.corpus, but no task."""
    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """The source's share of the tokens, relative to the weights of the others."""
    order: Literal["auto", "documents", "passages"] = "auto"
    """passages: read text files in passages of at most 32 KiB, each with a reset state, and hold out the end
    of the text. auto: passages for text files that are fewer than the lanes of all readers, else
    documents."""
    subset: str | None = None
    """As data.subset."""
    split: str | None = None
    """As data.split."""
    revision: str | None = None
    """As data.revision."""
    text_field: str | None = None
    """As data.text_field."""
    commit: str | None = None
    """The commit that `revision` was resolved to. minrnn writes it to config.yaml."""
    template: str | None = Field(default=None, min_length=1)
    """As data.template."""
    filter: dict[str, Any] | None = None
    """As data.filter."""
    hold_out: Literal["auto", "documents", "shards"] | None = None
    """As data.hold_out."""
    join: str | None = None
    """As data.join."""


INHERITED = ("subset", "split", "revision", "text_field", "template", "filter", "hold_out", "join")
"""Fields of a source that default to those of the data section."""


def normalized_corpus(value: Any) -> Any:
    """`data.corpus` with each valid source of a list as a mapping of the same form; anything else unchanged.

    Raises:
        PydanticCustomError: the list is empty, or an item is neither a name nor a mapping.
    """
    if value == "":
        raise PydanticCustomError("string_too_short", "string should have at least 1 character")
    if not isinstance(value, list):
        return value
    if not value:
        raise PydanticCustomError("no_sources", "a mixture needs sources, such as " + EXAMPLE)
    sources = [{"corpus": item} if isinstance(item, str) else item for item in value]
    if not all(isinstance(item, dict) for item in sources):
        raise PydanticCustomError("no_source", "each source is a name or a mapping, as in " + EXAMPLE)
    return [_normalized(source) for source in sources]


def _normalized(source: dict[str, Any]) -> dict[str, Any]:
    try:
        return SourceSection.model_validate(source).model_dump(exclude_none=True)
    except ValidationError:
        return source  # source_errors reports it


def with_source_commits(
    corpus: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]], has_same_revision: bool
) -> list[dict[str, Any]]:
    """The sources with the commits of a saved list, for those that name the same dataset and revision.

    Args:
        has_same_revision: whether sources without a revision inherit the same one as before.
    """
    commits = {
        (source["corpus"], revision): source["commit"]
        for source in saved
        if source.get("commit") and ((revision := source.get("revision")) is not None or has_same_revision)
    }
    # The source's own commit comes last, so that it wins.
    return [
        {"commit": commits[key], **source}
        if (key := (source["corpus"], source.get("revision"))) in commits
        else source
        for source in corpus
    ]


def is_source_list(text: str) -> bool:
    """Whether a word of the command line is a list of sources, not a name. `[a]` is a glob."""
    try:
        value = yaml.load(text, yaml.BaseLoader) if text.startswith("[") else None
    except yaml.YAMLError:
        return False
    return isinstance(value, list) and (len(value) > 1 or any(isinstance(item, dict) for item in value))


def source_errors(corpus: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The errors of a list of sources, by the setting within `data`: `corpus[1].weight`."""
    errors: dict[str, str] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for number, source in enumerate(corpus):
        prefix = f"corpus[{number}]"
        try:
            section = SourceSection.model_validate(source)
        except ValidationError as invalid:
            errors |= {f"{prefix}.{name}": message for name, message in _field_errors(invalid)}
            continue
        try:
            RowRules.from_settings(section.template, section.filter or {})
        except UserError as error:
            errors |= {f"{prefix}.{key.removeprefix('data.')}": message for key, message in error.errors}
        if is_task(section.corpus):
            errors[prefix] = (
                f"{section.corpus} is a task, which cannot be part of a mixture; train on it alone"
            )
        identity = (section.corpus, section.subset, section.split, section.revision)
        if (first := seen.setdefault(identity, number)) != number:
            errors[prefix] = (
                f"{section.corpus} is in the list twice, also as corpus[{first}]; "
                "name it once and raise its weight"
            )
    return errors


def _field_errors(invalid: ValidationError) -> list[tuple[str, str]]:
    errors = []
    for error in invalid.errors():
        name = ".".join(map(str, error["loc"]))
        if error["type"] == "extra_forbidden":
            known = list(SourceSection.model_fields)
            hint = did_you_mean(nearest_names(name, known), otherwise=f"there are {', '.join(known)}")
            message = f"unknown key ({hint})"
        elif error["type"] == "missing":
            message = f"is missing; a source is a name or a mapping, as in {EXAMPLE}"
        elif name == "weight":
            message = f"must be a positive number, not {error['input']!r}; leave a source without weight out"
        else:
            message = f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
        errors.append((name, message))
    return errors


def source_names(corpus: str | Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the sources of `data.corpus`, for messages and metrics; those of the same corpus are told
    apart by what differs.
    """
    if isinstance(corpus, str):
        return [without_credentials(corpus)]
    names = [without_credentials(source["corpus"]) for source in corpus]
    details = [
        " ".join(str(source[name]) for name in ("subset", "split", "revision") if name in source)
        for source in corpus
    ]
    return [
        f"{name} {detail}" if names.count(name) > 1 and detail else name
        for name, detail in zip(names, details, strict=True)
    ]


def corpus_name(corpus: str | Sequence[Mapping[str, Any]]) -> str:
    """`data.corpus` in a few words."""
    return ", ".join(source_names(corpus))
