"""The tasks of `minrnn eval`: found by name, loaded with their data, and split into units of evaluation."""

import functools
import json
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.names import did_you_mean, nearest_names


@functools.cache
def task_manager(include_path: Path | None, metadata: str = "") -> Any:
    """lm-eval's index of tasks, cached: lm-eval reads thousands of files to make it, which takes seconds.

    Args:
        metadata: for tasks that need some, as JSON.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, metadata=json.loads(metadata) if metadata else None)


def task_names(manager: Any, text: str) -> list[str]:
    """The task names that `--tasks` lists, with patterns expanded.

    Raises:
        UserError: unknown names, each with suggestions.
    """
    names, errors = [], []
    for word in dict.fromkeys(word.strip() for word in text.split(",") if word.strip()):
        matches = manager.match_tasks([word])
        names += [name for name in matches if name not in names]
        if not matches:
            near = nearest_names(word, manager.all_tasks, count=3)
            hint = did_you_mean(near, otherwise="lm_eval ls tasks lists all")
            errors.append(("--tasks", f"there is no {word!r} ({hint})"))
    if not names and not errors:
        errors.append(("--tasks", "names no task"))
    if errors:
        raise UserError.from_list(errors)
    return names


def load_tasks(manager: Any, names: list[str]) -> dict[str, list[Any]]:
    """lm-eval's tasks or group for each name, with their data.

    Raises:
        UserError: the tasks that cannot be loaded, all of them, before any computation.
    """
    loaded, errors = {}, []
    for name in names:
        try:
            task_objects = manager.load([name])
        except Exception as error:  # the hub's client, datasets and a task's own code each raise their own
            lines = str(error).strip().splitlines() or [""]
            offline = "; its data are downloaded from the network" if _is_network(error) else ""
            errors.append(("--tasks", f"cannot load {name}: {type(error).__name__}: {lines[0]}{offline}"))
            continue
        groups, tasks = task_objects["groups"], task_objects["tasks"]
        loaded[name] = [groups[name]] if name in groups else list(tasks.values())
    if errors:
        raise UserError.from_list(errors)
    return loaded


def _is_network(error: BaseException | None) -> bool:
    """Whether an error was caused by a failed connection."""
    while error is not None:
        if (
            isinstance(error, ConnectionError)
            or "Connect" in type(error).__name__
            or "Offline" in type(error).__name__
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def evaluation_units(
    tasks: dict[str, list[Any]], manager: Any, window: int | None
) -> dict[str, tuple[list[Any], int | None]]:
    """What is evaluated in one call, by name for messages: (tasks or a group, None), and perplexities in
    windows apart.
    """
    units: dict[str, tuple[list[Any], int | None]] = {}
    for name, objects in tasks.items():
        units[name] = objects, None
        rolling = [
            task
            for task in manager.load(objects)["tasks"].values()
            if task.OUTPUT_TYPE == "loglikelihood_rolling"
        ]
        if rolling and window is not None:
            units[f"{name}, in windows of {window}"] = rolling, window
    return units
