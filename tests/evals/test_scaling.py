"""Scaling laws are found again from losses that follow them."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.evals.scaling.command import main
from minrnn.evals.scaling.compare import compare
from minrnn.evals.scaling.law import Cost, Fit, Law
from minrnn.evals.scaling.points import Points, read_points
from minrnn.evals.scaling.resample import NAMES, fit_family
from minrnn.evals.scaling.words import paragraph

CHINCHILLA = Law(1.82, 482.0, 2085.0, 0.348, 0.366)
SIZES, RATIOS = np.geomspace(1e6, 1e8, 5), (5, 10, 20, 40, 80)


def points(law: Law, noise: float, seed: int = 0, family: str = "f") -> Points:
    """Runs of five sizes and five budgets, whose losses have log-normal noise."""
    sizes, ratios = (grid.ravel() for grid in np.meshgrid(SIZES, RATIOS))
    tokens = sizes * ratios
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(len(sizes)))
    runs = [f"run-{i}" for i in range(len(sizes))]
    return Points(family, sizes, tokens, law.loss(sizes, tokens) * factor, None, runs)


LAWS = st.builds(
    Law,
    E=st.floats(0.5, 3.0),
    A=st.floats(100, 1000),
    B=st.floats(500, 5000),
    alpha=st.floats(0.25, 0.5),
    beta=st.floats(0.25, 0.5),
)


@settings(max_examples=5, deadline=None)
@given(LAWS)
def test_a_law_is_found_again_from_losses_without_noise(law: Law):
    exact = points(law, 0.0)
    found = Fit(exact.parameters, exact.tokens, exact.losses).best()
    np.testing.assert_allclose(found.loss(exact.parameters, exact.tokens), exact.losses, rtol=1e-5)
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.03)


def test_a_robust_loss_ignores_one_run_that_went_wrong():
    exact = points(CHINCHILLA, 0.0)
    losses = exact.losses.copy()
    losses[7] *= 1.3
    found = Fit(exact.parameters, exact.tokens, losses).best()
    assert pytest.approx(CHINCHILLA.E, rel=0.01) == found.E
    assert found.alpha == pytest.approx(CHINCHILLA.alpha, rel=0.02)


def covered(draws: int, replicates: int) -> int:
    """In how many draws with 1 % noise all five numbers are in their intervals."""
    number = 0
    for seed in range(draws):
        intervals = fit_family(points(CHINCHILLA, 0.01, seed), replicates, seed).intervals()
        number += all(intervals[name].contains(getattr(CHINCHILLA, name)) for name in NAMES)
    return number


def test_intervals_hold_the_law():
    assert covered(draws=3, replicates=80) == 3


@pytest.mark.slow
def test_intervals_hold_the_law_in_nine_of_ten_draws():
    assert covered(draws=20, replicates=300) >= 18


def test_resampling_depends_on_the_seed_only_and_draws_whole_runs():
    noisy = points(CHINCHILLA, 0.01)
    first, second = (fit_family(noisy, 20, 3) for _ in range(2))
    np.testing.assert_array_equal(first.replicates.E, second.replicates.E)
    assert first.is_by_run
    few = Points(
        noisy.family,
        *(getattr(noisy, n) for n in ("parameters", "tokens", "losses", "flops")),
        runs=["a", "b"] * 12 + ["a"],
    )
    assert not fit_family(few, 20, 3).is_by_run


def test_the_largest_run_is_predicted_from_the_others():
    held_out = fit_family(points(CHINCHILLA, 0.002), 20, 0).leave_largest_out
    assert held_out is not None
    assert held_out["parameters"] == SIZES[-1]
    assert held_out["tokens"] == SIZES[-1] * RATIOS[-1]
    assert abs(held_out["relative_error"]) < 0.02


@given(LAWS, st.floats(0.8, 1.1), st.floats(14, 20))
def test_the_optimum_has_the_lowest_loss_of_its_compute(law: Law, power: float, log_compute: float):
    cost, compute = Cost(7.0, power), 10**log_compute
    parameters, tokens = law.optimum(compute, cost)
    assert cost.flops(parameters, tokens) == pytest.approx(compute)
    others = parameters * np.geomspace(0.1, 10, 41)
    losses = law.loss(others, cost.tokens(compute, others))
    assert law.loss(parameters, tokens) <= losses.min() * (1 + 1e-9)
    more = law.optimum(compute * 10, cost)[0]
    assert np.log10(more / parameters) == pytest.approx(law.exponent_of_compute(cost))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("a", "alpha", "side"), [(1.0, 1e-6, 1), (482.0, 0.348, 0), (6000.0, 0.348, -1)])
def test_the_frontier_has_tokens_per_parameter_as_measured(a: float, alpha: float, side: int):
    """A law whose optimum lies elsewhere says so, and is compared where it was measured."""
    law = Law(0.2, a, 2085.0, alpha, 0.366)
    fitted = fit_family(points(law, 0.003), 40, 0)
    compute = fitted.points.compute
    grid = np.geomspace(compute.min(), 10 * compute.max(), 20)
    for laws in (fitted.law, fitted.columns()):
        parameters, tokens, losses = fitted.frontier(grid, laws)
        ratios = tokens / parameters
        assert ratios.min() >= RATIOS[0] * (1 - 1e-9)
        assert ratios.max() <= RATIOS[-1] * (1 + 1e-9)
        flops = np.broadcast_to(fitted.cost.flops(parameters, tokens), losses.shape)
        np.testing.assert_allclose(flops, np.broadcast_to(grid, losses.shape))
    assert fitted.side_of_the_optimum() == side
    worse = Law(law.E, law.A * 1.1, law.B * 1.1, law.alpha, law.beta)
    comparison = compare(fitted, fit_family(points(worse, 0.003, 1, "worse"), 40, 1))
    assert comparison is not None
    assert comparison.is_distinguishable
    assert comparison.difference.value < 0
    text = paragraph([fitted], [], "bits per byte", [])
    assert ("so its frontier is that of the" in text) == (side != 0)


def test_the_cost_is_that_of_the_runs():
    parameters, tokens = np.array([1e6, 1e7, 1e8]), np.array([2e7, 1e8, 1e9])
    cost = Cost.fitted(parameters, tokens, 9.0 * parameters**0.9 * tokens)
    assert (cost.factor, cost.power) == (pytest.approx(9.0), pytest.approx(0.9))


def test_equal_laws_are_not_distinguishable_and_different_ones_are():
    first = fit_family(points(CHINCHILLA, 0.01, 1, "a"), 60, 1)
    same = compare(first, fit_family(points(CHINCHILLA, 0.01, 2, "b"), 60, 2))
    assert same is not None
    assert not same.is_distinguishable
    worse = Law(CHINCHILLA.E * 1.1, CHINCHILLA.A, CHINCHILLA.B, CHINCHILLA.alpha, CHINCHILLA.beta)
    different = compare(first, fit_family(points(worse, 0.01, 2, "b"), 60, 2))
    assert different is not None
    assert different.is_distinguishable
    assert different.difference.value < 0
    assert different.crossing is None


def test_a_crossing_is_found_where_the_laws_cross():
    steep = Law(1.62, 482.0 * 1.0545, 2085.0 * 1.0545, 0.348, 0.366)
    cost = Cost()
    computes = np.geomspace(5e13, 4e18, 4000)
    gaps = [law.loss(*law.optimum(computes, cost)) for law in (steep, CHINCHILLA)]
    (change,) = np.nonzero(np.diff(np.sign(gaps[0] - gaps[1])))
    fitted = [fit_family(points(law, 0.002, i, str(i)), 60, i) for i, law in enumerate((steep, CHINCHILLA))]
    comparison = compare(*fitted)
    assert comparison is not None
    assert len(change) == 1
    assert comparison.low_compute < computes[change[0]] < comparison.high_compute
    assert comparison.crossing is not None
    assert comparison.crossing.low <= computes[change[0]] <= comparison.crossing.high


def write_csv(path: Path, given: list[Points]) -> Path:
    lines = ["family,parameters,tokens,loss"]
    for each in given:
        lines += [
            f"{each.family},{n},{d},{loss}"
            for n, d, loss in zip(each.parameters, each.tokens, each.losses, strict=True)
        ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_writes_numbers_words_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_csv(
        tmp_path / "losses.csv", [points(CHINCHILLA, 0.01, 0, "a"), points(CHINCHILLA, 0.01, 1, "b")]
    )
    main([str(path), "--replicates", "20"])
    result = json.loads((tmp_path / "losses-fit" / "fit.json").read_text())
    assert {"command", "commit", "time", "machine", "versions", "config"} <= result.keys()
    for family in "ab":
        for name in NAMES:
            assert result["families"][family][name].keys() == {"value", "low", "high"}
        assert len(result["families"][family]["points"]) == 25
    assert len(result["pairs"]) == 1
    assert (tmp_path / "losses-fit" / "fit.png").stat().st_size > 10_000
    text = (tmp_path / "losses-fit" / "fit.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "10 times the largest run" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column family, parameters, tokens, loss"),
        ("family,parameters,tokens,loss,loss\na,1,2,3,4\n", "names a column twice: loss"),
        ("family,parameters,tokens,lss\n", r"no column loss \(did you mean lss\?\)"),
        (
            "family,parameters,tokens,loss\na,1e6,x,3\na,1e6,-5,3\na,1e6,5\n",
            "line 2.*'x'.*line 3.*line 4 has 3 values",
        ),
        ("family,parameters,tokens,loss\na,1e6,1e7,3\na,2e6,1e7,nan\n", "1 of 2 runs diverged: line 3"),
        (
            "family,parameters,tokens,loss\na,1e6,1e7,3\na,2e6,1e7,2.9\n",
            "a has 2 runs of 2 sizes and 1 numbers of tokens",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "losses.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        main([str(path)])
    assert list(tmp_path.iterdir()) == [path]


def write_run(folder: Path, corpus: str, loss: float, step: int, is_finished: bool = True) -> None:
    """The files of a run that a fit reads."""
    folder.mkdir(parents=True)
    model = {"family": "minrnn", "preset": "default", "cell": "mingru", "hidden_size": 32}
    config = {"model": model, "data": {"corpus": corpus}, "batch": {"chunk": 16}, "train": {"steps": 10}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    end = {"kind": "validation", "step": step, "tokens": 1000, "loss": loss, "bits_per_byte": loss / 2}
    (folder / "metrics.jsonl").write_text(json.dumps(end) + "\n")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"vocab_size": 40}')
    if is_finished:
        (folder / ".finished").write_text(str(step))


def test_runs_are_read_and_those_that_are_not_finished_are_counted(tmp_path: Path):
    write_run(tmp_path / "x" / "a", "books", 3.0, 10)
    write_run(tmp_path / "b", "books", 2.5, 5, is_finished=False)
    read = read_points(tmp_path, "all", False)
    (family,) = read.families
    assert (family.family, family.losses.tolist(), family.runs) == ("mingru", [1.5], ["a"])
    assert family.flops is not None
    assert read.unit == "bits per byte"
    assert read.notes == ["1 not finished: b"]
    fewer = read_points(tmp_path, "without_embeddings", False).families[0]
    assert family.parameters[0] - fewer.parameters[0] == 40 * 32


def test_runs_of_other_corpora_are_not_mixed(tmp_path: Path):
    write_run(tmp_path / "a", "books", 3.0, 10)
    write_run(tmp_path / "b", "code", 3.0, 10)
    with pytest.raises(UserError, match=r'data\.corpus.*"books", "code"'):
        read_points(tmp_path, "all", False)


def test_failed_runs_of_a_sweep_are_left_out_only_if_told(tmp_path: Path):
    entry = {"parameters": {"all": 5000}, "flops_per_token": 30.0, "family": "minGRU", "trunk": None}
    runs = [{"name": name, **entry} for name in ("a", "b")]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    write_run(tmp_path / "runs" / "a", "books", 3.0, 10)
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "b.json").write_text("{}")
    with pytest.raises(UserError, match="1 runs failed: b"):
        read_points(tmp_path, "all", False)
    read = read_points(tmp_path, "all", True)
    (family,) = read.families
    assert (family.family, family.parameters[0], family.compute[0]) == ("minGRU", 5000, 30_000)
    assert read.notes == ["1 failed: b"]


def test_the_size_of_a_run_of_a_search_is_that_of_its_folder(tmp_path: Path):
    plan = {"parameters": {"all": 5}, "flops_per_token": 1.0, "family": "", "trunk": None, "trial": 0}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [{"name": "search-0000", **plan}]}))
    write_run(tmp_path / "runs" / "search-0000", "books", 3.0, 10)
    (family,) = read_points(tmp_path, "all", False).families
    assert family.family == "mingru"
    assert family.parameters[0] > 40 * 32
