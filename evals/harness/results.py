"""The results of `minrnn eval`: merged over tasks, named, and sent to the run's MLflow."""

import json
import re
import time
from pathlib import Path
from typing import Any

from ...common.files import write_text
from ...common.output import warn
from ...pipeline.tracking_store import error_line, note_uri, open_client, read_note, sqlite_file

# Fields of lm-eval's results that are dictionaries by task.
MERGED = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
)
Results = dict[str, Any]  # what lm-eval's simple_evaluate returns


def merge(results: Results, new: Results) -> Results:
    """Add the results of one more task."""
    merged = {**results, **{key: value for key, value in new.items() if key != "samples"}}
    for key in MERGED:
        if key in results or key in new:
            merged[key] = {**results.get(key, {}), **new.get(key, {})}
    return merged


def write_samples(out: Path, results: Results) -> None:
    """Write the documents, requests and answers of each task beside the results: OUT-samples-TASK.jsonl."""
    from lm_eval.utils import handle_non_serializable

    encoder = json.JSONEncoder(default=handle_non_serializable, ensure_ascii=False)
    for task, samples in (results.get("samples") or {}).items():
        lines = (encoder.encode(sample) + "\n" for sample in samples)
        write_text(out.with_name(f"{out.stem}-samples-{task}.jsonl"), "".join(lines))


def rename_windowed(results: Results, window: int) -> Results:
    """Results of tasks that were read in windows, under their own names."""
    renamed = dict(results)
    for key in (*MERGED, "samples"):
        if results.get(key):
            renamed[key] = {f"{name}_window_{window}": value for name, value in results[key].items()}
    for name, values in renamed["results"].items():
        values["alias"] = name
    return renamed


def metric_values(results: Results) -> dict[str, float]:
    """The numbers by TASK/METRIC, in the characters that MLflow allows, from lm-eval's "acc,none"."""
    values = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            if "," in key and isinstance(value, int | float):
                parts = (task, *key.removesuffix(",none").split(","))
                values["/".join(re.sub(r"[^\w. /-]", "_", part) for part in parts)] = float(value)
    return values


def track(run: Path, results: Results) -> None:
    """Send metrics to the run's MLflow, as eval/TASK/METRIC. A failure is only a warning."""
    uri = ""
    try:
        note = read_note(run)
        if note is None:
            return
        from mlflow.entities import Metric

        uri = note_uri(note)
        if (database := sqlite_file(uri)) is not None and not database.exists():
            raise FileNotFoundError(f"{database} is not here")
        finished, now = run / ".finished", round(time.time() * 1000)
        step = int(finished.read_text()) if finished.exists() else 0
        metrics = [Metric(f"eval/{name}", value, now, step) for name, value in metric_values(results).items()]
        open_client(uri).log_batch(note["run_id"], metrics=metrics)
    except Exception as error:  # each store raises its own errors; the results are on disk
        warn(f"tracking: the metrics did not reach MLflow ({error_line(error, uri)}); the file has them all")
