"""Compares our runs with published numbers: pools seeds over all files, computes intervals, lists settings
that differ.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .published import Experiment, MetricName, PublishedRow, published
from .runs import Seed, settings
from .sources import ResultSource

CONFIDENCE = 0.95
CELLS = {
    "mingru": "minGRU",
    "minlstm": "minLSTM",
    "gilr": "GILR",
    "gilr_lstm": "GILR-LSTM",
    "hgrn": "HGRN",
    "qrnn": "QRNN",
    "rglru": "RG-LRU (Hawk)",
    "rwkv4": "RWKV-4",
    "lru": "LRU",
    "s4d": "S4D",
    "linear_attention": "linear attention",
    "hgrn2": "HGRN2",
    "mlstm": "mLSTM (xLSTM[1:0])",
    "gla": "GLA",
}
TOLERANCE = {"parameters": 0.25, "tokens": 0.05}  # relative; published sizes are rounded
# A run with less of one of these than published is a reduced one.
SIZES = (
    *("train.steps", "sequences_per_step", "batch.chunk", "parameters", "tokens"),
    *("model.hidden_size", "model.num_hidden_layers", "model.intermediate_size"),
    *("data.task.train_examples", "data.task.test_examples", "data.task.max_length"),
)


@dataclass(frozen=True)
class Metric:
    """A number that is read from a run."""

    title: str
    value_of: Callable[[Seed], float | None]
    """Returns the number in the unit of the published ones; None if the run has none (yet)."""
    percent: bool


def _final(name: str) -> Callable[[Seed], float | None]:
    """Percent: of the test split if the corpus has one, which only a finished run has; else of the last
    validation."""

    def value_of(seed: Seed) -> float | None:
        value = getattr(seed.test if seed.has_test else seed.final, name, None)
        return None if value is None else 100 * value

    return value_of


def _best(name: str) -> Callable[[Seed], float | None]:
    return lambda seed: getattr(seed.best, name, None)


def _test_length_accuracy(seed: Seed) -> float | None:
    """Mean accuracy over test lengths, with equal weights."""
    if seed.final is None or not seed.final.by_length:
        return None
    return 100 * sum(seed.final.by_length.values()) / len(seed.final.by_length)


def _test_length_accuracy_scaled(seed: Seed) -> float | None:
    accuracy = _test_length_accuracy(seed)
    if accuracy is None or seed.final is None or seed.final.chance is None:
        return None
    return 100 * (accuracy / 100 - seed.final.chance) / (1 - seed.final.chance)


METRICS: dict[MetricName, Metric] = {
    "best_loss": Metric("best held-out loss, nats", _best("loss"), False),
    "final_loss": Metric("last held-out loss, nats", lambda seed: getattr(seed.final, "loss", None), False),
    "bits_per_byte": Metric("best held-out bits per byte", _best("bits_per_byte"), False),
    "accuracy": Metric("accuracy, %", _final("accuracy"), True),
    "accuracy_scaled": Metric("accuracy scaled, %", _final("accuracy_scaled"), True),
    "longer": Metric("accuracy at test lengths, %", _test_length_accuracy, True),
    "longer_scaled": Metric("accuracy at test lengths scaled, %", _test_length_accuracy_scaled, True),
    "lm_eval": Metric("lm-eval, %", lambda seed: None, True),
}
# Further metrics in the table of a metric.
SECONDARY_METRICS: dict[MetricName, list[MetricName]] = {
    "best_loss": ["bits_per_byte"],
    "bits_per_byte": ["best_loss"],
    "accuracy": ["accuracy_scaled"],
    "longer": ["accuracy"],
    "longer_scaled": ["longer", "accuracy"],
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Half the width of the t-interval; None for a single seed."""
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and two-sided t-interval: t(n - 1) s / sqrt(n), where s is the sample standard deviation.

    Args:
        values: one per seed, at least one.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    from scipy import stats

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(mean, quantile * deviation / math.sqrt(count), count)


