"""The report: correct numbers, missing experiments, and files that cannot be read."""

import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_helpers import Page, make_results, make_run, report, rows, section
from scipy import stats

from minrnn.evals.figures import speed
from minrnn.evals.report import page, pictures, runs
from minrnn.evals.report.compare import METRICS, estimate
from minrnn.evals.report.published import published
from minrnn.launch.cli import main
from minrnn.pipeline.recipe import build_recipe, resolved_config


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_the_interval_equals_that_of_scipy(values: list[float]):
    interval = estimate(values)
    assert interval.half_width is not None
    error = float(stats.sem(values)) if max(values) > min(values) else 0.0
    assert interval.half_width == pytest.approx(
        error * stats.t.ppf(0.975, len(values) - 1), rel=1e-6, abs=1e-9
    )
    assert interval.mean == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_the_interval_of_three_seeds_by_hand_and_none_of_one():
    assert estimate([3.0]).half_width is None
    interval = estimate([1.0, 2.0, 3.0])  # s = 1, t(2) = 4.3027
    assert (interval.mean, interval.half_width) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6))


def test_our_numbers_stand_beside_published_ones(results: Path, tmp_path: Path):
    markdown = report(results, out=tmp_path / "out")
    interval = estimate(
        [100 * (0.75 * accuracy - 0.1) / 0.9 for accuracy in (0.9, 0.95, 0.98)]
    )  # mean of all and half, scaled
    assert interval.half_width is not None
    (row,) = rows(section(markdown, "#### Bucket Sort"), "minLSTM (paper), 2 layers (beside minLSTM)")
    assert row[1:5] == [
        "94",
        "minrnn",
        f"{interval.mean:.1f} ± {interval.half_width:.1f}",
        f"{interval.mean - 94:+.1f}",
    ]
    assert row[7:9] == ["3", "20"]
    assert "reduced: train.steps 20 (published 500,000)" in section(markdown, "#### Bucket Sort")
    assert rows(markdown, "Bucket Sort")[0][3] == row[3]
    (text,) = rows(section(markdown, "### Shakespeare, character by character"), "minGRU (paper), 3 layers")
    assert text[1:5] == ["1.548 (reported)", "minrnn", "1.600", "+0.052"]
    assert text[6:8] == ["1 (no interval)", "30 of 100"]
    (lengths,) = rows(section(markdown, "### Bucket Sort by length"), "minLSTM")
    assert [cell.split(" ")[0] for cell in lengths[1:]] == ["94.3", "47.2"]


def test_missing_results_are_marked_as_not_run(results: Path, tmp_path: Path):
    markdown = report(results, out=tmp_path / "out")
    assert rows(section(markdown, "### Shakespeare, character by character"), "minLSTM")[0][3] == "not run"
    missing = set(
        re.findall(r"^- `([\w-]+)`: .*not run", section(markdown, "## Not run"), flags=re.MULTILINE)
    )
    assert missing == published().experiments.keys() - {"bucket-sort", "shakespeare"}
    for words in (
        "lm-eval: not run.",
        "Loss by position, and memory: not run.",
        "Scan: not run.",
        "The soak: not run.",
    ):
        assert words in markdown


def test_another_task_does_not_stand_beside_the_published_one(tmp_path: Path):
    small = {"data__task": {"length": 64, "num_tokens": 4}, "batch__chunk": 68}
    folder = make_run(tmp_path / "copying", "synthetic-selective-copying", 0, [1.0], **small)
    markdown = report(folder, out=tmp_path / "out")
    quality = section(markdown, "### Selective copying")
    assert rows(quality, "minGRU, 3 layers")[0][3] == "not run"
    (ours,) = rows(quality, "minGRU (paper), 3 layers, length 64, num_tokens 4".replace("_", r"\_"))
    assert (ours[1], ours[3], ours[4]) == ("-", "100.0", "-")
    assert "`selective-copying`" in section(markdown, "## Not run")


def test_other_test_lengths_and_other_texts_are_other_tasks(results: Path, tmp_path: Path, capsys):
    task = {"data__corpus": "synthetic/even-pairs", "data__task": {"test_lengths": [40]}}
    markdown = report(
        make_run(tmp_path / "pairs", "synthetic-formal", 0, [1.0], **task), out=tmp_path / "out"
    )
    assert "`even-pairs`" in section(markdown, "## Not run")
    code = make_run(tmp_path / "code", "quickstart", 0, losses=[1.3])
    with pytest.raises(SystemExit):
        main(["results", str(code), "--as", "shakespeare", "--out", str(tmp_path / "code.json")])
    assert "--as: shakespeare is about input.txt, but code has python-stdlib" in capsys.readouterr().err


