"""Results files from run folders: content, pooling of seeds, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_helpers import make_results, make_run, report, rows

from minrnn.common.errors import UserError
from minrnn.evals.report import runs
from minrnn.launch.cli import main


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path)


def test_a_results_file_holds_the_runs(results: Path):
    data = json.loads((results / "bucket.json").read_text())
    (entry,) = data["entries"]
    assert [seed["seed"] for seed in entry["seeds"]] == [0, 1, 2]
    assert {"model", "data", "batch", "optim", "train"} == entry["config"].keys()
    seed = entry["seeds"][0]
    assert (seed["steps"], seed["steps_asked"], seed["tokens"], seed["parameters"]) == (20, 20, 1280, None)
    assert seed["training_seconds"] == pytest.approx(1280 / 320 + 2)
    assert seed["final"]["by_length"] == {"40": pytest.approx(0.9), "128": pytest.approx(0.45)}
    assert seed["curve"] == {"train": [[10, 3.0], [20, 1.5]], "validation": [[10, 0.5, 0.2], [20, 0.5, 0.9]]}
    assert data["command"].endswith("bucket-0 bucket-1 bucket-2 --as bucket-sort")
    text = json.loads((results / "text.json").read_text())["entries"][0]
    assert (text["seeds"][0]["best"]["step"], text["seeds"][0]["final"]["step"]) == (20, 30)
    assert "someone" not in (results / "text.json").read_text()
    assert text["config"]["data"]["corpus"] == "input.txt"


def test_long_curves_are_thinned_out(tmp_path: Path):
    folder = make_run(tmp_path / "run", "shakespeare-paper", 0, losses=[5.0 / (i + 1) for i in range(1234)])
    _, seed = runs.read_run(folder)
    for points in (seed.curve.train, seed.curve.validation):
        assert 50 < len(points) <= runs.CURVE_POINTS
        assert points[-1][0] == 12340
        assert [point[0] for point in points] == sorted({point[0] for point in points})
    assert seed.curve.validation[0][0] == 10


def test_seeds_are_pooled_despite_settings_without_effect(tmp_path: Path):
    corpus: dict[str, Any] = {"data__corpus": "synthetic/parity", "accuracies": [0.5]}
    first = make_run(tmp_path / "a", "synthetic-formal", 0, **corpus)
    second = make_run(tmp_path / "b", "synthetic-formal", 1, train__log_every=7, **corpus)
    other = make_run(tmp_path / "c", "synthetic-formal", 1, optim__lr=0.1, **corpus)
    assert [[seed.run for seed in entry.seeds] for entry in runs.group_runs([first, second, other])] == [
        ["a", "b"],
        ["c"],
    ]
    again = make_run(tmp_path / "d", "synthetic-formal", 1, **corpus)
    with pytest.raises(UserError, match=r"has the settings and the seed \(1\) of b"):
        runs.group_runs([first, second, again])


def test_seeds_are_pooled_wherever_their_examples_are(tmp_path: Path):
    """The path of a folder does not matter; another source does."""
    folders = []
    for seed, task in enumerate(({"folder": "/a/cifar10"}, {"folder": "data/cifar10"}, {})):
        data = {"data__cache": str(tmp_path / str(seed)), "data__task": task, "data__corpus": "lra/image"}
        folders.append(make_run(tmp_path / f"run-{seed}", "lra-image", seed, accuracies=[0.5], **data))
    assert [[seed.seed for seed in entry.seeds] for entry in runs.group_runs(folders)] == [[0, 1], [2]]


def test_seeds_are_pooled_despite_settings_newer_than_a_run(tmp_path: Path):
    folders = [
        make_run(tmp_path / f"run-{seed}", "shakespeare-paper", seed, losses=[1.5 + seed]) for seed in (0, 1)
    ]
    values = yaml.safe_load((folders[0] / "config.yaml").read_text())
    del values["data"]["join"], values["train"]["skip_spikes"]
    (folders[0] / "config.yaml").write_text(yaml.safe_dump(values))
    (entry,) = runs.group_runs(folders)
    assert [seed.seed for seed in entry.seeds] == [0, 1]


def test_each_user_error_of_results_is_one_line(tmp_path: Path, capsys):
    parity = make_run(tmp_path / "parity", "synthetic-formal", 0, [0.5], data__corpus="synthetic/parity")
    empty = make_run(tmp_path / "empty", "synthetic-formal", 0, [], data__corpus="synthetic/parity")
    broken = make_run(tmp_path / "broken", "synthetic-formal", 0, [0.5], data__corpus="synthetic/parity")
    (broken / "config.yaml").write_text("run: 3")
    cases = {
        (
            "majority",
            str(parity),
        ): "error: --as: majority is about synthetic/majority, but parity has synthetic/parity",
        ("wikitext-103", str(parity)): "error: --as: wikitext-103 takes no runs (it is for reference only)",
        ("parity", str(empty)): f"error: {empty}: metrics.jsonl holds no step yet",
        ("parity", str(broken)): f"error: {broken}: config.yaml is not what a run writes",
        ("parity", str(tmp_path)): f"error: {tmp_path}: is no run",
    }
    for (name, folder), expected in cases.items():
        with pytest.raises(SystemExit) as raised:
            main(["results", folder, "--as", name, "--out", str(tmp_path / "out.json")])
        assert raised.value.code == 2
        assert expected in (messages := capsys.readouterr().err)
        assert len(messages.splitlines()) == 1
    runs.main([str(parity), "--as", "partiy", "--out", str(tmp_path / "out.json")])
    assert "nothing is published as partiy (did you mean parity?)" in capsys.readouterr().err


def test_what_a_family_cannot_do_stands_below_its_numbers(tmp_path: Path):
    run = make_run(tmp_path / "run", "quickstart", 0, losses=[2.0, 1.5])
    config = yaml.safe_load((run / "config.yaml").read_text())
    limits = ["no state is carried from chunk to chunk", "documents in a chunk are not separated"]
    config["model"] = {"family": "mamba2", "family_config": {"num_hidden_layers": 4}, "limits": limits}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    runs.main([str(run), "--as", "families", "--out", str(tmp_path / "results" / "families.json")])
    markdown = report(tmp_path / "results", out=tmp_path / "out")
    assert rows(markdown, "mamba2, 4 layers")
    assert f"- mamba2, 4 layers: {'; '.join(limits)}" in markdown
