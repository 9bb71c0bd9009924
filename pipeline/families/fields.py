"""What a recipe says about a family: fields of its configuration, checked before anything is built."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic_core import PydanticCustomError
from transformers import PreTrainedConfig

from ...common.names import did_you_mean, nearest_names
from . import registry
from .registry import TOKENIZER_FIELDS

COUNT = re.compile(r"(\d+(?:\.\d+)?)([kMGB]?)")
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
NUM_WIDTHS = 64  # to check the fields at


def parse_count(value: Any) -> Any:
    """The number that a text such as 10.7M names; what is no text is unchanged."""
    if not isinstance(value, str):
        return value
    if (match := COUNT.fullmatch(value.strip())) is None:
        raise PydanticCustomError("count", "must be a number such as 150000, 300k, 10M or 1.5B")
    return round(float(match[1]) * UNITS[match[2]])


def name_error(name: str) -> str | None:
    """Why there is no family of this name, with the nearest; None if there is one."""
    if name in registry.family_names():
        return None
    nearest = did_you_mean(nearest_names(name, registry.family_names(), count=2))
    known = "minrnn, gru, lstm, or a model type of transformers' causal language models"
    return f"{name!r} is none of {known}{f' ({nearest})' if nearest else ''}"


def _unknown_field(name: str, field: str) -> str:
    cls = registry.config_class(name).__name__
    return f"{cls} has no {field}{_hint(nearest_names(field, registry.config_fields(name)))}"


def _hint(names: list[str]) -> str:
    return f" ({did_you_mean(names)})" if names else ""


def field_errors(
    name: str, direct: dict[str, Any], family_config: dict[str, Any], is_sized: bool = False
) -> dict[str, str]:
    """Errors in the fields of a family other than ours, by setting of the section `model`.

    Args:
        direct: what the user set in the section itself.
        family_config: `model.family_config`.
        is_sized: `model.num_parameters` chooses the size.
    """
    if (error := name_error(name)) is not None:
        return {"family": error}
    try:
        known = registry.config_fields(name)
    except ImportError as error:
        return {"family": f"{name} cannot be used: {error}"}
    if not registry.has_vocabulary(name):
        text = f"; use {name}_text" if f"{name}_text" in registry.family_names() else ""
        return {"family": f"{name} is made of several models, not only of one that reads text{text}"}
    errors = {
        field: f"{_unknown_field(name, field)}; {_advice(name)}" for field in direct if field not in known
    }
    wrong = [
        _unknown_field(name, field) for field in family_config if field not in {*known, *TOKENIZER_FIELDS}
    ]
    if of_tokenizer := [field for field in TOKENIZER_FIELDS if field in family_config]:
        wrong.append(f"{', '.join(of_tokenizer)} {'is' if len(of_tokenizer) == 1 else 'are'} the tokenizer's")
    canonical = registry.canonical(name, direct)
    if twice := [field for field in registry.canonical(name, family_config) if field in canonical]:
        wrong.append(f"{', '.join(twice)} is also set in the section model itself; say it once")
    if errors or wrong:
        return errors | ({"family_config": "; ".join(wrong)} if wrong else {})
    values = {**canonical, **registry.canonical(name, family_config)}
    errors = _range_errors(name, values) or _value_errors(name, values, is_sized)
    return {setting_of(name, direct, field): message for field, message in errors.items()}


def setting_of(name: str, direct: Iterable[str], field: str | None) -> str:
    """The setting of the section model that a field of the configuration comes from.

    Args:
        direct: what the user set in the section itself.
        field: None for the whole configuration.
    """
    own = {registry.canonical_name(name, setting): setting for setting in direct}
    return "family_config" if field is None else own.get(field, f"family_config.{field}")


def _advice(name: str) -> str:
    own = ", ".join(field for field in SHARED if field in registry.config_fields(name))
    return f"leave it out; fields of {name} are set in model.family_config, and model.{{{own}}} mean the same"


SHARED = ("hidden_size", "num_hidden_layers", "intermediate_size", "tie_word_embeddings")


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _range_errors(name: str, fields: dict[str, Any]) -> dict[str | None, str]:
    """Values that no family can have, and that transformers does not check, by field."""
    counts, errors = {registry.canonical_name(name, count) for count in COUNTS}, {}
    for field, value in fields.items():
        if not is_number(value):
            continue
        if field in counts and value < 1:
            errors[field] = f"must be at least 1, not {value}"
        if ("dropout" in field or "pdrop" in field) and not 0 <= value <= 1:
            errors[field] = f"must be in [0, 1], not {value}"
    return errors


def _value_errors(name: str, fields: dict[str, Any], is_sized: bool) -> dict[str | None, str]:
    """What the configuration's own checks say about the values, by the fields at fault; by None if no single
    one is."""

    def message(fields: dict[str, Any]) -> str:
        try:
            checked_config(name, fields, is_sized)
        except Exception as error:  # each class raises its own
            return " ".join(str(error).split())
        return ""

    if not (text := message(fields)):
        return {}
    return dict.fromkeys(faulty_fields(fields, fields, lambda others: not message(others)), text)


def faulty_fields(
    fields: dict[str, Any], given: Iterable[str], works: Callable[[dict[str, Any]], bool]
) -> list[str | None]:
    """The fields whose values do not fit: those of `given` without which the others work; [None] if there is
    none such."""
    faulty: list[str | None] = [
        name for name in given if works({other: value for other, value in fields.items() if other != name})
    ]
    return faulty or [None]


def checked_config(name: str, fields: dict[str, Any], is_sized: bool) -> PreTrainedConfig:
    """The configuration with these fields: of the first of `sizes_to_check` that they fit.

    Raises:
        Exception: what the class says about its default size, if they fit none.
    """
    first: Exception | None = None
    for size in sizes_to_check(name, fields, is_sized):
        try:
            return registry.config_of(name, {**size, **fields})
        except Exception as error:  # each class raises its own
            first = first or error
    assert first is not None
    raise first


def sizes_to_check(name: str, given: dict[str, Any], is_sized: bool) -> Iterator[dict[str, Any]]:
    """Fields of the sizes at which the other fields are checked: none, which is the default size, and some
    that `model.num_parameters` may choose. 6 heads do not divide Llama's default width, but 384."""
    yield {}
    if is_sized and (family := registry.family(name)) is not None:
        for width in range(family.rule.step, NUM_WIDTHS * family.rule.step + 1, family.rule.step):
            yield registry.size_fields(name, (width, width), given)