def test_a_runs_experiment_is_chosen_by_its_corpus(tmp_path: Path):
    markdown = report(make_run(tmp_path / "run", "shakespeare-paper", 0, losses=[1.5]), out=tmp_path / "out")
    assert rows(markdown, "Shakespeare")[0][3] == "1.500"


def test_a_broken_run_among_others_is_listed(tmp_path: Path):
    folders = {
        name: make_run(tmp_path / "runs" / name, "shakespeare-paper", 0, losses=[1.5])
        for name in ("whole", "config", "lines", "weights")
    }
    (folders["config"] / "config.yaml").write_text(
        "run: {seed: 0}\nmodel: {}\ndata: {}\nbatch: {}\noptim: {}\ntrain: {steps: 3}\n"
    )
    lines = (folders["lines"] / "metrics.jsonl").read_text().splitlines()
    (folders["lines"] / "metrics.jsonl").write_text(
        "\n".join([*lines[:-1], '{"kind": "validation", "step": 30, "loss": 1.0}\n'])
    )
    (folders["weights"] / "checkpoints" / "step-000010").mkdir(parents=True)
    (folders["weights"] / "checkpoints" / "step-000010" / "model.safetensors").write_bytes(b"cut")
    listed = section(report(tmp_path / "runs", out=tmp_path / "out"), "## Could not be read")
    assert "config.yaml is not what a run writes (KeyError: 'data.corpus')" in listed
    assert "metrics.jsonl is not what a run writes" in listed
    assert len([line for line in listed.splitlines() if line.startswith("- ")]) == 2


def test_seeds_of_several_files_are_one_mean(results: Path, tmp_path: Path):
    more = [
        make_run(tmp_path / f"more-{i}", "shakespeare-paper", i, losses=[1.5], data__corpus="input.txt")
        for i in (0, 1)
    ]
    runs.main([*map(str, more), "--as", "shakespeare", "--out", str(results / "more.json")])
    markdown = report(results, out=tmp_path / "out")
    (text,) = rows(section(markdown, "### Shakespeare, character by character"), "minGRU (paper), 3 layers")
    assert text[3].startswith("1.550 ± ")  # of 1.6 (30 steps of seed 0) and 1.5 (seed 1)
    assert "seed 0 of the same settings is in text.json (30 steps) and more.json (10)" in markdown


def test_a_run_without_a_published_experiment_has_a_table(tmp_path: Path):
    runs_folder = tmp_path / "runs"
    make_run(runs_folder / "sweep" / "quick", "quickstart", 3, losses=[1.5, 1.4])
    markdown = report(runs_folder, out=tmp_path / "out")
    (row,) = rows(section(markdown, "### python-stdlib"), "minGRU (default), 3 layers")
    assert row[1:5] == [f"{1.4 / math.log(2):.3f}", "1.400", "1 (no interval)", "20 of 100"]
    assert (tmp_path / "out" / "pictures" / "python-stdlib-curves.png").read_bytes().startswith(b"\x89PNG")


LM_EVAL = {
    "results": {
        "hellaswag": {
            "alias": "hellaswag",
            "acc_norm,none": 0.5123,
            "acc_norm_stderr,none": 0.005,
            "acc,none": 0.4,
            "acc_stderr,none": "N/A",
        }
    },
    "configs": {"hellaswag": {"metadata": {"version": 1.0}}},
    "versions": {"hellaswag": 1},
    "n-shot": {"hellaswag": 0},
    "config": {"model_args": {"pretrained": "my|model"}, "model_num_parameters": 1_010_000_000},
}


@pytest.mark.parametrize(("parameters", "counts"), [(1_010_000_000, True), (2_000_000, False)])
def test_files_of_lm_eval(parameters: int, counts: bool, tmp_path: Path):
    path = tmp_path / "lm_eval.json"
    path.write_text(
        json.dumps({**LM_EVAL, "config": {**LM_EVAL["config"], "model_num_parameters": parameters}})
    )
    markdown = report(path, out=tmp_path / "out")
    table = rows(section(markdown, "## Language model evaluation"), "hellaswag")
    assert [row[1:3] for row in table] == [["acc\\_norm", "0.5123 ± 0.0050"], ["acc", "0.4000"]]
    assert (
        "51.2 ± 0.5" in section(markdown, "#### HellaSwag at 1B parameters, 60B tokens of DCLM")
    ) == counts
    assert ("`hellaswag-1b`" in section(markdown, "## Not run")) != counts


