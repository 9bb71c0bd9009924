"""Scores of a model as huggingface_hub's `EvalResult`: for the card's table and its `model-index`."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ...data import is_labelled
from .sources import data_sources

LANGUAGE_MODELING, CLASSIFICATION = "text-generation", "text-classification"
# Scores of minrnn's own lines in metrics.jsonl: key, type of the metric, its name.
SCORES = (
    ("bits_per_byte", "bits_per_byte", "bits per byte"),
    ("accuracy", "accuracy", "accuracy"),
    ("accuracy_scaled", "accuracy_scaled", "accuracy, scaled so that guessing gives 0"),
)

METRIC_TYPES: dict[str, str] = {"acc": "accuracy", "acc_norm": "accuracy_norm"}  # of lm-eval's names


def validation_results(entries: Iterable[dict[str, Any]], data: dict[str, Any]) -> list[EvalResult]:
    """Results of lines of metrics.jsonl of kind validation or test, the newest of each kind.

    Args:
        data: the section `data` of the resolved recipe, as published.
    """
    newest = {entry["kind"]: entry for entry in entries}
    return [
        result
        for kind in ("validation", "test")
        if kind in newest
        for result in _own_results(newest[kind], kind, data)
    ]


def _own_results(entry: dict[str, Any], kind: str, data: dict[str, Any]) -> list[EvalResult]:
    sources = data_sources(data)
    task = CLASSIFICATION if is_labelled(data["corpus"]) else LANGUAGE_MODELING
    name = data.get("validation") or ", ".join(source.name for source in sources)
    separate, single = data.get("validation"), sources[0] if len(sources) == 1 else None
    common: dict[str, Any] = {
        "task_type": task,
        "dataset_type": name,
        "dataset_name": name if separate or kind == "test" else f"{name}, held out",
        "dataset_split": "test" if kind == "test" else "validation",
        "dataset_revision": data.get("validation_commit") if separate else single and single.revision,
        "dataset_config": data.get("validation_subset") if separate else single and single.subset,
    }
    results = [
        EvalResult(metric_type=metric, metric_name=label, metric_value=round(entry[key], 4), **common)
        for key, metric, label in SCORES
        if _is_number(entry.get(key))
    ]
    for source, bits in (entry.get("by_source") or {}).items():
        if _is_number(bits):
            part = {**common, "dataset_type": source, "dataset_name": f"{source}, held out"}
            part |= {"dataset_revision": None, "dataset_config": None, "metric_name": "bits per byte"}
            results.append(EvalResult(metric_type="bits_per_byte", metric_value=round(bits, 4), **part))
    return results


def lm_eval_results(paths: Sequence[Path]) -> list[EvalResult]:
    """Results of files of `minrnn eval` (lm-eval, Long Range Arena). The newest file of a task counts; paths
    are in the order of their times. Files of other kinds are left out."""
    by_task: dict[tuple[str, Any], list[EvalResult]] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and isinstance(content.get("results"), dict) and "n-shot" in content:
            for task in content["results"]:
                shots = content["n-shot"].get(task)
                by_task[task, shots] = _task_results(content, task, shots)
    return [result for results in by_task.values() for result in results]


def _task_results(content: dict[str, Any], task: str, shots: Any) -> list[EvalResult]:
    config = content.get("configs", {}).get(task) or {}
    is_classifier = config.get("output_type") == "classification"
    limit, dataset = (content.get("config") or {}).get("limit"), config.get("dataset_path")
    arguments = {"num_few_shot": shots} if shots else {}
    arguments |= {"limit": limit} if limit else {}
    results = []
    for key, value in content["results"][task].items():
        name, comma, kind = str(key).partition(",")
        if not comma or name.endswith("_stderr") or not _is_number(value):
            continue
        is_plain = kind in ("none", "")
        result = EvalResult(
            task_type=CLASSIFICATION if is_classifier else LANGUAGE_MODELING,
            dataset_type=dataset if isinstance(dataset, str) and dataset else task,
            dataset_name=task,
            dataset_config=config.get("dataset_name"),
            dataset_split=config.get("test_split") or ("test" if is_classifier else None),
            dataset_args=arguments or None,
            metric_type=METRIC_TYPES.get(name, name),
            metric_name=name if is_plain else f"{name} ({kind})",
            metric_value=round(value, 4),
        )
        results.append(result)
    return results


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def evaluations_table(results: Sequence[EvalResult]) -> str:
    """The results as a table in Markdown."""
    rows = [
        f"| {result.dataset_name}{_note(result)} | {result.metric_name} | {result.metric_value} |"
        for result in results
    ]
    return "\n".join(["| task or text | metric | value |", "|---|---|---|", *rows])


def _note(result: EvalResult) -> str:
    arguments = result.dataset_args or {}
    notes = [f"{arguments['num_few_shot']}-shot"] if "num_few_shot" in arguments else []
    notes += [f"first {arguments['limit']:g} examples"] if "limit" in arguments else []
    return f" ({', '.join(notes)})" if notes else ""