def size_errors(
    name: str, num_parameters: int | None, direct: dict[str, Any], family_config: dict[str, Any]
) -> dict[str, str]:
    """Whether `model.num_parameters` contradicts a size that the user gave."""
    if num_parameters is None or name not in registry.family_names():
        return {}
    if (family := registry.family(name)) is None:
        cls = registry.config_class(name).__name__
        return {
            "num_parameters": f"cannot size {name}: {cls} has no hidden_size; set its sizes in family_config"
        }
    given = registry.canonical(name, {**direct, **family_config})
    width, *fine = family.fields((512, 512))
    chosen = [width, "intermediate_size"] if "intermediate_size" in fine else [width]
    # 0 is no MLP, so there is no size to choose
    if fixed := [field for field in chosen if given.get(field)]:
        verb = "is" if len(fixed) == 1 else "are"
        message = f"chooses the size, but {' and '.join(fixed)} {verb} set as well; leave either out"
        return {"num_parameters": message}
    return {}


def merged_fields(
    name: str, direct: dict[str, Any], family_config: dict[str, Any], sizes: dict[str, Any]
) -> dict[str, Any]:
    """All fields of the configuration that a recipe sets: sizes that were searched for, then the user's."""
    return {**sizes, **registry.canonical(name, direct), **registry.canonical(name, family_config)}