@dataclass
class PooledRuns:
    """Runs of all sources that differ only in their seed."""

    label: str
    config: dict[str, dict[str, Any]]
    runs: list[tuple[Seed, ResultSource]]
    task: str = ""
    """How its task differs from the published one, so that numbers do not compare; empty if it is the
    same.
    """

    @property
    def limits(self) -> list[str]:
        """What the model's family cannot do, e.g. carry a state (`model.limits`)."""
        return self.config["model"].get("limits") or []

    @property
    def seeds(self) -> list[Seed]:
        return [seed for seed, _ in self.runs]

    @property
    def sources(self) -> list[ResultSource]:
        return list({source.path: source for _, source in self.runs}.values())

    def value(self, metric: MetricName) -> Estimate | None:
        """Mean over the seeds that have the number; None if none has."""
        values = [value for seed in self.seeds if (value := METRICS[metric].value_of(seed)) is not None]
        return estimate(values) if values else None


def pool(sources: Sequence[ResultSource]) -> tuple[dict[str, list[PooledRuns]], list[str]]:
    """The runs of all sources by experiment, and a note for each run that occurs twice: the longer one
    counts.
    """
    by_experiment: dict[str, dict[str, PooledRuns]] = {}
    notes = []
    for source in sources:
        if source.results is None:
            continue
        group = by_experiment.setdefault(source.results.experiment, {})
        for entry in source.results.entries:
            pooled = group.setdefault(
                json.dumps(settings(entry.config), sort_keys=True), PooledRuns("", entry.config, [])
            )
            for seed in entry.seeds:
                twin = next((i for i, other in enumerate(pooled.seeds) if other.seed == seed.seed), None)
                if twin is None:
                    pooled.runs.append((seed, source))
                    continue
                shorter, longer = sorted([pooled.runs[twin], (seed, source)], key=lambda run: run[0].steps)
                if seed.steps == longer[0].steps == shorter[0].steps:  # the first one stays
                    shorter, longer = (seed, source), pooled.runs[twin]
                pooled.runs[twin] = longer
                names = (
                    f"{longer[1].name} ({longer[0].steps:,} steps) and "
                    f"{shorter[1].name} ({shorter[0].steps:,})"
                )
                notes.append(
                    f"{source.results.experiment}: seed {seed.seed} of the same settings is in {names}; "
                    "the first of these counts."
                )
    for name, group in by_experiment.items():
        for pooled in group.values():
            pooled.task = _task_difference(published().experiments.get(name), pooled)
        _label(list(group.values()))
        for pooled in group.values():
            pooled.runs.sort(key=lambda run: run[0].seed)
    return {name: list(group.values()) for name, group in by_experiment.items()}, notes


def _task_difference(experiment: Experiment | None, pooled: PooledRuns) -> str:
    if experiment is None:
        return ""
    ours, theirs = _settings(pooled), _published_setup(experiment)
    keys = [key for key in theirs if key in ("data.corpus", *TOLERANCE) or key.startswith("data.task.")]
    keys = [key for key in keys if ours.get(key) is not None and not _is_equal(key, ours[key], theirs[key])]
    return ", ".join(f"{key.rpartition('.')[2]} {_format(ours[key])}" for key in keys)


def _published_setup(experiment: Experiment) -> dict[str, Any]:
    return experiment.setup | ({"data.corpus": experiment.corpora[0]} if experiment.corpora else {})


def _settings(pooled: PooledRuns) -> dict[str, Any]:
    """All settings and sizes that a published set-up may name."""
    data, batch = pooled.config["data"], pooled.config["batch"]
    ours = settings(pooled.config) | {
        f"data.task.{key}": value for key, value in (data.get("task") or {}).items()
    }
    sizes = {"parameters": pooled.seeds[0].parameters, "tokens": max(seed.tokens for seed in pooled.seeds)}
    sizes |= {"train.steps": min(seed.steps for seed in pooled.seeds)}  # done, not asked for
    return ours | sizes | {"sequences_per_step": batch["readers"] * batch["lanes"]}