def test_files_of_long_contexts_with_their_picture(results: Path, tmp_path: Path):
    data = {
        "command": "minrnn long-context x",
        "model": {"parameters": 5, "config": {"memory_length": 7}},
        "buckets": [],
    }
    overall = {"carried": {"bits_per_byte": 1.25}, "cut": {"2048": {"bits_per_byte": 1.5}}}
    path = tmp_path / "long.json"
    path.write_text(
        json.dumps(
            {**data, "overall": overall, "memory": {"effective_memory_length": None, "tolerance": 0.01}}
        )
    )
    report(results, out=tmp_path / "first")
    picture = next((tmp_path / "first" / "pictures").glob("*.png")).read_bytes()
    path.with_suffix(".png").write_bytes(picture)
    markdown = report(path, out=tmp_path / "out")
    measures = {row[0]: row[1] for row in rows(section(markdown, "## Long context"), "")}
    assert (
        measures.items()
        >= {
            "overall carried bits per byte": "1.2500",
            "overall cut 2048 bits per byte": "1.5000",
            "memory effective memory length": "longer than measured",
        }.items()
    )
    assert not any("config" in name or "tolerance" in name for name in measures)
    assert (tmp_path / "out" / "pictures" / "long-long-context.png").read_bytes() == picture


def test_a_long_document_through_lm_eval(tmp_path: Path):
    parts = [
        {"part": "1/16", "bits_per_byte": 2.0, "seconds": 3.0},
        {"part": "all, in windows", "bits_per_byte": 1.75, "seconds": 4.0},
    ]
    path = tmp_path / "rolling.json"
    path.write_text(
        json.dumps(
            {"document": {"name": "email/"}, "rows": parts, "carried_minus_windows_bits_per_byte": -0.125}
        )
    )
    long_context = section(report(path, out=tmp_path / "out"), "## Long context")
    assert "document: email/" in long_context
    assert {row[0]: row[1] for row in rows(long_context, "")}.items() >= {
        "1/16 bits per byte": "2.0000",
        "all, in windows bits per byte": "1.7500",
        "carried minus windows bits per byte": "-0.1250",
    }.items()


BROKEN = {
    "half": ('{"kind": "runs", "experi', "is no JSON, or cut short"),
    "list": ("[1, 2]", "holds no results (list instead of an object)"),
    "odd": ('{"a": 1}', "holds no results that are known (its fields: a)"),
    "other": ('{"kind": "cake"}', "is of the unknown kind 'cake'"),
    "empty": (
        '{"kind": "runs", "experiment": "mqar"}',
        "lacks what a file of runs has (command: Field required)",
    ),
    "soak": (
        json.dumps(
            dict.fromkeys(("faults", "kills", "steps_repeated", "checkpoints_refused", "problems"), 0)
        ),
        "lacks what a file of kind soak has",
    ),
    "bench": (
        '{"bench": "scan", "rows": [{"section": "scan", "dtype": "fp32"}]}',
        "lacks what a file of kind bench has",
    ),
    "lm": (
        '{"results": {}, "configs": {}, "versions": {}}',
        "lacks what a file of kind lm-eval has (ValueError: it holds no number)",
    ),
}


def test_broken_files_that_are_named_are_errors_all_at_once(tmp_path: Path, capsys):
    for name, (content, _) in BROKEN.items():
        (tmp_path / f"{name}.json").write_text(content)
    (tmp_path / "none").mkdir()
    paths = [
        *(str(tmp_path / f"{name}.json") for name in BROKEN),
        str(tmp_path / "none"),
        str(tmp_path / "nowhere"),
    ]
    with pytest.raises(SystemExit) as raised:
        main(["report", *paths, "--out", str(tmp_path / "out")])
    assert raised.value.code == 2
    messages = capsys.readouterr().err
    for name, (_, reason) in BROKEN.items():
        assert f"error: {tmp_path / f'{name}.json'}: {reason}" in messages
    assert f"{tmp_path / 'none'}: holds neither results files (*.json) nor runs" in messages
    assert f"{tmp_path / 'nowhere'}: is not there" in messages
    assert len(messages.splitlines()) == len(paths)
    assert not (tmp_path / "out").exists()


