"""A recipe, read from its file and the command line. All errors are reported at once, one per line."""

import collections
import json
import textwrap
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from ..common.errors import UserError
from ..common.files import user_path
from ..common.names import did_you_mean, nearest_names
from .batch_settings import batch_errors
from .config import SECTIONS, Recipe
from .eval_section import eval_errors
from .families.registry import OURS
from .family_settings import family_errors, without_carried_state
from .public import config_without_credentials
from .push.settings import push_errors
from .section import docstring_of
from .source_settings import is_source_list
from .task_settings import task_errors, with_family_error, with_prepared_tokenizer, with_whole_examples

# run.change may not name these, because saved positions and states would not fit.
FIXED_ON_RESUME = ("model.", "batch.", "data.", "run.seed", "optim.name")
# Except these: a text may move, since the text itself is compared.
MOVABLE_ON_RESUME = ("data.corpus", "data.validation")

USAGE = """usage: minrnn train --config RECIPE [--section.field VALUE ...] [--quiet | --verbose]
       accelerate launch [--num_processes N ...] -m minrnn.pipeline.train --config RECIPE [...]

Train a language model (a minimal RNN, or any model.family), or a classifier (data.corpus lra/NAME). RECIPE is
a YAML file or the name of a recipe that comes with minrnn:
{recipes}.

The same command resumes a run that was interrupted. On a terminal it shows a progress bar; elsewhere it
prints a line every train.log_every steps. --quiet prints warnings and errors only. --verbose prints these
lines on a terminal too, the phases of the set-up with their times, and the libraries' warnings. Examples:

  minrnn train --config quickstart
  minrnn train --config quickstart --run.dir runs/wide --model.hidden_size 384 --optim.lr 2e-3

The VALUE of a text setting is taken literally. null stands for no value, in settings that allow it. Lists and
mappings are written as in YAML:
--run.change '[optim.lr, optim.clip]' --train.prompts '["def ", "class "]' --data.task '{{length: 64}}'
"""
WIDTH = 110  # of lines of the help
NULL = ("null", "none")  # on the command line, for settings that may be None


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    folder = Path(str(resources.files("minrnn") / "launch" / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def help_text() -> str:
    """Usage, and every setting with its default and description."""
    lines = [USAGE.format(recipes=", ".join(shipped_recipes()))]
    for section, cls in SECTIONS.items():
        lines.append(_wrap(f"{section}: {docstring_of(cls)}", indent=0))
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True)
            lines += [f"  --{section}.{name}  [{default}]", _wrap(field.description or "", indent=8)]
        lines.append("")
    return "\n".join(lines)


def _wrap(text: str, indent: int) -> str:
    margin = " " * indent
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=margin, subsequent_indent=margin)


def parse_arguments(argv: list[str]) -> tuple[str | None, dict[str, str]]:
    """RECIPE of `--config RECIPE`, and the overrides by key, from `--key value` and `--key=value`.

    Raises:
        UserError: words that are no option, and options without a value.
    """
    config, overrides, errors = None, {}, []
    words = collections.deque(argv)
    while words:
        word = words.popleft()
        if not word.startswith("--"):
            errors.append((word, "is no option; settings are written --section.field VALUE"))
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not words or _is_option(words[0]):
                hint = f" (if {words[0]} is meant to be it: --{key}={words[0]})" if words else ""
                errors.append((key, f"lacks a value{hint}"))
                continue
            value = words.popleft()
        if key == "config":
            config = value
        else:
            overrides[key] = value
    if errors:
        raise UserError.from_list(errors)
    return config, overrides


def recipe_values(name: str) -> dict[str, Any]:
    """The values in a recipe's file, section -> field -> value, unchecked.

    Args:
        name: of a recipe that comes with minrnn, or a path.

    Raises:
        UserError: the file cannot be read, or is no mapping.
    """
    path = shipped_recipes().get(name, user_path(name))
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        reason, shipped = error.strerror or type(error).__name__, ", ".join(shipped_recipes())
        message = f"cannot read {name}: {reason}; recipes that come with minrnn: {shipped}"
        raise UserError("--config", message) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("--config", f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded or {}, dict):
        raise UserError(
            "--config", f"{name} must hold sections ({', '.join(SECTIONS)}), not a {type(loaded).__name__}"
        )
    return loaded or {}


def _known_keys() -> list[str]:
    return [f"{section}.{name}" for section, cls in SECTIONS.items() for name in cls.model_fields]


def _is_option(word: str) -> bool:
    """Whether a word of the command line is an option, not a value."""
    return word.startswith("--") and word.removeprefix("--").partition("=")[0] in ("config", *_known_keys())


def unknown_key_error(key: str) -> tuple[str, str]:
    """The error of an unknown key, with the most similar known key."""
    known = _known_keys()
    similar = nearest_names(key, known)
    if not similar:  # the field may be right and the section wrong
        similar = [other for other in known if other.split(".")[1] == key.rsplit(".", 1)[-1]][:1]
    hint = did_you_mean(similar, otherwise=f"sections: {', '.join(SECTIONS)}")
    return key, f"unknown key ({hint})"


