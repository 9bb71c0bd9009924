"""Tables of lm-eval's results files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .compare import TOLERANCE
from .page import link, table, text
from .published import Experiment
from .sources import ResultSource


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    source: ResultSource
    model: str
    task: str
    metric: str
    """lm-eval's key, such as `acc,none`."""
    value: float
    error: float | None
    """Standard error, if lm-eval gives one."""


def _model(data: dict[str, Any]) -> str:
    arguments = (data.get("config") or {}).get("model_args")
    if isinstance(arguments, str):
        arguments = dict(word.split("=", 1) for word in arguments.split(",") if "=" in word)
    return str(data.get("model_name") or (arguments or {}).get("pretrained") or "model not recorded")


def scores(source: ResultSource) -> list[Score]:
    """All numbers of a file; tasks in the file's order."""
    file_scores = []
    for task, values in source.data["results"].items():
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not comma or name.endswith("_stderr") or not is_number:
                continue
            error = values.get(f"{name}_stderr,{kind}")
            error = error if isinstance(error, int | float) else None
            file_scores.append(Score(source, _model(source.data), task, key, value, error))
    return file_scores


def matching_scores(experiment: Experiment, sources: Sequence[ResultSource]) -> list[Score]:
    """Scores that compare with a published experiment: of its task, from models of about its size."""
    if experiment.lm_eval is None:
        return []
    key, size = (experiment.lm_eval.task, experiment.lm_eval.metric), experiment.setup["parameters"]
    matching = []
    for source in sources:
        parameters = (source.data.get("config") or {}).get("model_num_parameters")
        if parameters and abs(parameters - size) <= TOLERANCE["parameters"] * size:
            matching += [score for score in scores(source) if (score.task, score.metric) == key]
    return matching


def scores_table(source: ResultSource) -> str:
    """A table of all numbers of a file.

    Raises:
        ValueError: it has none.
    """
    configs, shots = source.data.get("configs") or {}, source.data.get("n-shot") or {}
    rows = []
    for score in scores(source):
        error = f" ± {score.error:.4f}" if score.error is not None else ""
        value = link(f"{score.value:.4f}{error}", source.name)
        reading = ((configs.get(score.task) or {}).get("metadata") or {}).get("rolling", "-")
        rows.append(
            [
                text(score.task),
                text(score.metric.removesuffix(",none")),
                value,
                text(shots.get(score.task, "-")),
                text(reading),
            ]
        )
    if not rows:
        raise ValueError("it holds no number")
    limits = (source.data.get("config") or {}).get("limits") or []
    return f"Model: {text('; '.join([_model(source.data), *limits]))}\n\n" + table(
        ["task", "metric", "value ± standard error", "shots", "how it was read"], rows
    )
