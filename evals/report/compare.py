"""Our runs beside published numbers: seeds pooled from all files, a mean with an interval, and the settings that differ."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .published import Experiment, MetricName, Row, published
from .runs import Seed, settings
from .sources import Source

CONFIDENCE = 0.95
CELLS = {"mingru": "minGRU", "minlstm": "minLSTM"}
TOLERANCE = {"parameters": 0.25, "tokens": 0.05}  # relative; published sizes are round numbers


@dataclass(frozen=True)
class Metric:
    """What is read from a run."""

    title: str
    of: Callable[[Seed], float | None]
    """In the unit of the published numbers; None where the run has no such number (yet)."""
    percent: bool


def _final(name: str) -> Callable[[Seed], float | None]:
    def of(seed: Seed) -> float | None:
        value = getattr(seed.final, name, None)
        return None if value is None else 100 * value

    return of


def _best(name: str) -> Callable[[Seed], float | None]:
    return lambda seed: getattr(seed.best, name, None)


def _longer(seed: Seed) -> float | None:
    """Mean accuracy over test lengths, which weigh alike."""
    if seed.final is None or not seed.final.by_length:
        return None
    return 100 * sum(seed.final.by_length.values()) / len(seed.final.by_length)


def _longer_scaled(seed: Seed) -> float | None:
    accuracy = _longer(seed)
    if accuracy is None or seed.final is None or seed.final.chance is None:
        return None
    return 100 * (accuracy / 100 - seed.final.chance) / (1 - seed.final.chance)


METRICS: dict[MetricName, Metric] = {
    "best_loss": Metric("best held-out loss, nats", _best("loss"), False),
    "final_loss": Metric("last held-out loss, nats", lambda seed: getattr(seed.final, "loss", None), False),
    "bits_per_byte": Metric("best held-out bits per byte", _best("bits_per_byte"), False),
    "accuracy": Metric("accuracy, %", _final("accuracy"), True),
    "accuracy_scaled": Metric("accuracy scaled, %", _final("accuracy_scaled"), True),
    "longer": Metric("accuracy at test lengths, %", _longer, True),
    "longer_scaled": Metric("accuracy at test lengths scaled, %", _longer_scaled, True),
    "lm_eval": Metric("lm-eval, %", lambda seed: None, True),
}
BESIDE: dict[MetricName, list[MetricName]] = {
    "best_loss": ["bits_per_byte"],
    "bits_per_byte": ["best_loss"],
    "accuracy": ["accuracy_scaled"],
    "longer": ["accuracy"],
    "longer_scaled": ["longer", "accuracy"],
}  # what stands beside a metric in the same table


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half: float | None
    """Half the width of the t-interval; None with one seed."""
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and its two-sided t-interval: t(n - 1) s / sqrt(n), with s of n - 1 degrees of freedom.

    Args:
        values: one of each seed, at least one.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    from scipy import stats

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(
        mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count), count
    )


@dataclass
class Pooled:
    """Runs that differ in their seed only, from all sources."""

    label: str
    config: dict[str, dict[str, Any]]
    runs: list[tuple[Seed, Source]]
    task: str = ""
    """In what its task differs from the published one, which makes its numbers others; empty: the same."""

    @property
    def seeds(self) -> list[Seed]:
        return [seed for seed, _ in self.runs]

    @property
    def sources(self) -> list[Source]:
        return list({source.path: source for _, source in self.runs}.values())

    def value(self, metric: MetricName) -> Estimate | None:
        """None where no seed has the number."""
        values = [value for seed in self.seeds if (value := METRICS[metric].of(seed)) is not None]
        return estimate(values) if values else None


def pool(sources: Sequence[Source]) -> tuple[dict[str, list[Pooled]], list[str]]:
    """The runs of all sources by experiment, and a sentence for each that was found twice: the longer one counts."""
    found: dict[str, dict[str, Pooled]] = {}
    notes = []
    for source in sources:
        if source.results is None:
            continue
        group = found.setdefault(source.results.experiment, {})
        for entry in source.results.entries:
            pooled = group.setdefault(
                json.dumps(settings(entry.config), sort_keys=True), Pooled("", entry.config, [])
            )
            for seed in entry.seeds:
                twin = next((i for i, other in enumerate(pooled.seeds) if other.seed == seed.seed), None)
                if twin is None:
                    pooled.runs.append((seed, source))
                    continue
                shorter, longer = sorted([pooled.runs[twin], (seed, source)], key=lambda run: run[0].steps)
                if seed.steps == longer[0].steps == shorter[0].steps:  # the first that was found stays
                    shorter, longer = (seed, source), pooled.runs[twin]
                pooled.runs[twin] = longer
                names = f"{longer[1].name} ({longer[0].steps:,} steps) and {shorter[1].name} ({shorter[0].steps:,})"
                notes.append(
                    f"{source.results.experiment}: seed {seed.seed} of the same settings is in {names}; the first of these counts."
                )
    for name, group in found.items():
        for pooled in group.values():
            pooled.task = _other_task(published().experiments.get(name), pooled)
        _label(list(group.values()))
        for pooled in group.values():
            pooled.runs.sort(key=lambda run: run[0].seed)
    return {name: list(group.values()) for name, group in found.items()}, notes


def _other_task(experiment: Experiment | None, pooled: Pooled) -> str:
    if experiment is None:
        return ""
    ours, wanted = _settings(pooled), _setup(experiment)
    keys = [key for key in wanted if key in ("data.corpus", *TOLERANCE) or key.startswith("data.task.")]
    keys = [key for key in keys if ours.get(key) is not None and not _same(key, ours[key], wanted[key])]
    return ", ".join(f"{key.rpartition('.')[2]} {_short(ours[key])}" for key in keys)


def _setup(experiment: Experiment) -> dict[str, Any]:
    return experiment.setup | ({"data.corpus": experiment.corpora[0]} if experiment.corpora else {})


def _settings(pooled: Pooled) -> dict[str, Any]:
    """All that a published set-up may name."""
    data, batch = pooled.config["data"], pooled.config["batch"]
    ours = settings(pooled.config) | {
        f"data.task.{key}": value for key, value in (data.get("task") or {}).items()
    }
    sizes = {"parameters": pooled.seeds[0].parameters, "tokens": max(seed.tokens for seed in pooled.seeds)}
    return ours | sizes | {"sequences_per_step": batch["readers"] * batch["lanes"]}


def _label(group: Sequence[Pooled]) -> None:
    """Cell, preset, layers, and another task than the published; and of those that are alike so far, the settings in which they differ."""
    for pooled in group:
        model = pooled.config["model"]
        name = model.get("family") or CELLS.get(model.get("cell", ""), model.get("cell", "model"))
        layers = model.get("num_hidden_layers")
        preset = f" ({model['preset']})" if model.get("preset") else ""
        pooled.label = f"{name}{preset}" + (f", {layers} layer{'s' if layers != 1 else ''}" if layers else "")
        pooled.label += f", {pooled.task}" if pooled.task else ""
    for label in {pooled.label for pooled in group}:
        alike = [pooled for pooled in group if pooled.label == label]
        flat = [settings(pooled.config) for pooled in alike]
        keys = [
            key
            for key in dict.fromkeys(key for one in flat for key in one)
            if any(one.get(key) != flat[0].get(key) for one in flat)
        ]
        for pooled, one in zip(alike, flat, strict=True):
            pooled.label = ", ".join([label, *(f"{key} {_short(one.get(key))}" for key in keys)])


def _short(value: Any) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def matches(pooled: Pooled, row: Row) -> bool:
    """Whether this is the row's counterpart: such a model, at the published task."""
    return (
        not pooled.task
        and row.match is not None
        and all(pooled.config["model"].get(key) == value for key, value in row.match.items())
    )


