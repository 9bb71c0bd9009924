"""`minrnn figures lra`: its grid, the results files, and runs that a limit stops."""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from report_helpers import make_run

from minrnn.common.errors import UserError
from minrnn.evals.figures import lra
from minrnn.evals.figures.lra import GRID, command_of, main
from minrnn.pipeline.recipe import read_recipe

CONTENT = yaml.safe_load(GRID.read_text())
RUNS = CONTENT["runs"]


@pytest.mark.parametrize("name", sorted(RUNS))
def test_each_run_is_a_valid_recipe(name: str, tmp_path: Path):
    folders: dict[str, Path | None] = {"IMDB": tmp_path / "imdb", "CIFAR10": tmp_path / "cifar10"}
    command = command_of(RUNS[name], tmp_path / name, 1, folders)
    recipe = read_recipe(command[command.index("train") + 1 :])
    assert recipe.run.seed == 1
    assert recipe.data.task.get("folder", str(tmp_path)).startswith(str(tmp_path))


def test_pictures_show_runs_of_one_recipe():
    for names in CONTENT["pictures"].values():
        assert len({RUNS[name]["recipe"] for name in names}) == 1


def test_the_ablation_has_all_four_blocks():
    blocks = {
        name: (fields.get("model.conv_kernel", 4) > 0, fields["model.intermediate_size"] > 0)
        for name, fields in ((name, run["settings"]) for name, run in RUNS.items() if "listops-short" in name)
    }
    assert sorted(blocks.values()) == [(False, False), (False, True), (True, False), (True, True)]


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"--only: there is no listop \(did you mean listops\?\)"):
        main(["--only", "listop"])


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were asked for, in order. They are made up; those of seed 1 of `none` fail."""
    asked: list[str] = []

    def train(command: list[str], folder: Path, seconds: float) -> bool:
        asked.append(folder.name)
        if folder.name == "listops-short-none-1":
            return False
        if not folder.exists():
            make_run(folder, "lra-listops", int(folder.name[-1]), accuracies=[0.2, 0.5])
            test = {"kind": "test", "step": 20, "tokens": 1, "loss": 1.0, "accuracy": 0.4, "seconds": 1.0}
            lines = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]
            (folder / "metrics.jsonl").write_text(f"{lines}\n{json.dumps(test)}\n")
            (folder / "checkpoints" / "step-000020").mkdir(parents=True)
        return True

    monkeypatch.setattr(lra, "train", train)
    monkeypatch.setattr(lra, "RESULTS", tmp_path / "results")
    return asked


def seeds_in(path: Path) -> list[int]:
    return [seed["seed"] for entry in json.loads(path.read_text())["entries"] for seed in entry["seeds"]]


def test_each_name_has_its_own_results_and_later_calls_keep_earlier_ones(trained, tmp_path: Path, capsys):
    runs, results = ["--runs", str(tmp_path / "runs")], tmp_path / "results"
    main([*runs, "--only", "listops-short-mlp"])
    assert seeds_in(results / "runs-lra-listops-short-mlp.json") == [0, 1]
    assert (results / "runs-lra-listops-short-mlp.png").exists()
    main([*runs, "--only", "listops-short-both", "listops-short-mlp", "--minutes", "0"])
    assert trained == ["listops-short-mlp-0", "listops-short-mlp-1"]  # there was no time for more
    assert seeds_in(results / "runs-lra-listops-short-mlp.json") == [0, 1]
    main([*runs, "--only", "listops-short-both"])
    assert sorted(path.stem for path in results.glob("*.json")) == [
        "runs-lra-listops-short-both",
        "runs-lra-listops-short-mlp",
    ]
    assert re.search(r"listops-short-both +20, 20 +40.0, 40.0", capsys.readouterr().out)
    names, picture = ["listops-short-mlp", "listops-short-both"], results / "several.png"
    lra.draw_comparison([*names, "listops-short-none"], "lra-listops", picture)
    assert not picture.exists()  # one of them has no results yet
    lra.draw_comparison(names, "lra-listops", picture)
    assert picture.exists()


def test_a_run_that_fails_does_not_stop_the_others(trained, tmp_path: Path, capsys):
    with pytest.raises(UserError, match="listops-short-none-1: failed"):
        main(["--runs", str(tmp_path / "runs"), "--only", "listops-short-none", "listops"])
    assert trained == ["listops-short-none-0", "listops-short-none-1", "listops-0"]
    assert seeds_in(tmp_path / "results" / "runs-lra-listops-short-none.json") == [0]
    out = capsys.readouterr().out
    assert re.search(r"listops +20 +40.0", out)
    assert re.search(r"lra-path-x +- not run: 16,384 tokens need a GPU", out)


def test_what_needs_data_of_its_own_is_left_out_without_it(trained, tmp_path: Path, capsys):
    main(["--runs", str(tmp_path / "runs"), "--only", "text-short"])
    assert not trained
    captured = capsys.readouterr()
    assert captured.err == "text-short is left out: it needs --imdb\n"
    assert re.search(r"text-short +- not run yet", captured.out)


class UntilACheckpoint(subprocess.Popen):
    """A process whose time is over when its run has a checkpoint, however fast the machine is."""

    def wait(self, timeout: float | None = None) -> int:
        words = [str(word) for word in cast(list[Any], self.args)]
        if "--run.dir" not in words:
            return super().wait(timeout)
        folder = Path(words[words.index("--run.dir") + 1])
        while timeout is not None and self.poll() is None:
            if lra.steps_done(folder):
                raise subprocess.TimeoutExpired("train", timeout)
            time.sleep(0.1)
        return super().wait()


@pytest.mark.slow
def test_a_run_that_the_time_limit_stops_is_scored_and_goes_on_later(tmp_path: Path, monkeypatch):
    task = "{min_length: 4, max_length: 30, max_depth: 4, train_examples: 500, validation_examples: 20, "
    task += "test_examples: 20}"
    settings = {"data.task": task, "data.cache": str(tmp_path / "cache"), "batch.chunk": 29}
    settings |= {"model.hidden_size": 16, "model.num_hidden_layers": 1, "model.intermediate_size": 0}
    settings |= {"train.eval_every": 10**6, "train.save_every": 10, "train.log_every": 1}
    monkeypatch.setattr(lra, "GRID", tmp_path / "lra.yaml")
    monkeypatch.setattr(lra, "RESULTS", tmp_path / "results")

    def call(**more: Any) -> dict[str, Any]:
        """The only seed of the results after a call."""
        run = {"recipe": "lra-listops", "seeds": [0], "settings": {**settings, **more}}
        lra.GRID.write_text(yaml.safe_dump({"runs": {"tiny": run}}))
        main(["--runs", str(tmp_path / "runs")])
        (entry,) = json.loads((tmp_path / "results" / "runs-lra-tiny.json").read_text())["entries"]
        assert entry["config"]["optim"]["schedule_steps"] == 80_000
        (seed,) = entry["seeds"]
        assert seed["test"]["step"] == seed["steps"] == seed["steps_asked"]
        return seed

    with monkeypatch.context() as patch:
        patch.setattr(lra.subprocess, "Popen", UntilACheckpoint)
        steps = call()["steps"]
    assert 0 < steps < 80_000
    assert call(**{"train.steps": steps + 5})["steps"] == steps + 5
