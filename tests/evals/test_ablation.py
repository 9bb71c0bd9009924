"""What the runs of an ablation say."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minrnn.evals.ablation.measure import AblationRun, compared, tuned_rates
from minrnn.evals.ablation.show import text

LOSSES = st.floats(0.5, 3)


def run(variant: str, seed: int, *losses: float, lr: float = 1e-3, seconds: float = 1.0) -> AblationRun:
    """A run with a validation every 10 steps."""
    curve = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    return AblationRun(variant, seed, losses[-1], "bits per byte", curve, seconds, 100, 1_000_000, lr)


@given(st.lists(LOSSES, min_size=2, max_size=6, unique=True), st.floats(0.01, 1))
def test_the_step_that_reaches_a_loss_is_on_the_curve(losses: list[float], part: float):
    losses = sorted(losses, reverse=True)
    own = run("x", 0, *losses)
    target = losses[0] + part * (losses[-1] - losses[0])
    step = own.step_reaching(target)
    assert step is not None
    i = min(int(step // 10) - 1, len(losses) - 2)
    low, high = losses[i], losses[i + 1]
    assert low + (high - low) * (step - 10 * (i + 1)) / 10 == pytest.approx(target, abs=1e-9)
    assert own.step_reaching(losses[0] + 1) == 10
    assert own.step_reaching(losses[-1] - 0.1) is None


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=2, max_size=5))
def test_differences_are_paired_by_seed(pairs: list[tuple[float, float]]):
    """Also where the runs come in another order, and where the base lacks a seed."""
    runs = [run("new", seed, 4.0, new) for seed, (_, new) in enumerate(pairs)]
    runs += [run("base", seed, 4.0, base) for seed, (base, _) in reversed(list(enumerate(pairs)))]
    runs.append(run("new", 99, 4.0, 0.1))
    base, new = compared(runs, "base")
    assert (base["variant"], base["difference"]) == ("base", {"value": 0.0, "half_width": 0.0})
    assert (base["steps"], base["seconds"]) == (1.0, 1.0)
    percents = [100 * (ours / theirs - 1) for theirs, ours in pairs]
    assert new["difference"]["value"] == pytest.approx(sum(percents) / len(percents), abs=1e-9)
    assert new["seeds"] == list(range(len(pairs)))
    mean = sum(percents) / len(percents)
    deviation = math.sqrt(sum((percent - mean) ** 2 for percent in percents) / (len(percents) - 1))
    quantile = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764}[len(pairs)]  # of Student's t, 97.5 %
    expected = quantile * deviation / math.sqrt(len(pairs))
    assert new["difference"]["half_width"] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_way_to_the_loss_of_the_base():
    runs = [run("base", 0, 3.0, 2.0), run("fast", 0, 2.0, 1.0, seconds=3.0), run("worse", 0, 3.0, 2.5)]
    base, fast, worse = compared(runs, "base")
    assert (fast["steps"], fast["seconds"]) == (0.5, 1.5)
    assert (worse["steps"], worse["seconds"]) == (None, None)
    assert fast["difference"] == {"value": -50.0, "half_width": None}
    record = {"rows": [base, {**fast, "is_at_the_end": True}, worse], "base": "base", "unit": "bits per byte"}
    record["missing"] = ["worse-seed1"]
    lines = text(record).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["variant", "base", "fast", "worse"]
    assert "0.001*" in lines[2]
    assert "-50.00 %" in lines[2]
    assert lines[3].split()[-2:] == ["-", "-"]
    assert "at the end of the grid" in lines[4]
    assert "Not finished, and left out: worse-seed1." in lines[4]


def test_a_single_validation_shows_no_way():
    base, better = compared([run("base", 0, 2.0), run("better", 0, 1.0)], "base")
    assert (base["steps"], better["steps"], better["seconds"]) == (None, None, None)


def test_a_base_without_a_finished_run_has_no_rows():
    assert compared([run("new", 0, 2.0)], "base") == []


def test_the_best_rate_of_each_variant():
    runs = [run("a", 7, 2.0, lr=1e-3), run("a", 7, 1.5, lr=2e-3), run("a", 7, 1.9, lr=4e-3)]
    runs += [run("b", 7, 1.2, lr=2e-3), run("b", 7, math.nan, lr=4e-3)]
    first, second, third = tuned_rates(runs, ["a", "b", "c"], [1e-3, 2e-3, 4e-3])
    assert (first["lr"], first["is_at_the_end"]) == (2e-3, False)
    assert (second["lr"], second["losses"]) == (2e-3, {1e-3: math.inf, 2e-3: 1.2, 4e-3: math.inf})
    assert third["losses"] == dict.fromkeys([1e-3, 2e-3, 4e-3], math.inf)
    assert tuned_rates(runs[:1], ["a"], [1e-3])[0]["is_at_the_end"] is False
    assert tuned_rates(runs[:2], ["a"], [1e-3, 2e-3])[0]["is_at_the_end"] is True