def lines(experiment: Experiment, pooled: Sequence[Pooled]) -> list[tuple[Row | None, Pooled | None]]:
    """Each published row with each counterpart of ours (None: not run), then ours without a published one."""
    paired = [(row, [one for one in pooled if matches(one, row)]) for row in experiment.rows]
    alone = [one for one in pooled if not any(matches(one, row) for row in experiment.rows)]
    found: list[tuple[Row | None, Pooled | None]] = [
        (row, one) for row, ours in paired for one in (ours or [None])
    ]
    return found + [(None, one) for one in alone]


def differences(experiment: Experiment, pooled: Pooled) -> list[str]:
    """Settings that are not as published, each with both values; of a task, an option that is not set has the published value."""
    ours = _settings(pooled)
    return [
        f"{key} {_short(ours[key])} (published {_short(value)})"
        for key, value in _setup(experiment).items()
        if key in ours and ours[key] is not None and not _same(key, ours[key], value)
    ]


def _same(key: str, ours: Any, theirs: Any) -> bool:
    return abs(ours - theirs) <= TOLERANCE[key] * theirs if key in TOLERANCE else ours == theirs


def own_metric(pooled: Sequence[Pooled]) -> MetricName:
    """Of an experiment that nothing is published about."""
    final = next((seed.final for one in pooled for seed in one.seeds if seed.final), None)
    if final is None or final.accuracy is None:
        return "best_loss" if final is None or final.bits_per_byte is None else "bits_per_byte"
    return "accuracy"
