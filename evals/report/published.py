"""Published numbers, from published.yaml, and the measures by which ours stand beside them."""

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


class Row(_Strict):
    """A model's published number."""

    model: str
    value: int | float | None
    """Percent or nats, as the experiment's metric says, with the decimals of the source; None where it has no number (`note` says what)."""
    match: dict[str, Any] | None = None
    """Fields of a run's model section that make it this row's counterpart; None: we have none."""
    source: str
    """A key of `sources`."""
    reported: bool = False
    """Seen second-hand, not in the source itself."""
    note: str = ""


class LmEval(_Strict):
    """Where lm-eval's files have an experiment's number."""

    task: str
    metric: str


class Experiment(_Strict):
    """What was measured, how, and what came out."""

    group: str
    title: str
    metric: MetricName | None
    """None: for reference, nothing of ours compares."""
    corpora: list[str] = []
    """What `data.corpus` may be, the published variant first; empty: anything."""
    setup: dict[str, Any] = {}
    """Published settings: keys of a recipe, or sequences_per_step, parameters, tokens."""
    lm_eval: LmEval | None = None
    note: str = ""
    rows: list[Row]


class Group(_Strict):
    """Experiments that share a section."""

    title: str
    note: str


class Published(_Strict):
    """All of published.yaml."""

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
    """The numbers that come with the package."""
    text = resources.files("minrnn.evals.report").joinpath("published.yaml").read_text()
    return Published.model_validate(yaml.safe_load(text))
