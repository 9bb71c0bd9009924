"""What a fit can and cannot support, in words."""

from .compare import Comparison
from .points import LOSS
from .resample import LEVEL, Fitted, Interval

FEW = 10  # runs for each number of the law: with fewer, intervals tend to be too narrow
BEYOND = 10  # times the largest compute: no statement goes further


def paragraph(fitted: list[Fitted], comparisons: list[Comparison], unit: str, notes: list[str]) -> str:
    """A paragraph for all families, one sentence after the other.

    Args:
        unit: of the losses; LOSS if it is not known.
    """
    unit = "" if unit == LOSS else f" {unit}"
    sentences = [_law(each, unit) for each in fitted]
    sentences += [_comparison(each, unit) for each in comparisons]
    computes = [compute for each in fitted for compute in each.points.compute]
    sentences.append(
        f"The runs span {min(computes):.2g} to {max(computes):.2g} FLOPs. Nothing here says anything about "
        f"more than {BEYOND * max(computes):.2g} FLOPs, {BEYOND} times the largest run."
    )
    if any(each.points.flops is None for each in fitted):
        sentences.append("FLOPs are taken as 6 N D.")
    if not all(each.is_by_run for each in fitted):
        sentences.append(
            "Points were resampled one by one, because they come from too few runs: noise that the budgets "
            "of one run have in common is not in the intervals."
        )
    if notes:
        sentences.append(f"Left out: {'; '.join(notes)}.")
    return " ".join(sentences)


def _law(each: Fitted, unit: str) -> str:
    intervals, points = each.intervals(), each.points
    text = (
        f"{points.family}: {len(points.losses)} runs give E {_interval(intervals['E'])}{unit}, alpha "
        f"{_interval(intervals['alpha'])} and beta {_interval(intervals['beta'])} ({LEVEL} % intervals)."
    )
    if (held_out := each.leave_largest_out) is not None:
        times = held_out["flops"] / held_out["next_flops"]
        text += (
            f" Fitted without its largest run, it predicts that run, {times:.2g} times the compute of the "
            f"next, with an error of {held_out['relative_error']:+.2%}."
        )
    if len(points.losses) < FEW * 5:
        text += f" {len(points.losses)} runs are few for five numbers."
    if side := each.side_of_the_optimum():
        where, which = ("more", "largest") if side > 0 else ("fewer", "smallest")
        text += (
            f" At {each.middle_compute:.2g} FLOPs the optimum has {where} tokens per parameter than any run, "
            f"so its frontier is that of the {which} ratio, {each.ratios[side > 0]:.3g}."
        )
    if intervals["E"].low < 0.01 * points.losses.min():
        text += " The data do not bound E away from 0."
    return text


def _comparison(each: Comparison, unit: str) -> str:
    pair, at = f"{each.first} and {each.second}", f"at {each.high_compute:.2g} FLOPs"
    difference = f"the difference is {_interval(each.difference)}{unit}"
    if each.is_distinguishable:
        lower, higher = (each.first, each.second) if each.difference.value < 0 else (each.second, each.first)
        text = f"{lower} has a lower loss than {higher} {at}: {difference}."
    else:
        text = f"{pair} are not distinguishable {at}: {difference}."
    different = [name for name in ("alpha", "beta") if not getattr(each, name).contains(0.0)]
    text += f" Their exponents are {'distinguishable' if different else 'not distinguishable'}"
    text += f" ({' and '.join(different)})." if different else "."
    if each.crossing is None:
        measured = f"between {each.low_compute:.2g} and {each.high_compute:.2g} FLOPs"
        return f"{text} Their frontiers do not cross {measured}."
    low = f"{each.crossing.low:.2g}" if each.crossing.low > 0 else "below the range"
    high = f"{each.crossing.high:.2g}" if each.crossing.high < float("inf") else "above the range"
    return f"{text} Their frontiers cross at {each.crossing.value:.2g} FLOPs ({low} to {high})."


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"