def _error_message(error: Any) -> str:
    return (
        f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
        if error["type"] != "missing"
        else error["msg"]
    )


def _reason_not_changeable(key: str) -> str | None:
    """Why run.change cannot name a setting, or None."""
    if key not in _known_keys():
        return ": ".join(unknown_key_error(key))
    if key.startswith(FIXED_ON_RESUME) and key not in MOVABLE_ON_RESUME:
        return (
            f"{key} cannot change within a run; start another with its own run.dir "
            "(model.init_from takes the weights along)"
        )
    return None


def build_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from nested values, section -> field -> value.

    Raises:
        UserError: all errors.
    """
    errors: dict[str, str] = {}
    sections = {}
    for section in values.keys() - SECTIONS.keys():
        hint = did_you_mean(nearest_names(section, SECTIONS), otherwise=f"there are {', '.join(SECTIONS)}")
        errors[section] = f"unknown section ({hint})"
    for section, cls in SECTIONS.items():
        fields = values.get(section)
        try:
            built = sections[section] = cls.model_validate({} if fields is None else fields)
            errors |= {f"{section}.{name}": message for name, message in built.errors().items()}
        except ValidationError as invalid:
            for error in invalid.errors():
                key = ".".join([section, *map(str, error["loc"][:1])])
                if error["type"] == "extra_forbidden":
                    key, message = unknown_key_error(key)
                else:
                    message = _error_message(error)
                errors.setdefault(key, message)
    errors = with_family_error(errors, sections)
    changes = sections["run"].change if "run" in sections else []
    if refused := [reason for key in changes if (reason := _reason_not_changeable(key))]:
        errors["run.change"] = "; ".join(refused)
    if errors:
        raise UserError.from_list(errors.items())
    recipe = with_prepared_tokenizer(with_whole_examples(Recipe(**sections)))
    checks = (batch_errors, family_errors, task_errors, push_errors, eval_errors)
    if errors := {key: message for check in checks for key, message in check(recipe).items()}:
        raise UserError.from_list(errors.items())
    return without_carried_state(recipe)


def read_recipe(argv: list[str]) -> Recipe:
    """The recipe that a command line names, with its overrides.

    Raises:
        UserError: all errors.
    """
    config, overrides = parse_arguments(argv)
    values = recipe_values(config) if config else {}
    errors = []
    for key, text in overrides.items():
        section, dot, name = key.partition(".")
        if not dot or section not in SECTIONS:
            errors.append(unknown_key_error(key))
            continue
        if values.get(section) is None:
            values[section] = {}
        if isinstance(values[section], dict):
            values[section][name] = setting_value(key, text)
    try:
        recipe = build_recipe(values)
    except UserError as error:
        raise UserError.from_list([*errors, *error.errors]) from None
    if errors:
        raise UserError.from_list(errors)
    return recipe


def setting_value(key: str, text: str) -> Any:
    """The value of a setting `section.field` from a word of the command line: text if the key is unknown."""
    section, _, name = key.partition(".")
    field = SECTIONS[section].model_fields.get(name) if section in SECTIONS else None
    return _parse_value(text, field.annotation) if field else text


def _parse_value(text: str, annotation: Any) -> Any:
    """A word of the command line, converted for a field of this type.

    Text is taken literally, since YAML would read `123` as a number, `2024-01-01` as a date and ` #` as the
    start of a comment. Pydantic checks the result.
    """
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if NoneType in kinds and text.lower() in NULL:
        return None
    is_text = str in kinds and not (any(get_origin(kind) is list for kind in kinds) and is_source_list(text))
    if is_text or any(get_origin(kind) is Literal and text in get_args(kind) for kind in kinds):
        return text
    try:
        for kind in kinds:
            if get_origin(kind) is list:
                items = yaml.load(text, yaml.BaseLoader)  # keeps every scalar as text
                (item_type,) = get_args(kind)
                return (
                    [_parse_value(item, item_type) if isinstance(item, str) else item for item in items]
                    if isinstance(items, list)
                    else text
                )
            if get_origin(kind) is dict:
                return yaml.safe_load(text)
        number = json.loads(text)
    except (yaml.YAMLError, ValueError):
        return text
    return number if isinstance(number, int | float) and not isinstance(number, bool) else text


def resolved_config(recipe: Recipe) -> dict[str, Any]:
    """All settings with their values, defaults included, credentials removed: the content of config.yaml."""
    values = {name: getattr(recipe, name).model_dump(mode="json") for name in SECTIONS}
    values["model"] = _resolved_model(recipe)
    return config_without_credentials(values)


def _resolved_model(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model
    sized = {"num_parameters": model.num_parameters, "sizes": model.sizes} if model.num_parameters else {}
    if model.family == OURS:
        fields = recipe.resolved_model_fields()
        return {"preset": model.preset, "init_from": model.init_from, **fields, **sized}
    given = {name: value for name, value in recipe.resolved_model_fields().items() if name not in model.sizes}
    return {
        "family": model.family,
        "init_from": model.init_from,
        "family_config": given,
        **sized,
        "limits": model.limits,
    }


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """{"run": {"dir": ...}} -> {"run.dir": ...}"""
    return {
        f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()
    }
