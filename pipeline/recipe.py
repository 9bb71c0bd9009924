"""A recipe from its file and the command line: every mistake found at once, each on a line of its own."""

import collections
import dataclasses
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
from .config import SECTIONS, Recipe, docstring_of
from .public import config_without_credentials

# What may change when a run goes on: where it lives, how long it is, how it reports. Everything else decides the losses; parallel.context does
# so with dropout alone (`free_on_resume`).
FREE_ON_RESUME = {
    *(
        "run.dir",
        "run.resume",
        "run.change",
        "data.workers",
        "data.validation_tokens",
        "data.trust_remote_code",
        "parallel.context",
    ),
    "model.max_position_embeddings",
    *(
        "train.steps",
        "train.device",
        "train.log_every",
        "train.eval_every",
        "train.save_every",
        "train.save_minutes",
        "train.keep_checkpoints",
        "train.save_in_background",
        "train.peer_timeout",
        "train.recompute",
        "train.prompts",
        "train.sample_tokens",
    ),
}
FIXED_ON_RESUME = ("model.", "batch.", "data.", "run.seed")  # positions and states would mean something else

USAGE = """usage: minrnn train --config RECIPE [--section.field VALUE ...]
       accelerate launch [--num_processes N ...] -m minrnn.pipeline.train --config RECIPE [--section.field VALUE ...]

Train a minimal RNN language model. RECIPE is a YAML file, or the name of one that comes with minrnn ({recipes}).
The same command goes on after any interruption. Examples:

  minrnn train --config quickstart
  minrnn train --config quickstart --run.dir runs/wide --model.hidden_size 384 --optim.lr 2e-3

A setting that is text takes VALUE as it is typed; null is for those that may be left out. Lists and mappings are written as in
YAML: --run.change '[optim.lr, optim.clip]' --train.prompts '["def ", "class "]' --data.task '{{length: 64}}'
"""
WIDTH = 110  # of lines of the help
NULL = ("null", "none")  # on the command line, of settings that may be None


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
    """`--config RECIPE` and the overrides by key, from `--key value` and `--key=value`."""
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
                errors.append(
                    (
                        key,
                        "lacks a value"
                        + (f" (if {words[0]} is meant to be it: --{key}={words[0]})" if words else ""),
                    )
                )
                continue
            value = words.popleft()
        if key == "config":
            config = value
        else:
            overrides[key] = value
    if errors:
        raise UserError.from_list(errors)
    return config, overrides


def _load_yaml(name: str) -> dict[str, Any]:
    path = shipped_recipes().get(name, user_path(name))
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            "--config",
            f"cannot read {name}: {reason}; recipes that come with minrnn: {', '.join(shipped_recipes())}",
        ) from None
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
    """Whether a word of the command line begins a setting, rather than being the value of one."""
    return word.startswith("--") and word.removeprefix("--").partition("=")[0] in ("config", *_known_keys())


def _unknown(key: str) -> tuple[str, str]:
    """The problem of an unknown key, with the nearest known one."""
    known = _known_keys()
    near = nearest_names(key, known)
    if not near:  # the field may be right and the section wrong
        near = [other for other in known if other.split(".")[1] == key.rsplit(".", 1)[-1]][:1]
    hint = did_you_mean(near, otherwise=f"sections: {', '.join(SECTIONS)}")
    return key, f"unknown key ({hint})"


def _message(error: Any) -> str:
    return (
        f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
        if error["type"] != "missing"
        else error["msg"]
    )


def _unchangeable(key: str) -> str | None:
    """Why a setting cannot be named in run.change, if it cannot."""
    if key not in _known_keys():
        return ": ".join(_unknown(key))
    if key.startswith(FIXED_ON_RESUME):
        return f"{key} cannot change within a run; start another with its own run.dir (model.init_from takes the weights along)"
    return None


