"""Tables of our results beside published numbers, accuracies by length, and the experiments that were not
run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from . import lm_eval
from .compare import (
    METRICS,
    SECONDARY_METRICS,
    Estimate,
    PooledRuns,
    differences,
    estimate,
    pair_rows,
    unpublished_metric,
)
from .page import NOT_RUN, link, table, text
from .published import Experiment, MetricName, Published, PublishedRow, published
from .sources import ResultSource

PUBLISHED = "Published"  # the heading that published numbers link to


@dataclass
class Quality:
    """All runs and all files of lm-eval."""

    pooled: dict[str, list[PooledRuns]]
    lm_eval: list[ResultSource]
    published: Published = field(default_factory=published)

    def missing(self) -> list[str]:
        """Published experiments without a result of ours."""
        return [name for name in self.published.experiments if not self.has_result(name)]

    def has_result(self, name: str) -> bool:
        experiment = self.published.experiments[name]
        if experiment.metric is None:
            return False
        runs = [runs for runs in self.pooled.get(name, []) if not runs.task and runs.value(experiment.metric)]
        return bool(runs or lm_eval.matching_scores(experiment, self.lm_eval))

    def unpublished(self) -> list[str]:
        """Experiments without published numbers."""
        return [name for name in self.pooled if name not in self.published.experiments]


def number(value: float, percent: bool, sign: str = "") -> str:
    """Percent with one decimal, nats with three."""
    return f"{value:{sign}.{1 if percent else 3}f}"


def linked_estimate(
    value: Estimate | None, percent: bool, sources: Sequence[ResultSource], num_runs: int
) -> str:
    """A mean with its interval, linked to its files, with the number of seeds if some have no such number."""
    if value is None:
        return "no validation yet"
    words = number(value.mean, percent)
    if value.half_width is not None:
        words += f" ± {number(value.half_width, percent)}"
    others = "".join(f" {link('+', source.name)}" for source in sources[1:])
    count = f" (of {value.count})" if value.count < num_runs else ""
    return link(words, sources[0].name) + others + count


def our_cell(pooled: PooledRuns, metric: MetricName) -> str:
    """Our number."""
    percent = METRICS[metric].percent
    return linked_estimate(pooled.value(metric), percent, pooled.sources, len(pooled.runs))


def published_cell(row: PublishedRow | None) -> str:
    """A published number with the decimals of its source, marked as `reported` if taken from a secondary
    source.
    """
    if row is None:
        return "-"
    notes = ["reported"] * row.reported + [row.note] * bool(row.note and row.value is not None)
    number_link = link(text(row.note) if row.value is None else str(row.value), PUBLISHED)
    return number_link + (f" ({text(', '.join(notes))})" if notes else "")


def _published_cells(row: PublishedRow | None) -> list[str]:
    return [published_cell(row), text(row.source) if row else "-"]


def difference_cell(row: PublishedRow | None, ours: Estimate | None, metric: MetricName) -> str:
    """Our number minus the published one, in the same unit."""
    if row is None or row.value is None or ours is None:
        return "-"
    return number(ours.mean - row.value, METRICS[metric].percent, sign="+")


def steps_cell(pooled: PooledRuns) -> str:
    """The steps done, and the number in the recipe if not all are done."""
    done, planned = ([getattr(seed, name) for seed in pooled.seeds] for name in ("steps", "steps_asked"))
    steps = f"{min(done):,}" + (f" to {max(done):,}" if max(done) > min(done) else "")
    return steps if min(done) >= max(planned) else f"{steps} of {max(planned):,}"


def _seeds_cell(pooled: PooledRuns) -> str:
    return "1 (no interval)" if len(pooled.runs) == 1 else str(len(pooled.runs))


def _time_cell(pooled: PooledRuns) -> str:
    seconds = [seed.training_seconds for seed in pooled.seeds if seed.training_seconds is not None]
    if not seconds:
        return "-"
    mean = sum(seconds) / len(seconds)
    if mean < 600:
        return f"{mean:,.0f} s"
    return f"{mean / 60:,.0f} min" if mean < 36000 else f"{mean / 3600:,.0f} h"


def _run_cells(pooled: PooledRuns) -> list[str]:
    sizes = [seed.parameters for seed in pooled.seeds if seed.parameters]
    return [_seeds_cell(pooled), steps_cell(pooled), f"{sizes[0]:,}" if sizes else "-", _time_cell(pooled)]


RUN_HEADER = ["seeds", "steps", "parameters", "training time"]


def experiment_blocks(name: str, quality: Quality) -> str:
    """One experiment: its note, its table, and how our set-up differs from the published one."""
    experiment, pooled = quality.published.experiments[name], quality.pooled.get(name, [])
    metric = experiment.metric
    if metric is None or metric == "lm_eval":
        return _reference(name, quality)
    secondary = SECONDARY_METRICS.get(metric, [])
    header = [
        "model",
        "published",
        "source",
        f"ours: {METRICS[metric].title}",
        "difference",
        *(METRICS[other].title for other in secondary),
        *RUN_HEADER,
    ]
    rows = []
    for row, runs in pair_rows(experiment, pooled):
        label = text(runs.label if runs else row.model if row else "")
        if runs is None:
            rows.append([label, *_published_cells(row), NOT_RUN, *["-"] * (len(header) - 4)])
            continue
        others = [our_cell(runs, other) for other in secondary]
        difference = difference_cell(row, runs.value(metric), metric)
        cells = [our_cell(runs, metric), difference, *others, *_run_cells(runs)]
        rows.append([f"{label} (beside {text(row.model)})" if row else label, *_published_cells(row), *cells])
    if not pooled and not experiment.rows:
        rows.append(["minGRU, minLSTM", "-", "-", NOT_RUN, *["-"] * (len(header) - 4)])
    return "\n\n".join([*_notes(experiment), table(header, rows), *_setup_differences(experiment, pooled)])


def _notes(experiment: Experiment) -> list[str]:
    return [text(experiment.note)] if experiment.note else []


def _setup_differences(experiment: Experiment, pooled: Sequence[PooledRuns]) -> list[str]:
    if not pooled:
        return []
    lines = []
    for runs in pooled:
        setup = text(differences(experiment, runs))
        lines.append(f"- {text(runs.label)}: {'; '.join([setup, *map(text, runs.limits)])}")
    return ["\n".join(lines)]


def _limits(pooled: Sequence[PooledRuns]) -> list[str]:
    """What the families of some runs cannot do, below a table without published numbers."""
    lines = [f"- {text(runs.label)}: {text('; '.join(runs.limits))}" for runs in pooled if runs.limits]
    return ["\n".join(lines)] if lines else []


def _reference(name: str, quality: Quality) -> str:
    """An experiment whose numbers come from lm-eval, or that is for reference only."""
    experiment = quality.published.experiments[name]
    rows = [[text(row.model), *_published_cells(row), NOT_RUN] for row in experiment.rows]
    rows += [
        [text(score.model), "-", "-", _lm_eval_cell(score)]
        for score in lm_eval.matching_scores(experiment, quality.lm_eval)
    ]
    return "\n\n".join([*_notes(experiment), table(["model", "published", "source", "ours"], rows)])


def overview(group: str, quality: Quality) -> str:
    """A table of a group's experiments side by side: a row for each model, published ones first."""
    experiments = {
        name: experiment
        for name, experiment in quality.published.experiments.items()
        if experiment.group == group
    }
    rows = []
    for model in dict.fromkeys(row.model for experiment in experiments.values() for row in experiment.rows):
        model_rows = [
            next((row for row in experiment.rows if row.model == model), None)
            for experiment in experiments.values()
        ]
        sources = ", ".join(dict.fromkeys(row.source for row in model_rows if row))
        rows.append([f"{text(model)} ({text(sources)})", *(published_cell(row) for row in model_rows)])
    labels = dict.fromkeys(runs.label for name in experiments for runs in quality.pooled.get(name, []))
    for label in labels or [""]:
        cells = []
        for name, experiment in experiments.items():
            runs = next((runs for runs in quality.pooled.get(name, []) if runs.label == label), None)
            assert experiment.metric is not None
            cells.append(NOT_RUN if runs is None else our_cell(runs, experiment.metric))
        rows.append([f"**ours{text(': ' + label if label else '')}**", *cells])
    return table(["model, %", *(text(experiment.title) for experiment in experiments.values())], rows)


