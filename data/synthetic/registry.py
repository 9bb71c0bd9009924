"""Builds a task from `data.corpus: synthetic/NAME` and the options in `data.task`."""

from collections.abc import Mapping
from typing import Any, get_type_hints

from ...common.errors import UserError
from ...common.names import did_you_mean, nearest_names
from .formal import (
    BinaryMissingDuplicate,
    BucketSort5,
    BucketSort10,
    CycleNavigation,
    EvenPairs,
    Majority,
    MajorityCount,
    MissingDuplicate9,
    Parity,
)
from .recall import InductionHeads, MultiQueryRecall, Needle, SelectiveCopying
from .task import Task

PREFIX = "synthetic/"
TASKS: dict[str, type[Task]] = {
    "selective-copying": SelectiveCopying,
    "even-pairs": EvenPairs,
    "parity": Parity,
    "cycle-navigation": CycleNavigation,
    "missing-duplicate": BinaryMissingDuplicate,
    "missing-duplicate-9": MissingDuplicate9,
    "bucket-sort-5": BucketSort5,
    "bucket-sort-10": BucketSort10,
    "majority": Majority,
    "majority-count": MajorityCount,
    "mqar": MultiQueryRecall,
    "induction-heads": InductionHeads,
    "needle": Needle,
}


def is_synthetic(corpus: str) -> bool:
    """Whether a corpus name is that of a synthetic task."""
    return corpus.startswith(PREFIX)


def _suggestion(name: str, known: list[str]) -> str:
    return did_you_mean(nearest_names(name, known, count=2), otherwise=f"there are {', '.join(known)}")


def _checked(task: type[Task], options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options converted to their types, and the errors in them."""
    # imported here, since data workers do not need it
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    types: dict[str, Any] = get_type_hints(task)
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


def build_task(corpus: str, options: Mapping[str, Any] | None = None) -> Task:
    """Build the task of `synthetic/NAME`.

    Raises:
        UserError: the task does not exist (data.corpus), or options are unknown or invalid (data.task; all of
            them in one message).
    """
    name = corpus.removeprefix(PREFIX)
    if not is_synthetic(corpus) or name not in TASKS:
        raise UserError("data.corpus", f"there is no task {corpus} ({_suggestion(name, list(TASKS))})")
    values, errors = _checked(TASKS[name], options or {})
    task = TASKS[name](**values)
    errors += [f"{option}: {problem}" for option, problem in task.errors().items()]
    if errors:
        raise UserError("data.task", f"of {corpus}: " + "; ".join(errors))
    return task


def run_tokenizer(
    corpus: str, tokenizer: str, options: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> Any:
    """A run's tokenizer: the task's own for a synthetic corpus, otherwise the one that `data.tokenizer`
    names.

    Args:
        trust_remote_code: as in `load_tokenizer`.

    Raises:
        UserError: the task or the tokenizer does not exist.
    """
    from ..tokenizer import load_tokenizer

    return (
        build_task(corpus, options).tokenizer()
        if is_synthetic(corpus)
        else load_tokenizer(tokenizer, trust_remote_code)
    )
