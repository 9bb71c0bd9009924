"""What a sweep consists of: its runs, their settings, its plan."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.launch.cli import main
from minrnn.launch.sweep import command
from minrnn.launch.sweep.expand import expand
from minrnn.launch.sweep.plan import planned, publish
from minrnn.launch.sweep.rules import Rules, decay_start
from minrnn.launch.sweep.spec import Sweep
from minrnn.pipeline.optim import learning_rate
from minrnn.pipeline.optim_section import OptimSection

COMMON = {"train.precision": "fp32", "batch.chunk": 32}
LADDER: dict[str, Any] = {
    "sizes": ["20k", "40k"],
    "budgets": [4, 1, 2],
    "families": {"minGRU": {}, "paper": {"model.preset": "paper"}},
    "rules": {"warmup": 0.1, "batch_tokens": 100_000},
}


def sweep(**fields: Any) -> Sweep:
    return Sweep.model_validate({"out": "unused", "settings": COMMON, **fields})


@settings(max_examples=10)
@given(
    st.dictionaries(
        st.sampled_from(["optim.lr", "optim.beta2", "run.seed"]),
        st.lists(st.sampled_from([0.25, 0.5, 0.75]), min_size=1, max_size=3, unique=True),
        min_size=1,
    )
)
def test_a_grid_is_every_combination_once(grid: dict[str, list[float]]):
    grid["batch.lanes"] = [int(4 * value) for value in grid.pop("run.seed", [0.5])]
    runs = expand(sweep(grid=grid))
    assert len(runs) == len({run.name for run in runs})
    product = 1
    for values in grid.values():
        product *= len(values)
    assert len(runs) == product
    for run in runs:
        assert all(run.settings[key] in values for key, values in grid.items())
        assert run.recipe.optim.lr == run.settings.get("optim.lr", run.recipe.optim.lr)


@settings(max_examples=10)
@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6))
def test_more_random_runs_leave_the_first_unchanged(seed: int, few: int, more: int):
    drawn = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "model.cell": ["mingru", "minlstm"]}
    drawn["batch.lanes"] = {"low": 1, "high": 9, "integer": True}
    first, second = (
        expand(sweep(random={"runs": runs, "seed": seed, "settings": drawn})) for runs in (few, few + more)
    )
    assert [run.settings for run in first] == [run.settings for run in second[:few]]
    for run in second:
        assert 1e-4 <= run.settings["optim.lr"] <= 1e-2
        assert isinstance(run.settings["batch.lanes"], int)


def test_variants_are_runs_by_name_with_each_seed():
    variants = {
        "reset": {"batch.carry_state": False, "optim.lr": 1e-3},
        "far-4": {"batch.backprop_chunks": 4},
    }
    runs = expand(sweep(settings={**COMMON, "optim.lr": 2e-3}, variants=variants, seeds=[0, 1]))
    assert [run.name for run in runs] == ["reset-seed0", "reset-seed1", "far-4-seed0", "far-4-seed1"]
    assert [run.family for run in runs] == ["reset", "reset", "far-4", "far-4"]
    assert [run.recipe.optim.lr for run in runs] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert [run.recipe.batch.backprop_chunks for run in runs] == [1, 1, 4, 4]


def test_a_ladder_branches_the_shorter_budgets_off_the_longest():
    runs = expand(sweep(ladder=LADDER, seeds=[0, 1]))
    assert len(runs) == 2 * 2 * 3 * 2
    by_name = {run.name: run for run in runs}
    for run in runs:
        size = run.recipe.model.num_parameters
        assert size in (20_000, 40_000)
        budget = float(run.name.split("-")[2].removesuffix("x"))
        tokens = run.recipe.train.steps * run.recipe.batch.tokens_per_step
        assert tokens == pytest.approx(budget * size, abs=run.recipe.batch.tokens_per_step)
        if budget == 4:
            assert run.trunk is None
            continue
        assert run.trunk is not None
        trunk = by_name[run.trunk]
        assert run.branch_step in trunk.save_at
        same = {key for key in run.settings if key != "train.steps"}
        assert {key: trunk.settings[key] for key in same} == {key: run.settings[key] for key in same}


def test_a_ladder_s_batch_has_the_tokens_of_the_rule_for_any_number_of_chunks():
    rules = {"warmup": 0.1, "batch_tokens": 10_000_000}
    chosen = {"sizes": ["40k"], "budgets": [4], "rules": rules}
    batches = {}
    for chunks in (1, 4):
        several = {**COMMON, "batch.readers": 1, "batch.backprop_chunks": chunks}
        (run,) = expand(sweep(settings=several, ladder=chosen))
        batches[chunks] = run.recipe.batch
    assert batches[4].lanes < batches[1].lanes
    assert batches[4].tokens_per_step == pytest.approx(batches[1].tokens_per_step, rel=0.02)


def test_a_family_s_rules_change_its_own_runs_only():
    """And only the numbers that they name: the others are those of the ladder."""
    lr, warmup = 0.01, LADDER["rules"]["warmup"]
    families = {"minGRU": {}, "minLSTM": {"model.cell": "minlstm"}}
    plain, changed = (
        expand(sweep(ladder={**LADDER, "families": families, "family_rules": own}))
        for own in ({}, {"minLSTM": {"lr": lr}})
    )
    for before, after in zip(plain, changed, strict=True):
        if after.family == "minLSTM":
            assert after.settings.pop("optim.lr") != before.settings.pop("optim.lr")
            rules = Rules(lr=lr, warmup=warmup)
            assert after.recipe.optim.lr == pytest.approx(
                rules.learning_rate(after.settings["model.num_parameters"]), rel=1e-5
            )
        assert after.settings == before.settings


@given(st.integers(2, 400), st.integers(2, 400), st.floats(0.01, 0.9), st.integers(0, 30))
def test_schedules_agree_until_a_branch_begins(steps: int, more: int, fraction: float, warmup: int):
    config = OptimSection(schedule="wsd", decay_fraction=fraction, warmup_steps=warmup)
    start = decay_start(steps, fraction)
    for step in range(1, start + 1):
        assert learning_rate(config, step, steps) == learning_rate(config, step, steps + more)
    if start > warmup:
        assert learning_rate(config, start + 1, steps) < learning_rate(config, start, steps + more)


def test_the_rules_are_those_of_the_published_ladder():
    rules = Rules()
    assert rules.learning_rate(108_000_000) == pytest.approx(0.0047 / 2)
    assert rules.learning_rate(8 * 108_000_000) == pytest.approx(0.0047 / 4)
    assert rules.lanes(108_000_000, readers=4, chunk=2048) == 40
    assert rules.lanes(8 * 108_000_000, readers=4, chunk=2048) == 160
    assert rules.settings(10**6, 1, 64)["optim.warmup_steps"] * rules.lanes(
        10**6, 1, 64
    ) * 64 == pytest.approx(10**6, rel=0.01)
    assert [rules.layers(size) for size in (10**4, 10**6, 10**7, 10**8)] == [2, 3, 6, 13]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": {"optim.lrr": [1]}}, r"optim\.lrr: unknown key \(did you mean optim\.lr\?\)"),
        ({"grid": {}}, "grid: names no setting"),
        ({"grid": {"optim.lr": []}}, r"grid\.optim\.lr: "),
        ({}, "sweep: must have one of grid, variants, random, search, ladder, not none"),
        ({"grid": {"optim.lr": [1e-3, 1e-3]}}, "have the same settings"),
        ({"grid": {"optim.weight_decay": [0, 0.0]}}, "have the same settings"),
        ({"grid": {"batch.chunk": [16, 32]}}, r"batch\.chunk: is in settings and in grid; name it once"),
        ({"base": "nosuch", "grid": {"optim.lr": [1e-3]}}, "base: cannot read nosuch"),
        (
            {"search": {"runs": 3, "settings": {"optim.lr": [1e-3, 2e-3]}}},
            r"search\.runs: has 2 combinations for 3 runs",
        ),
        ({"grid": {"run.dir": ["a"]}}, r"run\.dir: is set by the sweep"),
        ({"grid": {"run.seed": [1, 2]}}, r"run\.seed: .*name its values in seeds"),
        ({"settings": {**COMMON, "run.seed": 1}, "grid": {"optim.lr": [1e-3]}}, r"run\.seed: .*in seeds"),
        (
            {"grid": {key: list(range(1, 401)) for key in ("optim.lr", "batch.lanes")}},
            "grid: has 160,000 combinations, more than 100,000",
        ),
        ({"grid": {"optim.lr": [-1.0, 2.0]}}, r"optim\.lr: .*greater than 0"),
        (
            {"settings": {}, "grid": {"train.precision": ["auto"]}},
            r"train\.precision: auto is measured by each run",
        ),
        (
            {"ladder": {**LADDER, "budgets": [0.001]}},
            r"ladder\.budgets: minGRU-20k-0.001x would have 0 steps",
        ),
        ({"ladder": {**LADDER, "families": {"a": {"optim.schedule": "cosine"}}}}, r"ladder\.branch: is for"),
        ({"ladder": {**LADDER, "families": {"a": {"train.steps": 5}}}}, r"train\.steps: follows from"),
        ({"ladder": {**LADDER, "budgets": [1, 1]}}, r"ladder\.budgets: names a value twice"),
        (
            {"ladder": {**LADDER, "family_rules": {"minGru": {}}}},
            r"ladder\.family_rules\.minGru: names no family \(did you mean minGRU\?\)",
        ),
        (
            {"ladder": {**LADDER, "family_rules": {"minGRU": {"lrr": 1}}}},
            r"family_rules\.minGRU\.lrr: unknown key \(did you mean lr\?\)",
        ),
        ({"ladder": {**LADDER, "size": [1]}}, r"ladder\.size: unknown key \(did you mean sizes\?\)"),
        (
            {"random": {"runs": 1, "settings": {"optim.lr": {"low": 2, "high": 1}}}},
            "high: must be at least low",
        ),
        (
            {"search": {"runs": 1, "settings": {"optim.lr": {"low": -1, "high": 1}}}},
            r"optim\.lr: .*greater than 0",
        ),
        (
            {"search": {"runs": 1, "settings": {"train.steps": [1, 2]}}},
            r"search\.settings\.train\.steps: cannot be drawn",
        ),
        (
            {"search": {"runs": 1, "settings": {"data.corpus": ["a", "b"]}}},
            r"search\.settings\.data\.corpus: cannot be drawn",
        ),
        (
            {"search": {"runs": 1, "settings": {"optim.lr": [1e-3]}}, "seeds": [0, 1]},
            "seeds: must be one for a search",
        ),
        (
            {"search": {"runs": 1, "samplr": "tpe", "settings": {"optim.lr": [1e-3]}}},
            r"search\.samplr: unknown key \(did you mean sampler\?\)",
        ),
        ({"outt": "x", "grid": {"optim.lr": [1e-3]}}, r"outt: unknown key \(did you mean out\?\)"),
    ],
)
def test_errors_of_a_sweep_come_before_training(tmp_path: Path, fields: dict[str, Any], message: str):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "settings": COMMON, **fields}))
    with pytest.raises(UserError, match=message):
        expand(Sweep.read(str(path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"launcher": "nosuch.yaml"}, r"launcher: there is no file nosuch\.yaml"),
        ({"processes": 3}, r"batch\.readers: .* cannot be shared evenly by 3 processes"),
    ],
)
def test_processes_that_cannot_start_are_found_before_training(fields: dict[str, Any], message: str):
    chosen = sweep(grid={"optim.lr": [1e-3]}, **fields)
    runs = expand(chosen)
    with pytest.raises(UserError, match=message):
        planned(chosen, runs)


def test_a_corpus_that_cannot_be_opened_is_found_before_training(tmp_path: Path):
    settings = {**COMMON, "data.corpus": "nosuch.txt"}
    path = tmp_path / "sweep.yaml"
    fields = {"out": str(tmp_path / "out"), "settings": settings, "grid": {"optim.lr": [1e-3]}}
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(UserError, match=r"there is no file, folder or match for nosuch\.txt"):
        command.main([str(path)])
    assert not (tmp_path / "out").exists()


def test_settings_of_the_command_line_replace_those_of_the_file(
    tmp_path: Path,
):
    path = tmp_path / "sweep.yaml"
    fields = {"out": str(tmp_path), "settings": COMMON, "grid": {"optim.lr": [1e-3]}}
    path.write_text(yaml.safe_dump(fields))
    words, given = command.settings_options(
        ["--settings.batch.chunk", "64", str(path), "--settings.data.corpus=a=b", "--plan"]
    )
    assert words == [str(path), "--plan"]
    read = Sweep.read(str(path), given)
    assert read.settings == {**COMMON, "batch.chunk": 64, "data.corpus": "a=b"}
    with pytest.raises(UserError, match=r"--settings\.optim\.lr: lacks a value"):
        command.settings_options([str(path), "--settings.optim.lr", "--plan"])
    with pytest.raises(UserError, match=r"data\.corpsu: unknown key \(did you mean data\.corpus\?\)"):
        expand(Sweep.read(str(path), {"data.corpsu": "x"}))


def test_the_plan_is_the_same_for_all_workers_and_no_other_sweep(tmp_path: Path):
    first = sweep(out=str(tmp_path / "out"), ladder=LADDER)
    runs = publish(first, planned(first, expand(first)))
    assert publish(first, planned(first, expand(first))) == runs
    for run in runs:
        assert run["parameters"]["all"] == pytest.approx(run["settings"]["model.num_parameters"], rel=0.02)
        steps = run["steps"] - run["branch_step"]
        assert run["flops"] == pytest.approx(run["flops_per_token"] * run["tokens"] * steps / run["steps"])
    other = sweep(out=str(tmp_path / "out"), ladder={**LADDER, "budgets": [4, 2]})
    with pytest.raises(UserError, match="holds another sweep"):
        planned(other, expand(other))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"holds thesis.txt and no sweep\.json"):
        publish(sweep(out=str(tmp_path / "full"), grid={"optim.lr": [1.0]}), runs)


def test_plan_prints_runs_flops_and_hours_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "sweep.yaml"
    fields = {"out": str(tmp_path / "out"), "settings": COMMON, "grid": {"model.hidden_size": [16, 32]}}
    fields["settings"] = {**COMMON, "data.corpus": ["python-stdlib", {"corpus": "notes.txt", "weight": 2}]}
    path.write_text(yaml.safe_dump(fields))
    main(["sweep", str(path), "--plan", "--tflops", "1"])
    text = capsys.readouterr().out
    assert "hidden_size=16" in text
    assert "hours at 30% of 1 TFLOP/s" in text
    assert list(tmp_path.iterdir()) == [path]


def test_plan_of_a_search_that_draws_the_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("optuna")
    path = tmp_path / "sweep.yaml"
    chosen = {"runs": 2, "settings": {"train.precision": ["fp32", "bf16"]}}
    settings = {key: value for key, value in COMMON.items() if key != "train.precision"}
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "settings": settings, "search": chosen}))
    main(["sweep", str(path), "--plan", "--tflops", "1"])
    assert "2 runs" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(Sweep.shipped()))
def test_shipped_sweeps_are_valid(name: str):
    assert len(expand(Sweep.read(name))) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(Sweep.shipped()))
def test_every_family_of_a_shipped_sweep_has_its_sizes(name: str, tmp_path: Path):
    shipped = Sweep.read(name)
    shipped.out = str(tmp_path / "out")
    assert all(run["flops"] > 0 for run in planned(shipped, expand(shipped)))