def unpublished_table(pooled: Sequence[PooledRuns]) -> str:
    """The table of an experiment without published numbers."""
    metric = unpublished_metric(pooled)
    metrics: list[MetricName] = [metric, *SECONDARY_METRICS.get(metric, [])]
    rows = [
        [text(runs.label), *(our_cell(runs, key) for key in metrics), *_run_cells(runs)] for runs in pooled
    ]
    header = ["model", *(METRICS[key].title for key in metrics), *RUN_HEADER]
    return "\n\n".join([table(header, rows), *_limits(pooled)])


def headline_rows(quality: Quality) -> list[list[str]]:
    """A row for each experiment: the best published minRNN, and our counterpart with the most similar
    set-up.
    """
    rows = []
    for name, experiment in quality.published.experiments.items():
        if (metric := experiment.metric) is None:
            continue
        ranked = sorted(experiment.rows, key=lambda row: row.value or 0, reverse=METRICS[metric].percent)
        targets = [row for row in ranked if row.match and "cell" in row.match]
        pairs = [
            (row, runs)
            for row, runs in pair_rows(experiment, quality.pooled.get(name, []))
            if runs and not runs.task and runs.value(metric)
        ]
        if pairs:
            row, runs = min(pairs, key=lambda pair: _distance(experiment, targets, *pair))
        else:
            row, runs = (targets[0] if targets else None), None
        label = text(runs.label if runs else row.model if row else "minGRU, minLSTM")
        lm_eval_scores = lm_eval.matching_scores(experiment, quality.lm_eval)
        if runs:
            ours = our_cell(runs, metric)
        else:
            ours = _lm_eval_cell(lm_eval_scores[0]) if lm_eval_scores else NOT_RUN
        cells = [f"{text(experiment.title)} ({METRICS[metric].title})", label, published_cell(row), ours]
        differing = differences(experiment, runs) if runs else []
        setup = f"settings that differ: {len(differing)}" if differing else "as published"
        run_cells = [str(len(runs.runs)), steps_cell(runs), setup] if runs else ["-", "-", "-"]
        difference = difference_cell(row, runs.value(metric) if runs else None, metric)
        rows.append([*cells, difference, *run_cells])
    return rows


