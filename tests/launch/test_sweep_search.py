"""A search draws the settings of its runs with Optuna: once for each run, whoever trains it."""

import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.launch.sweep import search as search_module
from minrnn.launch.sweep.expand import expand
from minrnn.launch.sweep.leases import Leases
from minrnn.launch.sweep.plan import planned, publish
from minrnn.launch.sweep.runner import Hardware, Runner
from minrnn.launch.sweep.search import Study, check_optuna
from minrnn.launch.sweep.spec import Search, Sweep

pytest.importorskip("optuna")
SETTINGS: dict[str, Any] = {
    "optim.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "batch.lanes": {"low": 1, "high": 8, "integer": True},
    "train.prompts": [["a"], ["b", "c"]],
}
# In place of training: the loss is (log10 lr + 2)^2, and some learning rates fail.
FAKE = """
import json, math, os, sys, yaml
run = sys.argv[1]
recipe = yaml.safe_load(open(sys.argv[2]))
lr = recipe["optim"]["lr"]
os.makedirs(run, exist_ok=True)
if lr > 0.05:
    sys.exit("error: NaN")
with open(run + "/metrics.jsonl", "w") as file:
    file.write(json.dumps({"kind": "validation", "step": 5, "loss": (math.log10(lr) + 2) ** 2}))
with open(run + "/config.yaml", "w") as file:
    file.write("train: {steps: 5}")
open(run + "/.finished", "w").close()
"""


def search(**fields: Any) -> Search:
    return Search.model_validate({"runs": 20, "settings": SETTINGS, **fields})


def numbers(runs: int) -> dict[str, int]:
    return {f"search-{i:04d}": i for i in range(runs)}


def write_result(folder: Path, name: str, loss: float) -> None:
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("train: {steps: 5}")
    line = {"kind": "validation", "step": 5, "loss": 9.0, "bits_per_byte": loss}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / ".finished").touch()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_run_keeps_its_settings_whoever_asks(tmp_path: Path, sampler: str):
    first = Study(tmp_path, search(sampler=sampler, startup=2), numbers(6))
    drawn = {}
    for i, name in enumerate(numbers(6)):
        drawn[name] = first.settings(name)
        other = Study(tmp_path, search(sampler=sampler, startup=2), numbers(6))  # after a kill
        assert other.settings(name) == drawn[name]
        if i % 2:
            write_result(tmp_path, name, float(i))
            first.record(name, has_failed=False)
            other.record(name, has_failed=False)  # a second time changes nothing
            assert other.settings(name) == drawn[name]
    assert len({json.dumps(values) for values in drawn.values()}) == 6
    for values in drawn.values():
        assert values.keys() == SETTINGS.keys()
        assert 1e-4 <= values["optim.lr"] <= 1e-1
        assert values["batch.lanes"] in range(1, 9)
        assert values["train.prompts"] in SETTINGS["train.prompts"]


def test_a_worker_that_dies_while_it_draws_leaves_a_trial_that_the_next_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in "ab":
        (tmp_path / name).mkdir()
    expected = Study(tmp_path / "a", search(), numbers(1)).settings("search-0000")
    suggest, calls = search_module._suggest, []

    def dies(trial: Any, key: str, among: Any) -> Any:
        calls.append(key)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return suggest(trial, key, among)

    monkeypatch.setattr(search_module, "_suggest", dies)
    with pytest.raises(KeyboardInterrupt):
        Study(tmp_path / "b", search(), numbers(1)).settings("search-0000")
    monkeypatch.undo()
    drawn = Study(tmp_path / "b", search(), numbers(1)).settings("search-0000")
    assert drawn.keys() == expected.keys()
    assert drawn["optim.lr"] == expected["optim.lr"]  # stored before the worker died
    assert len(Study(tmp_path / "b", search(), numbers(1))._load(None).get_trials()) == 1


@settings(max_examples=3)
@given(st.integers(0, 99), st.permutations(range(4)))
def test_random_settings_depend_on_the_seed_and_the_run_only(
    tmp_path_factory: pytest.TempPathFactory, seed: int, order: list[int]
):
    studies = [
        Study(tmp_path_factory.mktemp("s"), search(sampler="random", seed=seed), numbers(4)) for _ in "ab"
    ]
    in_order = [studies[0].settings(name) for name in numbers(4)]
    shuffled = {i: studies[1].settings(f"search-{i:04d}") for i in order}
    assert in_order == [shuffled[i] for i in range(4)]


