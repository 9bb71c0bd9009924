"""`minrnn eval` on the tasks of Long Range Arena: the accuracy of a classifier on their test splits.

names -> tasks with their examples -> for each: score_labels -> one file in the format of lm-eval
"""

import argparse
import math
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from ...common.errors import UserError
from ...common.files import write_json
from ...data import (
    LabelledSet,
    LabelledTask,
    build_task,
    cache_folder,
    is_labelled,
    model_vocab_size,
    open_data,
)
from ...pipeline.classification import load_classifier, score_labels
from ...pipeline.processes import world_size
from ...pipeline.public import public_config, public_value
from ..output import default_out, run_folder, table
from ..record import command_line, commit, machine, versions
from .results import Results, merge, track


def labelled_names(text: str) -> list[str]:
    """The names of `--tasks` if they are those of labelled tasks (lra/NAME); empty if none is.

    Raises:
        UserError: names of both kinds.
    """
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    labelled = [name for name in names if is_labelled(name)]
    others = [name for name in names if not is_labelled(name)]
    if labelled and others:
        message = f"{labelled[0]} is for a classifier and {others[0]} for a language model"
        raise UserError("--tasks", f"{message}; evaluate them with two commands")
    return labelled


def _saved_options(model: str, name: str) -> tuple[dict[str, Any], str | None]:
    """`data.task` and `data.cache` of the model's run, if it was trained on this task."""
    run = run_folder(model)
    values = {} if run is None else yaml.safe_load((run / "config.yaml").read_text())["data"]
    return (values.get("task") or {}, values.get("cache")) if values.get("corpus") == name else ({}, None)


def _task_errors(model: Any, name: str, task: LabelledTask) -> list[tuple[str, str]]:
    """Why a classifier cannot be evaluated on a task."""
    config = model.config
    checks = (
        ("labels", ", ".join(task.LABELS), ", ".join(config.id2label.values())),
        ("texts in an example", task.TOWERS, config.num_towers),
        ("rows of the embedding", model_vocab_size(task.tokenizer()), config.vocab_size),
    )
    return [
        ("--tasks", f"{name} is not the task of the model: its {what} are {needed}, the model's {own}")
        for what, needed, own in checks
        if needed != own
    ]


def _open(model: Any, arguments: argparse.Namespace, names: list[str]) -> dict[str, LabelledSet]:
    """The test split of each task.

    Raises:
        UserError: all errors of the tasks' names, options and data, and tasks that do not fit the model.
    """
    sets, errors = {}, []
    for name in names:
        options, cache = _saved_options(arguments.model, name)
        try:
            task = build_task(name, {**options, **arguments.task_options})
            assert isinstance(task, LabelledTask)
            if not_fitting := _task_errors(model, name, task):
                errors += not_fitting
                continue
            examples = open_data(task, cache_folder(cache)).examples("test")
        except UserError as error:
            errors += error.with_keys({"data.corpus": "--tasks", "data.task": "--task-options"}).errors
            continue
        limit = arguments.limit
        if limit is not None:
            examples = examples.subset(math.ceil(limit * len(examples)) if limit < 1 else int(limit))
        sets[name] = LabelledSet(examples, task.num_labels, 0, 1, int(arguments.batch_size), task.pad)
    if errors:
        raise UserError.from_list(errors)
    return sets


def _results(name: str, score: dict[str, Any], options: dict[str, Any]) -> Results:
    """A task's score in the format of lm-eval."""
    accuracy, count = score["accuracy"], score["examples"]
    error = math.sqrt(accuracy * (1 - accuracy) / max(count - 1, 1))
    values = {"alias": name, "acc,none": accuracy, "acc_stderr,none": error, "loss,none": score["loss"]}
    config = {"task": name, "output_type": "classification", "metadata": public_config(options)}
    return {
        "results": {name: {**values, "chance": score["chance"]}},
        "configs": {name: config},
        "versions": {name: 1},
        "n-shot": {name: 0},
        "higher_is_better": {name: {"acc": True, "loss": False}},
        "n-samples": {name: {"original": count, "effective": count}},
    }


def evaluate_labelled(arguments: argparse.Namespace, names: list[str], argv: list[str]) -> Path:
    """Evaluate, print the table, write the file; returns its path.

    Raises:
        UserError: the model is no classifier, or the tasks cannot be used.
    """
    if world_size() > 1:
        raise UserError("--tasks", f"{names[0]} is evaluated by one process; start one")
    if isinstance(arguments.batch_size, str):  # auto
        arguments.batch_size = 32
    model = load_classifier(arguments.model, arguments.dtype, arguments.device)
    sets = _open(model, arguments, names)
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    out = arguments.out or default_out(arguments.model, "lm-eval")
    name = public_value(str(run_folder(arguments.model) or arguments.model))
    header = {
        "command": command_line("minrnn eval", argv),
        "commit": commit(),
        "machine": machine(model.device),
        "packages": versions(),
        "config": {"model": name, "model_args": {"pretrained": name, "dtype": arguments.dtype}},
    }
    results: Results = {}
    for task, part in sets.items():
        score = score_labels(model, [part], accelerator)
        options = {**_saved_options(arguments.model, task)[0], **arguments.task_options}
        new = _results(task, score, options)
        results = merge(results, {**header, **new})
        write_json(out, results)
        if (run := run_folder(arguments.model)) is not None:
            track(run, new)
    rows = [{"task": task, **values} for task, values in results["results"].items()]
    columns = {
        "task": lambda row: row["task"],
        "accuracy": lambda row: f"{row['acc,none']:.4f} ± {row['acc_stderr,none']:.4f}",
        "chance": lambda row: f"{row['chance']:.4f}",
        "loss": lambda row: f"{row['loss,none']:.4f}",
        "examples": lambda row: f"{results['n-samples'][row['task']]['effective']:,}",
    }
    print(table(rows, columns, "test splits"), f"results: {out}", sep="\n")
    return out
