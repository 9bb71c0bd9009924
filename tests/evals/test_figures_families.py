"""The comparison of families: which runs are trained in which order, and which a limit leaves out."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from minrnn.common.errors import UserError
from minrnn.evals.figures import families
from minrnn.launch.cli import main
from minrnn.pipeline.recipe import build_recipe

SECONDS_PER_TOKEN = {"slow": 0.1, "fast": 0.001, "middle": 0.01}


def grid(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": 4000,
        "tuning_tokens": 1000,
        "learning_rates": [1e-3, 2e-3],
        "seeds": [0, 1],
        "validation": {"documents": 2, "characters": 5},
        "recipe": {"batch": {"readers": 1, "lanes": 2, "chunk": 50}},
        "models": {name: {"cell": name} for name in SECONDS_PER_TOKEN},
        **changes,
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str, int]]:
    """(model, run, steps) of each run, in order. Nothing is trained; `middle` diverges at 1e-3."""
    runs = []

    def train(self, model: families.Model, name: str, steps: int, *_, **options: Any) -> Path | None:
        runs.append((model.name, name, steps))
        if (model.name, name) == ("middle", "lr-0.001"):
            model.failure = "the loss is not finite"
            return None
        folder = self.folder(model, name)
        folder.mkdir(parents=True)
        (folder / "origin.json").write_text('{"commit": "abc"}')
        (folder / "steps").write_text(str(steps))
        return folder

    def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
        model, run = folder.parts[-2:]
        if kind == "train":
            step = int((folder / "steps").read_text())
            return [{"step": step, "tokens_per_second": 1 / SECONDS_PER_TOKEN[model]}] * 4
        return [{"tokens": 4000, "bits_per_byte": 2.0 + (run == "lr-0.001") + 0.1 * (run == "full-1")}]

    monkeypatch.setattr(families.Driver, "train", train)
    monkeypatch.setattr(families, "_lines", lines)
    monkeypatch.setattr(families, "write_pieces", lambda *_, **__: None)
    monkeypatch.setattr(families, "text_hash", lambda path: "hash")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "_settings", lambda folder: {"precision": "bf16", "limits": []})
    return runs


def driver(
    values: dict[str, Any],
    seconds: float,
    run_limit: float = 1e6,
    measure_speed: bool = False,
    results: dict[str, Any] | None = None,
    runs: str = "runs",
) -> families.Driver:
    deadline = time.monotonic() + seconds
    made = families.Driver(values, "text", "other", Path(runs), deadline, run_limit, measure_speed)
    if results is not None:
        made.restore(json.loads(json.dumps(results)))
    for _ in made.work():
        pass
    return made


def table(of: families.Driver) -> list[dict[str, Any]]:
    return [families.summary(model, of.grid) for model in of.models]


def test_rates_are_tuned_and_the_best_is_trained_to_the_end(trained):
    rows = table(driver(grid(), seconds=1e6))
    assert [run for model, run, _ in trained if model == "fast"] == [
        "probe",
        "lr-0.001",
        "lr-0.002",
        "full-0",
        "full-1",
    ]
    assert {steps for _, run, steps in trained if run.startswith("full")} == {40}
    assert [model for model, run, _ in trained if run == "full-0"] == ["fast", "middle", "slow"]
    assert all(row["learning_rate"] == 2e-3 for row in rows)
    assert all(row["final"] == {"0": 2.0, "1": 2.1} and row["hours_left"] == 0 for row in rows)
    assert all(row["curves"] == {"0": [(4000, 2.0)], "1": [(4000, 2.1)]} for row in rows)
    assert {row["model"]: row["tuning"]["0.001"] for row in rows} == {
        "slow": 3.0,
        "fast": 3.0,
        "middle": None,
    }


def test_what_a_limit_leaves_out_says_how_long_it_takes(trained):
    rows = {row["model"]: row for row in table(driver(grid(), seconds=30, run_limit=50))}
    assert rows["fast"]["final"].keys() == {"0", "1"}
    assert rows["middle"]["final"] == {}
    assert rows["middle"]["hours_left"] == round(2 * 4000 * 0.01 / 3600, 2)
    assert rows["slow"]["reason"] == "a short run is longer than --run-minutes"
    assert rows["slow"]["hours_left"] == round((2 * 1000 + 2 * 4000) * 0.1 / 3600, 2)
    assert [run for model, run, _ in trained if model == "slow"] == ["probe"]


def test_a_second_call_reads_what_is_finished_and_measures_speed_again(trained):
    first = table(driver(grid(), seconds=1e6))
    trained.clear()
    second = driver(grid(), seconds=0)
    # The run that failed begins again only where there is time.
    assert trained == []
    assert {row["model"]: row["final"] for row in table(second) if row["model"] != "middle"} == {
        row["model"]: row["final"] for row in first if row["model"] != "middle"
    }
    assert second.commits == {"abc"}
    driver(grid(), seconds=0, measure_speed=True)
    assert [(model, run) for model, run, _ in trained] == [(model, "probe") for model in SECONDS_PER_TOKEN]


def results_of(made: families.Driver, **changes: Any) -> dict[str, Any]:
    origin = {"grid": made.grid, "validation_hash": "hash", "commits_of_runs": sorted(made.commits)}
    return {**origin, "rows": table(made), **changes}


@pytest.mark.parametrize("seconds", [1e6, 60])
def test_another_machine_goes_on_from_the_results_file(trained, seconds: float):
    whole = results_of(driver(grid(), seconds=1e6, runs="whole"))
    first = driver(grid(), seconds=seconds, runs="first")
    trained.clear()
    second = results_of(driver(grid(), seconds=1e6, results=results_of(first), runs="second"))
    for rows in (whole["rows"], second["rows"]):
        for row in rows:
            row["curves"] = {seed: [list(point) for point in line] for seed, line in row["curves"].items()}
    assert second["rows"] == whole["rows"]
    assert second["commits_of_runs"] == ["abc"]
    repeated = {(model, run) for model, run, _ in trained if run != "probe"}
    finished = {(row["model"], f"lr-{float(rate):g}") for row in table(first) for rate in row["tuning"]}
    finished |= {(row["model"], f"full-{seed}") for row in table(first) for seed in row["final"]}
    assert finished
    assert not repeated & finished
    assert bool(repeated) == (seconds == 60)


def test_results_of_another_text_or_grid_are_not_taken_over(trained):
    results = results_of(driver(grid(), seconds=1e6, runs="first"))
    for changed in (
        {**results, "validation_hash": "other"},
        {**results, "grid": {**results["grid"], "tokens": 8000}},
    ):
        assert all(not row["final"] for row in table(driver(grid(), 0, results=changed, runs="second")))
    faster = grid(learning_rates=[1e-3, 2e-3, 4e-3])
    rows = table(driver(faster, 0, results=results, runs="second"))
    assert all(row["tuning"].keys() == {"0.001", "0.002"} and not row["final"] for row in rows)


def test_a_validation_that_the_corpus_holds_is_refused(tmp_path: Path):
    for name, texts in {"a": ["one", "two"], "b": ["three", "two"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    families.write_pieces(b, a, tmp_path / "pieces.jsonl", documents=1, characters=9)
    with pytest.raises(UserError, match=r"--validation: a document of .*b\.jsonl is in .*a\.jsonl too"):
        families.write_pieces(b, a, tmp_path / "pieces.jsonl", documents=2, characters=9)


def test_the_validation_is_the_middle_of_each_document(tmp_path: Path):
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "abcdefg", "xy", "12345")))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "z"}\n')
    out = tmp_path / "out" / "pieces.jsonl"
    families.write_pieces(str(corpus), str(other), out, documents=2, characters=3)
    pieces = [
        json.loads(line)["text"] for line in (tmp_path / "out" / "pieces.jsonl").read_text().splitlines()
    ]
    assert pieces == ["cde", "xy"]


def test_the_committed_grid_is_made_of_recipes():
    values = yaml.safe_load(families.GRID.read_text())
    for fields in values["models"].values():
        build_recipe({**values["recipe"], "model": {**values["recipe"]["model"], **fields}})


def test_an_unknown_model_is_refused():
    with pytest.raises(UserError, match=r"--models: 'gpt' is none of minGRU, "):
        families.read_grid(families.GRID, ["gpt"])


@pytest.mark.slow
def test_a_small_comparison(tmp_path: Path, capsys):
    corpus, validation = tmp_path / "text.jsonl", tmp_path / "validation.jsonl"
    documents = [json.dumps({"text": f"{i} words and {i * i} more\n" * 9}) for i in range(60)]
    corpus.write_text("\n".join(documents[:50]))
    validation.write_text("\n".join(documents[50:]))
    values = yaml.safe_load(families.GRID.read_text())
    values |= {"tokens": 4000, "tuning_tokens": 1000, "learning_rates": [2e-3], "seeds": [0]}
    values["recipe"]["model"] = {"num_hidden_layers": 1, "num_parameters": 60_000}
    values["recipe"]["data"] = {}
    values["recipe"]["batch"] = {"readers": 1, "lanes": 2, "chunk": 50}
    values["models"] = {"RWKV-4": {"cell": "rwkv4"}}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    command = ["figures", "families", "--corpus", str(corpus), "--validation", str(validation)]
    command += ["--grid", str(path)]
    command += ["--runs", str(tmp_path / "runs")]
    for _ in range(2):  # in the second call, each run says that it is finished
        main([*command, "--out", str(tmp_path / "out.json")])
        rows = json.loads((tmp_path / "out.json").read_text())["rows"]
        assert [row["model"] for row in rows] == ["RWKV-4"]
        assert all(1 < row["final"]["0"] < 8.5 and row["hours_left"] == 0 for row in rows), rows
    assert "RWKV-4" in capsys.readouterr().out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