def trained(folder: Path, retries: int = 0, workers: int = 1, runs: int = 20, **fields: Any) -> Runner:
    """A search whose runs are trained by FAKE."""
    folder.mkdir()
    fields = {"settings": {"optim.lr": SETTINGS["optim.lr"]}, "startup": 5, **fields}
    entries = [
        {"name": name, "settings": {}, "sizes": {}, "trunk": None, "branch_step": 0, "save_at": []}
        | {"flops": 1.0, "steps": 5, "trial": i}
        for name, i in numbers(runs).items()
    ]

    def command(run: dict[str, Any], recipe: Path) -> list[str]:
        return [sys.executable, "-c", FAKE, str(folder / "runs" / run["name"]), str(recipe)]

    study = Study(folder, search(**fields), numbers(runs))
    leases = Leases(folder / "leases", interval=0.05)
    runner = Runner(folder, entries, {}, command, retries, leases, poll=0.02, study=study)
    threads = [threading.Thread(target=runner.work, args=(Hardware(str(i)),)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not runner.errors
    return runner


def rates(runner: Runner) -> list[float]:
    recipes = sorted((runner.folder / "recipes").glob("*.yaml"))
    return [yaml.safe_load(recipe.read_text())["optim"]["lr"] for recipe in recipes]


def test_a_bayesian_search_learns_and_one_worker_repeats_it(tmp_path: Path):
    def distances(folder: Path, runs: int) -> list[float]:
        """From the best learning rate, in powers of ten; each run's loss is its square."""
        folder.mkdir()
        lr = {"optim.lr": SETTINGS["optim.lr"]}
        found = []
        for name in numbers(runs):
            study = Study(folder, search(startup=5, settings=lr), numbers(runs))
            found.append(abs(math.log10(study.settings(name)["optim.lr"]) + 2))
            write_result(folder, name, found[-1] ** 2)
            study.record(name, has_failed=False)
        return found

    first = distances(tmp_path / "a", 20)
    assert np.median(first[10:]) < 0.7 * np.median(first[:5])
    assert distances(tmp_path / "b", 8) == first[:8]


def test_the_runner_trains_with_the_settings_of_the_study_and_names_the_best(tmp_path: Path):
    runner = trained(tmp_path / "a", runs=3)
    assert runner.study is not None
    assert rates(runner) == [runner.study.settings(name)["optim.lr"] for name in numbers(3)]
    best = min(rates(runner), key=lambda rate: abs(math.log10(rate) + 2))
    assert f"{best:.4g}" in runner.study.summary().splitlines()[3]


def test_two_workers_share_a_study_and_failed_runs_count_as_the_worst(tmp_path: Path):
    runner = trained(tmp_path / "a", workers=2, runs=8, sampler="random")
    failed = {path.stem for path in (runner.folder / "failed").iterdir()}
    assert failed == {name for name, rate in zip(numbers(8), rates(runner), strict=True) if rate > 0.05}
    assert runner.study is not None
    trials = {trial.user_attrs["run"]: trial for trial in runner.study._load(None).get_trials()}
    assert trials.keys() == numbers(8).keys()
    assert all((trials[name].value == float("inf")) == (name in failed) for name in trials)


def test_the_plan_of_a_search_is_that_of_no_other(tmp_path: Path):
    common = {"train.precision": "fp32", "batch.chunk": 32}
    lr = {"optim.lr": SETTINGS["optim.lr"]}

    def sweep(**fields: Any) -> Sweep:
        chosen = {"runs": 3, "settings": lr, **fields}
        return Sweep.model_validate({"out": str(tmp_path / "out"), "settings": common, "search": chosen})

    runs = publish(sweep(), planned(sweep(), expand(sweep())))
    assert [run["trial"] for run in runs] == [0, 1, 2]
    assert all("optim.lr" not in run["settings"] for run in runs)
    assert publish(sweep(), planned(sweep(), expand(sweep()))) == runs
    assert expand(sweep())[0].recipe.optim.lr == pytest.approx(10**-2.5)
    for other in (sweep(seed=1), sweep(runs=4), sweep(settings={"optim.lr": {"low": 1e-4, "high": 1.0}})):
        with pytest.raises(UserError, match="holds another sweep"):
            planned(other, expand(other))


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"optuna is not installed: make setup-search"):
        check_optuna()