def _label(group: Sequence[PooledRuns]) -> None:
    """Set the labels of a group: cell, preset, layers, a differing task; for equal labels the settings that
    differ.
    """
    for pooled in group:
        model = pooled.config["model"]
        name = model.get("family") or CELLS.get(model.get("cell", ""), model.get("cell", "model"))
        layers = model.get("num_hidden_layers") or model.get("family_config", {}).get("num_hidden_layers")
        preset = f" ({model['preset']})" if model.get("preset") else ""
        pooled.label = f"{name}{preset}" + (f", {layers} layer{'s' if layers != 1 else ''}" if layers else "")
        pooled.label += f", {pooled.task}" if pooled.task else ""
    for label in {pooled.label for pooled in group}:
        same = [pooled for pooled in group if pooled.label == label]
        flat = [settings(pooled.config) for pooled in same]
        keys = [
            key
            for key in dict.fromkeys(key for config in flat for key in config)
            if any(config.get(key) != flat[0].get(key) for config in flat)
        ]
        for pooled, config in zip(same, flat, strict=True):
            pooled.label = ", ".join([label, *(f"{key} {_format(config.get(key))}" for key in keys)])


def _format(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def matches(pooled: PooledRuns, row: PublishedRow) -> bool:
    """Whether runs are the counterpart of a published row: the same kind of model, at the published task."""
    return (
        not pooled.task
        and row.match is not None
        and all(pooled.config["model"].get(key) == value for key, value in row.match.items())
    )


def pair_rows(
    experiment: Experiment, pooled: Sequence[PooledRuns]
) -> list[tuple[PublishedRow | None, PooledRuns | None]]:
    """Each published row with each of our counterparts (None: not run), then our runs without a published
    row.
    """
    pairs: list[tuple[PublishedRow | None, PooledRuns | None]] = []
    for row in experiment.rows:
        counterparts = [runs for runs in pooled if matches(runs, row)]
        pairs += [(row, runs) for runs in (counterparts or [None])]
    unmatched = [runs for runs in pooled if not any(matches(runs, row) for row in experiment.rows)]
    return pairs + [(None, runs) for runs in unmatched]


@dataclass(frozen=True)
class Differences:
    """Settings of runs that differ from the published ones, each with both values."""

    reduced: list[str]
    """Sizes that are smaller."""
    others: list[str]

    def __len__(self) -> int:
        return len(self.reduced) + len(self.others)

    def __str__(self) -> str:
        parts = [f"reduced: {'; '.join(self.reduced)}"] * bool(self.reduced)
        parts += [f"differs in {'; '.join(self.others)}"] * bool(self.others)
        return "; ".join(parts) or "set up as published"


def differences(experiment: Experiment, pooled: PooledRuns) -> Differences:
    """How runs differ from the published set-up. A task's unset options have the published values."""
    ours, result = _settings(pooled), Differences([], [])
    for key, value in _published_setup(experiment).items():
        if ours.get(key) is not None and not _is_equal(key, ours[key], value):
            is_reduced = key in SIZES and ours[key] < value
            words = f"{key} {_format(ours[key])} (published {_format(value)})"
            (result.reduced if is_reduced else result.others).append(words)
    return result


def _is_equal(key: str, ours: Any, theirs: Any) -> bool:
    return abs(ours - theirs) <= TOLERANCE[key] * theirs if key in TOLERANCE else ours == theirs


def unpublished_metric(pooled: Sequence[PooledRuns]) -> MetricName:
    """The metric of an experiment without published numbers."""
    final = next((seed.final for runs in pooled for seed in runs.seeds if seed.final), None)
    if final is None or final.accuracy is None:
        return "best_loss" if final is None or final.bits_per_byte is None else "bits_per_byte"
    return "accuracy"
