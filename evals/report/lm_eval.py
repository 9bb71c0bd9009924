"""lm-eval's own results files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .compare import TOLERANCE
from .page import link, table, text
from .published import Experiment
from .sources import Source


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    source: Source
    model: str
    task: str
    metric: str
    """lm-eval's key, `acc,none`."""
    value: float
    error: float | None
    """Standard error, where lm-eval gives one."""


def _model(data: dict[str, Any]) -> str:
    arguments = (data.get("config") or {}).get("model_args")
    if isinstance(arguments, str):
        arguments = dict(word.split("=", 1) for word in arguments.split(",") if "=" in word)
    found = data.get("model_name") or (arguments or {}).get("pretrained")
    return str(found or "model not recorded")


def scores(source: Source) -> list[Score]:
    """All numbers of a file, tasks in its order."""
    found = []
    for task, values in source.data["results"].items():
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if (
                not comma
                or name.endswith("_stderr")
                or isinstance(value, bool)
                or not isinstance(value, int | float)
            ):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            found.append(
                Score(
                    source,
                    _model(source.data),
                    task,
                    key,
                    value,
                    error if isinstance(error, int | float) else None,
                )
            )
    return found


def counting(experiment: Experiment, sources: Sequence[Source]) -> list[Score]:
    """Scores that stand beside a published experiment's: of its task, by models of about its size."""
    if experiment.lm_eval is None:
        return []
    wanted, size = experiment.lm_eval, experiment.setup["parameters"]
    found = []
    for source in sources:
        parameters = (source.data.get("config") or {}).get("model_num_parameters")
        if parameters and abs(parameters - size) <= TOLERANCE["parameters"] * size:
            found += [
                score
                for score in scores(source)
                if (score.task, score.metric) == (wanted.task, wanted.metric)
            ]
    return found


def lines(source: Source) -> str:
    """A table of one file."""
    configs, shots = source.data.get("configs") or {}, source.data.get("n-shot") or {}
    rows = []
    for score in scores(source):
        told = link(
            f"{score.value:.4f}" + (f" ± {score.error:.4f}" if score.error is not None else ""), source.name
        )
        reading = ((configs.get(score.task) or {}).get("metadata") or {}).get("rolling", "-")
        rows.append(
            [
                text(score.task),
                text(score.metric.removesuffix(",none")),
                told,
                text(shots.get(score.task, "-")),
                text(reading),
            ]
        )
    if not rows:
        raise ValueError("it holds no number")
    return f"Model: {text(_model(source.data))}\n\n" + table(
        ["task", "metric", "value ± standard error", "shots", "how it was read"], rows
    )
