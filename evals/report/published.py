"""Published numbers from published.yaml, and the names of the metrics that compare with them."""

import functools
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

MetricName = Literal[
    "best_loss",
    "final_loss",
    "bits_per_byte",
    "accuracy",
    "accuracy_scaled",
    "longer",
    "longer_scaled",
    "lm_eval",
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PublishedRow(_Strict):
    """The published number of one model."""

    model: str
    value: int | float | None
    """Percent or nats, as the experiment's metric says, with the decimals of the source; None if there is no
    number (see `note`).
    """
    match: dict[str, Any] | None = None
    """Fields of a run's model section that identify our counterpart; None: we have none."""
    source: str
    """A key of `sources`."""
    reported: bool = False
    """Taken from a secondary source."""
    note: str = ""


class LmEval(_Strict):
    """The task and metric in lm-eval's files that hold an experiment's number."""

    task: str
    metric: str


class Experiment(_Strict):
    """A published experiment: metric, set-up and numbers."""

    group: str
    title: str
    metric: MetricName | None
    """None: for reference only, no result of ours compares."""
    corpora: list[str] = []
    """Allowed values of `data.corpus`, the published variant first; empty: any."""
    setup: dict[str, Any] = {}
    """Published settings: keys of a recipe, or sequences_per_step, parameters, tokens."""
    lm_eval: LmEval | None = None
    note: str = ""
    not_run: str = ""
    """Why none of our runs has the published size."""
    rows: list[PublishedRow]


class Group(_Strict):
    """A group of experiments that share a section."""

    title: str
    note: str


class Published(_Strict):
    """The content of published.yaml."""

    sources: dict[str, str]
    groups: dict[str, Group]
    experiments: dict[str, Experiment]

    @model_validator(mode="after")
    def _check_names(self) -> "Published":
        for name, experiment in self.experiments.items():
            if experiment.group not in self.groups:
                raise ValueError(f"{name}: there is no group {experiment.group}")
            for row in experiment.rows:
                if row.source not in self.sources:
                    raise ValueError(f"{name}, {row.model}: there is no source {row.source}")
            if (experiment.metric == "lm_eval") != (experiment.lm_eval is not None):
                raise ValueError(f"{name}: metric lm_eval and the field lm_eval come together")
        return self


@functools.cache
def published() -> Published:
    """The published numbers that come with the package."""
    text = resources.files("minrnn.evals.report").joinpath("published.yaml").read_text()
    return Published.model_validate(yaml.safe_load(text))