def build_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from nested values.

    Raises:
        UserError: everything that is wrong.
    """
    errors: dict[str, str] = {}
    sections = {}
    for section in values.keys() - SECTIONS.keys():
        hint = did_you_mean(nearest_names(section, SECTIONS), otherwise=f"there are {', '.join(SECTIONS)}")
        errors[section] = f"unknown section ({hint})"
    for section, cls in SECTIONS.items():
        given = values.get(section)
        try:
            built = sections[section] = cls.model_validate({} if given is None else given)
            errors |= {f"{section}.{name}": problem for name, problem in built.errors().items()}
        except ValidationError as error:
            for one in error.errors():
                key = ".".join([section, *map(str, one["loc"][:1])])
                if one["type"] == "extra_forbidden":
                    key, problem = _unknown(key)
                else:
                    problem = _message(one)
                errors.setdefault(key, problem)
    if "run" in sections and (
        refused := [problem for key in sections["run"].change if (problem := _unchangeable(key))]
    ):
        errors["run.change"] = "; ".join(refused)
    if errors:
        raise UserError.from_list(errors.items())
    return Recipe(**sections)


def read_recipe(argv: list[str]) -> Recipe:
    """The recipe that a command line names, overrides applied.

    Raises:
        UserError: everything that is wrong with it.
    """
    config, overrides = parse_arguments(argv)
    values = _load_yaml(config) if config else {}
    errors = []
    for key, text in overrides.items():
        section, dot, name = key.partition(".")
        if not dot or section not in SECTIONS:
            errors.append(_unknown(key))
            continue
        if values.get(section) is None:
            values[section] = {}
        if isinstance(values[section], dict):
            field = SECTIONS[section].model_fields.get(name)
            values[section][name] = _value(text, field.annotation) if field else text
    try:
        recipe = build_recipe(values)
    except UserError as error:
        raise UserError.from_list([*errors, *error.errors]) from None
    if errors:
        raise UserError.from_list(errors)
    return recipe


def _value(text: str, annotation: Any) -> Any:
    """A word of the command line, as a field of this type takes it.

    Text stays as it is typed: YAML would make a number of `123`, a date of `2024-01-01`, a comment of what follows ` #`, and another folder of
    each. Everything else, and what is not of the field's type, pydantic reads or refuses.
    """
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if NoneType in kinds and text.lower() in NULL:
        return None
    if str in kinds or any(get_origin(kind) is Literal and text in get_args(kind) for kind in kinds):
        return text
    try:
        for kind in kinds:
            if get_origin(kind) is list:
                items = yaml.load(text, yaml.BaseLoader)  # leaves every scalar as it is written
                (item_type,) = get_args(kind)
                return (
                    [_value(item, item_type) if isinstance(item, str) else item for item in items]
                    if isinstance(items, list)
                    else text
                )
            if get_origin(kind) is dict:
                return yaml.safe_load(text)
        number = json.loads(text)
    except (yaml.YAMLError, ValueError):
        return text
    return number if isinstance(number, int | float) and not isinstance(number, bool) else text


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Everything the recipe says, defaults included and credentials left out: what config.yaml holds."""
    values = {name: getattr(recipe, name).model_dump(mode="json") for name in SECTIONS}
    values["model"] = {
        "preset": recipe.model.preset,
        "init_from": recipe.model.init_from,
        **recipe.model_fields_resolved(),
    }
    return config_without_credentials(values)


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """{"run": {"dir": ...}} -> {"run.dir": ...}"""
    return {
        f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()
    }


def schedule_steps_of(saved: dict[str, Any]) -> int:
    """Steps of the learning rate's schedule of a run whose resolved recipe was saved. Older runs had no other than train.steps."""
    return saved["optim"].get("schedule_steps") or saved["train"]["steps"]


def settled(recipe: Recipe, saved: dict[str, Any]) -> Recipe:
    """The recipe with what it leaves to the run: `optim.schedule_steps`, and `train.precision` where that is auto, as the
    run began with, unless run.change names them.

    Args:
        saved: the resolved recipe of the checkpoint to go on from; empty for a run that begins.
    """
    steps = recipe.optim.schedule_steps
    if steps is None:
        keeps = saved and "optim.schedule_steps" not in recipe.run.change
        steps = schedule_steps_of(saved) if keeps else recipe.train.steps
    precision = recipe.train.precision
    if saved and precision == "auto" and "train.precision" not in recipe.run.change:
        precision = saved["train"]["precision"]
    return dataclasses.replace(
        recipe,
        optim=recipe.optim.model_copy(update={"schedule_steps": steps}),
        train=recipe.train.model_copy(update={"precision": precision}),
    )


def free_on_resume(saved: dict[str, Any]) -> set[str]:
    """Settings that do not decide the losses of a run."""
    fixed = (
        {"parallel.context"} if saved["model"].get("dropout") else set()
    )  # each process of a context draws masks of its own
    return FREE_ON_RESUME - fixed


def check_unchanged(saved: dict[str, Any], recipe: Recipe, folder: str) -> None:
    """A run goes on with the settings it was started with; train.precision auto stands for any.

    Raises:
        UserError: each setting that differs, is not free to, and was not named in run.change.
    """
    old = flatten(saved) | {"optim.schedule_steps": schedule_steps_of(saved)}
    new = flatten(resolved(settled(recipe, saved)))
    allowed = free_on_resume(saved) | set(recipe.run.change)
    different = [
        key
        for key in new
        if key in old and old[key] != new[key] and key not in allowed and not key.startswith("tracking.")
    ]

    def problem(key: str) -> str:
        why = " (with model.dropout it decides which values are dropped)" if key == "parallel.context" else ""
        advice = "set it back, or name another run.dir"
        if not key.startswith(FIXED_ON_RESUME):
            advice += f", or accept the change with --run.change [{key}]"
        return f"is {new[key]!r}, but the run in {folder} was started with {old[key]!r}{why}; {advice}"

    if different:
        raise UserError.from_list((key, problem(key)) for key in different)
