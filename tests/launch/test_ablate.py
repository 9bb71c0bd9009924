"""`minrnn ablate`: its file, its two sweeps, and a small one from start to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from minrnn.common.errors import UserError
from minrnn.launch.ablate import command
from minrnn.launch.ablate.spec import Ablation
from minrnn.launch.cli import main
from minrnn.launch.sweep.expand import PlannedRun, expand
from minrnn.launch.sweep.spec import Sweep

SETTINGS = {
    "train.precision": "fp32",
    "train.steps": 6,
    "train.eval_every": 2,
    "train.sample_tokens": 0,
    "batch.chunk": 16,
    "batch.lanes": 2,
    "model.hidden_size": 16,
    "model.num_hidden_layers": 1,
    "tracking.uri": None,
    "data.validation_tokens": 1000,
}
FIELDS: dict[str, Any] = {
    "settings": SETTINGS,
    "seeds": [0, 1],
    "tuning": {"learning_rates": [1e-3, 4e-3], "settings": {"train.steps": 3}},
    "variants": {"default": {}, "norm": {"model.output_norm": True}},
}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "out"), **FIELDS, **changes}))
    return str(path)


def test_the_two_sweeps(tmp_path: Path):
    ablation = Ablation.read(write(tmp_path))
    tuning = ablation.tuning_sweep()
    assert tuning is not None
    assert [run.name for run in expand(tuning)] == [
        *("default-lr0.001", "default-lr0.004", "norm-lr0.001", "norm-lr0.004")
    ]
    assert {run.recipe.train.steps for run in expand(tuning)} == {3}
    assert {run.recipe.run.seed for run in expand(tuning)} == {100}
    runs = expand(ablation.sweep({"default": 4e-3, "norm": 1e-3}))
    assert [run.name for run in runs] == ["default-seed0", "default-seed1", "norm-seed0", "norm-seed1"]
    assert [run.recipe.optim.lr for run in runs] == [4e-3, 4e-3, 1e-3, 1e-3]
    assert [run.recipe.model.output_norm for run in runs] == [False, False, True, True]


def test_a_single_rate_is_not_tuned(tmp_path: Path):
    assert Ablation.read(write(tmp_path, tuning={"learning_rates": [1e-3]})).tuning_sweep() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": {"learning_rates": [1e-3, 1e-3]}}, r"tuning\.learning_rates: names a rate twice"),
        ({"tuning": {"learning_rates": [1e-3], "seed": 1}}, r"tuning\.seed: is one of seeds: 1"),
        ({"tuning": {"learning_rates": []}}, r"tuning\.learning_rates: is empty"),
        (
            {"tuning": {"learning_rate": [1e-3]}},
            r"tuning\.learning_rate: unknown .*learning_rates",
        ),
        ({"tuning": {"learning_rates": [0.0]}}, r"tuning\.learning_rates\.0: .*greater than 0"),
        ({"variant": {}}, r"variant: unknown key \(did you mean variants\?\)"),
        ({"variants": {}}, "variants: is empty"),
        ({"variants": {"a b": {}}}, r"variants\.a b"),
        ({"variants": {"default": {"optim.lr": 1.0}}}, r"variants\.default: sets optim\.lr, which is tuned"),
        ({"settings": {"optim.lr": 1.0}}, r"settings: sets optim\.lr, which is tuned"),
        ({"seeds": [0, 0]}, "seeds: names a seed twice"),
        ({"variants": {"default": {"run.resume": "never"}}}, r"variants\.default\.run\.resume: is set by"),
        ({"variants": {"x" * 78: {}}}, "variants: names with their learning rates have up to 86 characters"),
        (
            {"settings": {"train.precision": "fp32", "data.corpus": "synthetic/parity"}},
            r"data\.corpus: is a task; minrnn abl",
        ),
        (
            {"variants": {"default": {}, "other": {"data.corpus": "shakespeare"}}},
            r"variants\.other: differs in data\.corpus: losses on different data do not compare",
        ),
    ],
)
def test_errors_of_the_file(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        command.main([write(tmp_path, **changes), "--plan"])


def test_all_errors_of_all_runs_come_before_training(tmp_path: Path):
    variants = {"default": {}, "x": {"model.output_nrom": True}, "y": {"model.cell": "gru"}}
    with pytest.raises(UserError) as caught:
        command.main([write(tmp_path, variants=variants)])
    text = str(caught.value)
    assert "model.output_nrom: unknown key (did you mean model.output_norm?)" in text
    assert "'gru' is none of" in text
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_none(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"nosuch: cannot be read: .*; ablations that come with minrnn: block"
    ):
        command.main(["nosuch"])
    (tmp_path / "x.yaml").write_text("[1, 2]")
    with pytest.raises(UserError, match="must hold out, tuning and variants"):
        command.main([str(tmp_path / "x.yaml")])
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        command.main([str(tmp_path / "x.yaml")])


@pytest.mark.parametrize("name", sorted(Ablation.shipped()))
def test_shipped_ablations_are_valid(name: str):
    ablation = Ablation.read(name)
    tuning = ablation.tuning_sweep()
    assert tuning is not None
    assert len(expand(tuning)) >= 3 * len(ablation.variants)
    assert len(expand(ablation.sweep(dict.fromkeys(ablation.variants, 1e-3)))) >= 3 * len(ablation.variants)


def test_plan_prints_both_parts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path)
    main(["ablate", path, "--plan", "--tflops", "1", "--settings.batch.lanes", "4"])
    text = capsys.readouterr().out
    assert text.startswith("tuning: 4 runs")
    assert "comparison: 4 runs" in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["ablation.yaml"]


def trained(sweep: Sweep, expanded: Any, workers: int) -> bool:
    """Stands for training: `norm` is better at 1e-3, `default` at 4e-3; rates from 1e-2 on fail."""
    from minrnn.launch.sweep.plan import planned, publish

    for entry in publish(sweep, planned(sweep, expanded)):
        run = next(run for run in expanded if run.name == entry["name"])
        rate, seed, steps = run.recipe.optim.lr, run.recipe.run.seed, run.recipe.train.steps
        if rate >= 1e-2:
            continue
        is_best = rate == (1e-3 if run.recipe.model.output_norm else 4e-3)
        loss = (1.9 if run.recipe.model.output_norm else 2.0) + 0.01 * seed + (0 if is_best else 0.5)
        folder = Path(sweep.out) / "runs" / entry["name"]
        folder.mkdir(parents=True, exist_ok=True)
        config = {"run": {"seed": seed}, "optim": {"lr": rate}, "train": {"steps": steps}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [{"kind": "train", "step": 1, "tokens_per_second": 100.0}]
        lines += [
            {
                "kind": "validation",
                "step": step,
                "tokens": 32 * step,
                "loss": 1.0,
                "bits_per_byte": 2 * loss - bits,
            }
            for step, bits in ((1, 0), (steps, loss))
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / ".finished").touch()
    return False


def test_tuned_compared_and_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With stand-ins for training. Variants and rates may be added, and variants taken out."""
    monkeypatch.setattr(command, "train_sweep", trained)
    command.main([write(tmp_path)])
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [(row["variant"], row["lr"]) for row in record["rows"]] == [("default", 4e-3), ("norm", 1e-3)]
    expected = 100 * ((1.9 / 2.0 - 1) + (1.91 / 2.01 - 1)) / 2
    assert record["rows"][1]["difference"]["value"] == pytest.approx(expected)
    assert all(row["is_at_the_end"] for row in record["rows"])
    assert record["tuning"][0]["losses"] == pytest.approx({"0.001": 3.5, "0.004": 3.0})
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 1000
    assert "norm" in capsys.readouterr().out
    more = {**FIELDS["variants"], "scales": {"model.residual_scales": True}}
    tuning = {"learning_rates": [1e-3, 4e-3, 1e-2], "settings": {"train.steps": 3}}
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/sweep.json")}
    command.main([write(tmp_path, variants=more, tuning=tuning)])
    assert all(path.stat().st_mtime_ns > old for path, old in finished.items())
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [row["variant"] for row in record["rows"]] == ["default", "norm", "scales"]
    assert record["tuning"][0]["losses"]["0.01"] is None
    assert [row["is_at_the_end"] for row in record["rows"]] == [False, True, False]
    tuning = {"learning_rates": [1e-3, 4e-3, 1e-2, 2e-3], "settings": {"train.steps": 3}}
    monkeypatch.setattr(
        command, "tuned_rates", lambda *_: [{**record["tuning"][1], "losses": {2e-3: 1.0}, "lr": 2e-3}]
    )
    message = r"the best rate of norm is now 0\.002, and .*runs has runs at 0\.001; name another out"
    with pytest.raises(UserError, match=message):
        command.main([write(tmp_path, variants=more, tuning=tuning)])
    monkeypatch.undo()
    monkeypatch.setattr(command, "train_sweep", trained)
    main(["ablate", write(tmp_path, variants=more), "--plan", "--tflops", "1"])
    assert "comparison: 6 runs" in capsys.readouterr().out
    command.main([write(tmp_path, variants={"default": {}, "scales": {"model.residual_scales": True}})])
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [row["variant"] for row in record["rows"]] == ["default", "scales"]
    planned = json.loads((tmp_path / "out" / "runs" / "sweep.json").read_text())["runs"]
    assert len(planned) == 6  # those of `norm` stay
    changed = {"default": {"model.hidden_size": 8}, "norm": {"model.output_norm": True}}
    with pytest.raises(UserError, match=r"holds another sweep: default-lr0\.001"):
        command.main([write(tmp_path, variants=changed)])
    with pytest.raises(UserError, match="holds another sweep"):
        command.main([write(tmp_path, variants={"another": {}})])