def _distance(
    experiment: Experiment, targets: Sequence[PublishedRow], row: PublishedRow | None, pooled: PooledRuns
) -> tuple[int, int]:
    """Sort key of runs for the headline: the rank of their published row, then the number of differing
    settings.
    """
    rank = next((i for i, target in enumerate(targets) if target is row), len(targets))
    return rank, len(differences(experiment, pooled))


def _lm_eval_cell(score: lm_eval.Score) -> str:
    error = f" ± {number(100 * score.error, True)}" if score.error is not None else ""
    return link(number(100 * score.value, True) + error, score.source.name)


def accuracy_by_length_table(pooled: Sequence[PooledRuns]) -> str | None:
    """Accuracies at test lengths, a row for each entry; None if there are none."""
    by_label = {runs.label: (runs, _accuracies(runs)) for runs in pooled}
    lengths = sorted({length for _, accuracies in by_label.values() for length in accuracies})
    if not lengths:
        return None
    rows = []
    for label, (runs, accuracies) in by_label.items():
        if accuracies:
            cells = (
                linked_estimate(estimate(accuracies[length]), True, runs.sources, len(runs.runs))
                if length in accuracies
                else "-"
                for length in lengths
            )
            rows.append([text(label), *cells])
    chance = next(
        seed.final.chance for runs in pooled for seed in runs.seeds if seed.final and seed.final.by_length
    )
    if chance is not None:
        rows.append(["chance", *[number(100 * chance, True)] * len(lengths)])
    return table(["accuracy, %, at length", *(f"{length:,}" for length in lengths)], rows)


def _accuracies(pooled: PooledRuns) -> dict[int, list[float]]:
    """For each test length, the percentages of the seeds."""
    accuracies: dict[int, list[float]] = {}
    for seed in pooled.seeds:
        for length, accuracy in ((seed.final.by_length if seed.final else None) or {}).items():
            accuracies.setdefault(int(length), []).append(100 * accuracy)
    return accuracies