def test_broken_files_in_a_folder_are_listed_and_the_rest_is_reported(results: Path, tmp_path: Path, capsys):
    for name, (content, _) in BROKEN.items():
        (results / f"{name}.json").write_text(content)
    markdown = report(results, out=tmp_path / "out")
    messages, listed = capsys.readouterr().err, section(markdown, "## Could not be read")
    for name, (_, reason) in BROKEN.items():
        assert f"- `{name}.json` {page.text(reason)}" in listed
        assert f"{name}.json {reason}" in messages
    assert rows(markdown, "Shakespeare")[0][3] == "1.600"


def test_pipes_and_foreign_files_are_refused(tmp_path: Path, capsys):
    """Pipes without a writer, and folders whose config.yaml and metrics.jsonl are from another program."""
    os.mkfifo(tmp_path / "pipe.json")
    foreign = (
        "[1, 2]",
        '"text"',
        '{"kind": "train", "loss": 1e999, "step": {}}',
        '{"kind": "train", "loss": 1%s}' % ("0" * 400),
        '{"loss": 1.0}',
    )
    own = [
        make_run(tmp_path / "runs" / str(i), "shakespeare-paper", 0, losses=[1.5])
        for i in range(len(foreign))
    ]
    for run, line in zip(own, foreign, strict=True):
        (run / "metrics.jsonl").write_text(line + "\n")
    (own[0] / "evals").mkdir()
    os.mkfifo(own[0] / "evals" / "pipe.json")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("name: someone's\n")
    (other / "metrics.jsonl").write_text('{"epoch": 1}\n')
    paths = [tmp_path / "pipe.json", *own, other]
    with pytest.raises(SystemExit) as raised:
        main(["report", *map(str, paths), "--out", str(tmp_path / "out")])
    assert raised.value.code == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == len(paths)
    assert (
        f"error: {tmp_path / 'pipe.json'}: is no regular file; name a results file, a folder of them, or a "
        "run's folder" in messages
    )
    assert all(line.startswith("error: ") and "Traceback" not in line for line in messages)
    make_run(tmp_path / "runs" / "whole", "shakespeare-paper", 0, losses=[1.5])
    listed = section(report(tmp_path / "runs", out=tmp_path / "out"), "## Could not be read")
    assert len([line for line in listed.splitlines() if line.startswith("- ")]) == len(own) + 1


def test_the_shipped_results_make_a_report(tmp_path: Path):
    main(["report", "--out", str(tmp_path)])
    markdown = (tmp_path / "report.md").read_text()
    assert "## Could not be read" not in markdown
    missing = section(markdown, "## Not run")
    for name, experiment in published().experiments.items():
        with_number = any(
            row[3] not in ("-", "not run")
            for row in rows(section(markdown, "## In short"), page.text(experiment.title))
        )
        assert (f"- `{name}`:" in missing) != with_number
    for lines in (
        speed.scan_lines(),
        speed.train_lines(),
        speed.generate_lines(),
        [speed.contexts_line(), speed.stream_line()],
    ):
        assert all(line in markdown for line in lines)
    assert speed.soak_line(link="#soakjson") in markdown
    Page((tmp_path / "report.html").read_text())


def test_published_numbers_have_their_units():
    known = {*runs.settings(resolved_config(build_recipe({}))), "sequences_per_step", "parameters", "tokens"}
    for name, experiment in published().experiments.items():
        percent = experiment.metric is not None and METRICS[experiment.metric].percent
        for row in experiment.rows:
            assert (row.value is not None) or row.note, name
            if row.value is not None and percent:
                assert 1 < row.value <= 100, name
        for key in experiment.setup:
            assert key.startswith("data.task.") or key in known


def test_models_on_one_text_are_drawn_by_tokens_and_by_seconds(tmp_path: Path, monkeypatch):
    drawn = []
    original = pictures.loss_by_tokens_and_seconds
    monkeypatch.setattr(
        pictures,
        "loss_by_tokens_and_seconds",
        lambda pooled, picture: (drawn.append(pooled), original(pooled, picture)),
    )
    alone = make_run(tmp_path / "mingru", "quickstart", 0, losses=[2.0, 1.5])
    report(alone, out=tmp_path / "out")
    assert not drawn
    others = [
        make_run(tmp_path / f"rwkv4-{seed}", "quickstart", seed, losses=[2.2, 1.4], model__cell="rwkv4")
        for seed in (0, 1)
    ]
    markdown = report(alone, *others, out=tmp_path / "out")
    ((first, second),) = drawn
    assert {len(first.runs), len(second.runs)} == {1, 2}
    assert "by-cost.png" in markdown
    picture = next((tmp_path / "out" / "pictures").glob("*by-cost.png"))
    assert picture.read_bytes()[1:4] == b"PNG"