def test_a_variant_that_always_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And so is a run that is not finished; both are named. Without the first variant nothing is compared."""

    def failing(sweep: Sweep, expanded: list[PlannedRun], workers: int) -> bool:
        trained(sweep, expanded, workers)
        for folder in (Path(sweep.out) / "runs").iterdir():
            if folder.name.startswith("norm-lr") or folder.name == "scales-seed1":
                (folder / ".finished").unlink()
        return True

    monkeypatch.setattr(command, "train_sweep", failing)
    variants = {**FIELDS["variants"], "scales": {"model.residual_scales": True}}
    with pytest.raises(SystemExit):
        command.main([write(tmp_path, variants=variants)])
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [(row["variant"], row["seeds"]) for row in record["rows"]] == [
        ("default", [0, 1]),
        ("scales", [0]),
    ]
    assert record["missing"] == ["scales-seed1", "norm (its tuning failed)"]
    assert "every run of the tuning of norm failed" in capsys.readouterr().err
    with pytest.raises(UserError, match="every run of norm failed, which all others are compared with"):
        command.main(
            [write(tmp_path, out=str(tmp_path / "new"), variants={"norm": {"model.output_norm": True}})]
        )


@pytest.mark.slow
def test_a_small_ablation_is_trained_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command.main([write(tmp_path), "--workers", "2"])
    first = (tmp_path / "out" / "ablation.json").read_text()
    record = json.loads(first)
    assert [row["variant"] for row in record["rows"]] == ["default", "norm"]
    assert record["rows"][0]["difference"]["value"] == 0
    assert record["unit"] == "bits per byte"
    assert record["rows"][1]["parameters"] > record["rows"][0]["parameters"]
    command.main([write(tmp_path)])
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"] == record["rows"]
    assert "4 done" in capsys.readouterr().out
