"""Corpora that are tasks: `data.corpus: synthetic/NAME` or `lra/NAME`, with the options in `data.task`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeGuard, get_type_hints

from ..common.errors import UserError
from ..common.names import did_you_mean, nearest_names
from .lra import LRA_TASKS, LabelledTask
from .prepared import check_prepared_tokenizer, prepared_corpora
from .synthetic import SYNTHETIC_TASKS, Task

AnyTask = Task | LabelledTask
TASKS: dict[str, type[AnyTask]] = {
    **{f"synthetic/{name}": task for name, task in SYNTHETIC_TASKS.items()},
    **{f"lra/{name}": task for name, task in LRA_TASKS.items()},
}
PREFIXES = ("synthetic/", "lra/")


def is_task(corpus: object) -> TypeGuard[str]:
    """Whether a corpus is the name of a task, and no text or mixture."""
    return isinstance(corpus, str) and corpus.startswith(PREFIXES)


def is_labelled(corpus: object) -> TypeGuard[str]:
    """Whether a corpus is the name of a task with one label for each example."""
    return isinstance(corpus, str) and corpus.startswith("lra/")


def _suggestion(name: str, known: list[str]) -> str:
    return did_you_mean(nearest_names(name, known, count=2), otherwise=f"there are {', '.join(known)}")


def _checked(task: type[AnyTask], options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options converted to their types, and the errors in them."""
    # imported here, since data workers do not need it
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints = get_type_hints(task)
    types: dict[str, Any] = {field.name: hints[field.name] for field in dataclasses.fields(task)}
    values, errors = {}, []
    for name, value in options.items():
        if name not in types:
            errors.append(f"unknown option {name} ({_suggestion(name, list(types))})")
            continue
        adapter = TypeAdapter(types[name], config=ConfigDict(allow_inf_nan=False))
        try:
            values[name] = adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            errors.append(f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}")
    return values, errors


def build_task(corpus: str, options: Mapping[str, Any] | None = None) -> AnyTask:
    """Build the task of `synthetic/NAME` or `lra/NAME`.

    Raises:
        UserError: the task does not exist (data.corpus), or options are unknown or invalid (data.task; all of
            them in one message).
    """
    if corpus not in TASKS:
        raise UserError("data.corpus", f"there is no task {corpus} ({_suggestion(corpus, list(TASKS))})")
    values, errors = _checked(TASKS[corpus], options or {})
    task = TASKS[corpus](**values)
    errors += [f"{option}: {problem}" for option, problem in task.errors().items()]
    if errors:
        raise UserError("data.task", f"of {corpus}: " + "; ".join(errors))
    return task


def run_tokenizer(
    corpus: object, tokenizer: str, options: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> Any:
    """A run's tokenizer: the task's own, or the one that `data.tokenizer` names for a text.

    Args:
        trust_remote_code: as in `load_tokenizer`.

    Raises:
        UserError: the task or the tokenizer does not exist, or a prepared corpus was made with another
            tokenizer.
    """
    from .tokenizer import load_tokenizer, tokenizer_fingerprint

    if is_task(corpus):
        return build_task(corpus, options).tokenizer()
    loaded = load_tokenizer(tokenizer, trust_remote_code)
    for name in prepared_corpora(corpus):
        check_prepared_tokenizer(name, tokenizer, tokenizer_fingerprint(loaded))
    return loaded
