"""How good: tables of ours beside published numbers, accuracies by length, and what was not run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from . import lm_eval
from .compare import BESIDE, METRICS, Estimate, Pooled, differences, estimate, lines, own_metric
from .page import NOT_RUN, link, table, text
from .published import Experiment, MetricName, Published, Row, published
from .sources import Source

PUBLISHED = "Published"  # the heading that published numbers lead to


@dataclass
class Quality:
    """All runs, and all lm-eval files."""

    pooled: dict[str, list[Pooled]]
    lm_eval: list[Source]
    published: Published = field(default_factory=published)

    def missing(self) -> list[str]:
        """Published experiments without a result of ours."""
        return [name for name in self.published.experiments if not self.has_result(name)]

    def has_result(self, name: str) -> bool:
        experiment = self.published.experiments[name]
        if experiment.metric is None:
            return False
        runs = [one for one in self.pooled.get(name, []) if not one.task and one.value(experiment.metric)]
        return bool(runs or lm_eval.counting(experiment, self.lm_eval))

    def own(self) -> list[str]:
        """Experiments that nothing is published about."""
        return [name for name in self.pooled if name not in self.published.experiments]


def number(value: float, percent: bool, sign: str = "") -> str:
    """Percent with a decimal, nats with three."""
    return f"{value:{sign}.{1 if percent else 3}f}"


def linked(found: Estimate | None, percent: bool, sources: Sequence[Source], num_runs: int) -> str:
    """A mean with its interval, linked to the files it comes from; how many seeds it is of, where some have no such number."""
    if found is None:
        return "no validation yet"
    told = number(found.mean, percent)
    if found.half is not None:
        told += f" ± {number(found.half, percent)}"
    others = "".join(f" {link('+', source.name)}" for source in sources[1:])
    return link(told, sources[0].name) + others + (f" (of {found.count})" if found.count < num_runs else "")


def shown(pooled: Pooled, metric: MetricName) -> str:
    """Ours."""
    return linked(pooled.value(metric), METRICS[metric].percent, pooled.sources, len(pooled.runs))


def published_cell(row: Row | None) -> str:
    """A published number with the decimals of its source; `reported` where it is second-hand."""
    if row is None:
        return "-"
    notes = [
        note
        for note in ("reported" if row.reported else "", row.note if row.value is not None else "")
        if note
    ]
    told = link(text(row.note) if row.value is None else str(row.value), PUBLISHED)
    return told + (f" ({text(', '.join(notes))})" if notes else "")


def _published_cells(row: Row | None) -> list[str]:
    return [published_cell(row), text(row.source) if row else "-"]


def difference_cell(row: Row | None, found: Estimate | None, metric: MetricName) -> str:
    """Ours less the published, in the same unit."""
    if row is None or row.value is None or found is None:
        return "-"
    return number(found.mean - row.value, METRICS[metric].percent, sign="+")


def steps_cell(pooled: Pooled) -> str:
    """Steps done, and of how many where they are not all."""
    done, asked = ([getattr(seed, name) for seed in pooled.seeds] for name in ("steps", "steps_asked"))
    told = f"{min(done):,}" + (f" to {max(done):,}" if max(done) > min(done) else "")
    return told if min(done) >= max(asked) else f"{told} of {max(asked):,}"


def _seeds_cell(pooled: Pooled) -> str:
    return "1 (no interval)" if len(pooled.runs) == 1 else str(len(pooled.runs))


def _time_cell(pooled: Pooled) -> str:
    seconds = [seed.training_seconds for seed in pooled.seeds if seed.training_seconds is not None]
    if not seconds:
        return "-"
    mean = sum(seconds) / len(seconds)
    return (
        f"{mean:,.0f} s"
        if mean < 600
        else f"{mean / 60:,.0f} min"
        if mean < 36000
        else f"{mean / 3600:,.0f} h"
    )


def _run_cells(pooled: Pooled) -> list[str]:
    sizes = [seed.parameters for seed in pooled.seeds if seed.parameters]
    return [_seeds_cell(pooled), steps_cell(pooled), f"{sizes[0]:,}" if sizes else "-", _time_cell(pooled)]


RUN_HEADER = ["seeds", "steps", "parameters", "training time"]


def details(name: str, quality: Quality) -> str:
    """One experiment: its table, and in what ours differs from the published set-up."""
    experiment, pooled = quality.published.experiments[name], quality.pooled.get(name, [])
    metric = experiment.metric
    if metric is None or metric == "lm_eval":
        return _reference(name, quality)
    beside = BESIDE.get(metric, [])
    header = [
        "model",
        "published",
        "source",
        f"ours: {METRICS[metric].title}",
        "difference",
        *(METRICS[other].title for other in beside),
        *RUN_HEADER,
    ]
    rows = []
    for row, one in lines(experiment, pooled):
        label = text(one.label if one else row.model if row else "")
        if one is None:
            rows.append([label, *_published_cells(row), NOT_RUN, *["-"] * (len(header) - 4)])
            continue
        found = one.value(metric)
        others = [shown(one, other) for other in beside]
        cells = [shown(one, metric), difference_cell(row, found, metric), *others, *_run_cells(one)]
        rows.append([f"{label} (beside {text(row.model)})" if row else label, *_published_cells(row), *cells])
    if not pooled and not experiment.rows:
        rows.append(["minGRU, minLSTM", "-", "-", NOT_RUN, *["-"] * (len(header) - 4)])
    return "\n\n".join([*_notes(experiment), table(header, rows), *_told_differences(experiment, pooled)])


def _notes(experiment: Experiment) -> list[str]:
    return [text(experiment.note)] if experiment.note else []


def _told_differences(experiment: Experiment, pooled: Sequence[Pooled]) -> list[str]:
    if not pooled:
        return []
    told = [(one.label, differences(experiment, one)) for one in pooled]
    return [
        "\n".join(
            f"- {text(label)}: "
            + (f"differs in {text('; '.join(found))}" if found else "set up as published")
            for label, found in told
        )
    ]


def _reference(name: str, quality: Quality) -> str:
    """An experiment whose numbers do not come from runs."""
    experiment = quality.published.experiments[name]
    rows = [[text(row.model), *_published_cells(row), NOT_RUN] for row in experiment.rows]
    rows += [
        [text(found.model), "-", "-", _lm_eval_cell(found)]
        for found in lm_eval.counting(experiment, quality.lm_eval)
    ]
    return "\n\n".join([*_notes(experiment), table(["model", "published", "source", "ours"], rows)])


def overview(group: str, quality: Quality) -> str:
    """The experiments of a group side by side: a row for each model, published ones first."""
    experiments = {name: one for name, one in quality.published.experiments.items() if one.group == group}
    rows = []
    for model in dict.fromkeys(row.model for one in experiments.values() for row in one.rows):
        of_model = [
            next((row for row in one.rows if row.model == model), None) for one in experiments.values()
        ]
        sources = ", ".join(dict.fromkeys(row.source for row in of_model if row))
        rows.append([f"{text(model)} ({text(sources)})", *(published_cell(row) for row in of_model)])
    labels = dict.fromkeys(one.label for name in experiments for one in quality.pooled.get(name, []))
    for label in labels or [""]:
        cells = []
        for name, experiment in experiments.items():
            one = next((one for one in quality.pooled.get(name, []) if one.label == label), None)
            assert experiment.metric is not None
            cells.append(NOT_RUN if one is None else shown(one, experiment.metric))
        rows.append([f"**ours{text(': ' + label if label else '')}**", *cells])
    return table(["model, %", *(text(one.title) for one in experiments.values())], rows)


def own_details(name: str, pooled: Sequence[Pooled]) -> str:
    """An experiment that nothing is published about."""
    metric = own_metric(pooled)
    metrics: list[MetricName] = [metric, *BESIDE.get(metric, [])]
    rows = [[text(one.label), *(shown(one, key) for key in metrics), *_run_cells(one)] for one in pooled]
    return table(["model", *(METRICS[key].title for key in metrics), *RUN_HEADER], rows)


def headline_rows(quality: Quality) -> list[list[str]]:
    """A row for each experiment: the best published minRNN, and our counterpart whose set-up is nearest to the published one."""
    rows = []
    for name, experiment in quality.published.experiments.items():
        if (metric := experiment.metric) is None:
            continue
        ranked = sorted(experiment.rows, key=lambda row: row.value or 0, reverse=METRICS[metric].percent)
        targets = [row for row in ranked if row.match and "cell" in row.match]
        pairs = [
            (row, one)
            for row, one in lines(experiment, quality.pooled.get(name, []))
            if one and not one.task and one.value(metric)
        ]
        row, one = (
            min(pairs, key=lambda pair: _distance(experiment, targets, *pair))
            if pairs
            else (targets[0] if targets else None, None)
        )
        label = text(one.label if one else row.model if row else "minGRU, minLSTM")
        found = lm_eval.counting(experiment, quality.lm_eval)
        ours = shown(one, metric) if one else _lm_eval_cell(found[0]) if found else NOT_RUN
        cells = [f"{text(experiment.title)} ({METRICS[metric].title})", label, published_cell(row), ours]
        differing = len(differences(experiment, one)) if one else 0
        setup = f"settings that differ: {differing}" if differing else "as published"
        told = [str(len(one.runs)), steps_cell(one), setup] if one else ["-", "-", "-"]
        rows.append([*cells, difference_cell(row, one.value(metric) if one else None, metric), *told])
    return rows


def _distance(
    experiment: Experiment, targets: Sequence[Row], row: Row | None, pooled: Pooled
) -> tuple[int, int]:
    """How far a run of ours is from what the headline wants: the rank of its published row, then the settings that differ."""
    return next((i for i, target in enumerate(targets) if target is row), len(targets)), len(
        differences(experiment, pooled)
    )


def _lm_eval_cell(found: lm_eval.Score) -> str:
    told = number(100 * found.value, True) + (
        f" ± {number(100 * found.error, True)}" if found.error is not None else ""
    )
    return link(told, found.source.name)


def by_length(pooled: Sequence[Pooled]) -> str | None:
    """Accuracies at test lengths, a row for each entry; None where there are none."""
    found = {one.label: _at_lengths(one) for one in pooled}
    lengths = sorted({length for of_one in found.values() for length in of_one})
    if not lengths:
        return None
    entries = {one.label: one for one in pooled}
    rows = [
        [
            text(label),
            *(
                linked(estimate(of_one[length]), True, entries[label].sources, len(entries[label].runs))
                if length in of_one
                else "-"
                for length in lengths
            ),
        ]
        for label, of_one in found.items()
        if of_one
    ]
    chance = next(
        seed.final.chance for one in pooled for seed in one.seeds if seed.final and seed.final.by_length
    )
    if chance is not None:
        rows.append(["a guess", *[number(100 * chance, True)] * len(lengths)])
    return table(["accuracy, %, at length", *(f"{length:,}" for length in lengths)], rows)


def _at_lengths(pooled: Pooled) -> dict[int, list[float]]:
    """length -> percent of each seed."""
    found: dict[int, list[float]] = {}
    for seed in pooled.seeds:
        for length, accuracy in ((seed.final.by_length if seed.final else None) or {}).items():
            found.setdefault(int(length), []).append(100 * accuracy)
    return found
