"""`minrnn eval` on an export, with tasks that need no network."""

import json
from pathlib import Path

import pytest
from datasets import config as datasets_config
from lm_eval import evaluator
from lm_eval_helpers import OPTIONS, TASKS, TOKENIZER, check_scores, expected_scores
from mlflow import MlflowClient

from minrnn.data import build_task
from minrnn.launch.cli import main
from minrnn.models import MinRNNForCausalLM

pytestmark = pytest.mark.usefixtures("relative_task_files")


def test_results_are_complete_and_saved_with_the_run(export: Path, tmp_path: Path, capsys):
    """Correct scores, a file in the run's folder, and metrics in its MLflow run, for carried states and for
    windows.
    """
    main(
        [
            "eval",
            str(export.parent),
            "--tasks",
            "tiny_choice,tiny_completion,tiny_document",
            *OPTIONS,
            "--rolling-window",
            "16",
        ]
    )
    (file,) = (export.parent / "evals").glob("lm-eval-*.json")
    results = json.loads(file.read_text())
    check_scores(results["results"], export)
    assert results["results"]["tiny_document"]["bits_per_byte,none"] == pytest.approx(
        expected_scores(export)["bits_per_byte"], rel=1e-5
    )
    assert results["configs"]["tiny_document"]["metadata"]["rolling"] == "state carried through the document"
    assert (
        results["configs"]["tiny_document_window_16"]["metadata"]["rolling"]
        == "windows of 16 tokens, state reset"
    )
    windowed = results["results"]["tiny_document_window_16"]["bits_per_byte,none"]
    assert windowed != pytest.approx(expected_scores(export)["bits_per_byte"], rel=1e-5)
    assert {"versions", "n-shot", "n-samples", "config", "lm_eval_version"} <= results.keys()
    assert results["config"]["model_args"]["pretrained"] == export.parent.name
    assert str(TASKS) not in file.read_text()
    assert str(export.parent) not in file.read_text()
    assert "tiny_document_window_16" in capsys.readouterr().out
    note = json.loads((export.parent / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=note["uri"])
    (metric,) = client.get_metric_history(note["run_id"], "eval/tiny_choice/acc")
    assert (metric.step, metric.value) == (12, results["results"]["tiny_choice"]["acc,none"])
    assert client.get_metric_history(note["run_id"], "eval/tiny_document_window_16/bits_per_byte")


def test_a_failing_task_does_not_stop_the_others(export: Path, tmp_path: Path, capsys):
    out = tmp_path / "deep" / "results.json"
    options = [*OPTIONS, "--batch-size", "auto", "--limit", "2", "--out", str(out)]
    with pytest.raises(SystemExit) as raised:
        main(["eval", str(export), "--tasks", "tiny_choice,tiny_broken,tiny_writing", *options])
    assert raised.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: tiny_broken: RuntimeError: this task is broken"
    results = json.loads(out.read_text())
    assert results["results"].keys() == results["n-samples"].keys() == {"tiny_choice", "tiny_writing"}
    assert results["n-samples"]["tiny_choice"]["effective"] == 2
    assert results["config"]["batch_size"] == 32


def test_an_unwritable_file_is_reported_before_any_computation(export: Path, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "results.json"
    for command in (["eval", str(export), "--tasks", "tiny_choice", *OPTIONS], ["long-context", str(export)]):
        check_user_error(
            [*command, "--out", str(out)], [f"error: --out: cannot write {out} (File exists)"], capsys
        )
        check_user_error(
            [*command, "--out", str(tmp_path)], [f"error: --out: {tmp_path} must end in .json"], capsys
        )


def test_a_perplexity_is_kept_if_its_windows_fail(export: Path, tmp_path: Path, capsys, monkeypatch):
    out, original = tmp_path / "results.json", evaluator.simple_evaluate

    def simple_evaluate(lm, **kwargs):
        if lm.rolling_window is not None:
            raise RuntimeError("no room for windows")
        return original(lm, **kwargs)

    monkeypatch.setattr(evaluator, "simple_evaluate", simple_evaluate)
    with pytest.raises(SystemExit) as raised:
        main(
            [
                "eval",
                str(export),
                "--tasks",
                "tiny_document",
                *OPTIONS,
                "--rolling-window",
                "20",
                "--out",
                str(out),
            ]
        )
    assert raised.value.code == 1
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "error: tiny_document, in windows of 20: RuntimeError: no room for windows"
    )
    assert json.loads(out.read_text())["results"].keys() == {"tiny_document"}


def test_finished_tasks_are_saved_before_the_next_begins(export: Path, tmp_path: Path, monkeypatch):
    """Even if the second task is interrupted."""
    out, original = tmp_path / "results.json", evaluator.simple_evaluate

    def simple_evaluate(lm, tasks, **kwargs):
        if tasks[0].task_name == "tiny_writing":
            raise KeyboardInterrupt
        return original(lm, tasks=tasks, **kwargs)

    monkeypatch.setattr(evaluator, "simple_evaluate", simple_evaluate)
    with pytest.raises(SystemExit) as raised:
        main(["eval", str(export), "--tasks", "tiny_choice,tiny_writing", *OPTIONS, "--out", str(out)])
    assert raised.value.code == 130
    assert json.loads(out.read_text())["results"].keys() == {"tiny_choice"}


def broken_export(export: Path, folder: Path, fault: str) -> Path:
    """A copy of the export with a fault."""
    model = MinRNNForCausalLM.from_pretrained(export)
    model.save_pretrained(folder)
    if fault == "tokenizer":
        return folder
    if fault == "a task's words":
        build_task("synthetic/parity").tokenizer().save_pretrained(folder)
        return folder
    TOKENIZER.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "another model": {"model_type": "vit"},
        "another version": {"num_hidden_layers": 3},
        "a newer version": {"gate_delay": 2},
        "other sizes": {"hidden_size": 24},
    }[fault]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("fault", "expected_error"),
    [
        ("tokenizer", "has no tokenizer"),
        ("another model", "is a vit model, which is no causal language model"),
        ("another version", "was exported by another version of minrnn (missing model.layers.2."),
        ("a newer version", "was exported by another version of minrnn (unknown setting gate_delay)"),
        ("a task's words", "the tokenizer of "),
        ("other sizes", "cannot load"),
    ],
)
def test_unusable_models_are_refused(export: Path, tmp_path: Path, capsys, fault: str, expected_error: str):
    model = broken_export(export, tmp_path / "model", fault)
    check_user_error(
        ["eval", str(model), "--tasks", "tiny_choice", *OPTIONS],
        [f"error: MODEL: {expected_error}"],
        capsys,
        str(model) + " ",
    )


def check_user_error(arguments: list[str], expected: list[str], capsys, removed: str = "") -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    results = [
        line
        for line in capsys.readouterr().err.replace(removed, "").splitlines()
        if line.startswith("error: ")
    ]
    assert [line[: len(start)] for line, start in zip(results, expected, strict=True)] == expected


def test_each_user_error_is_one_line(export: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    model = str(export)
    check_user_error(
        ["eval", model, "--tasks", "tiny_chioce,lambada_opnai", *OPTIONS],
        [
            "error: --tasks: there is no 'tiny_chioce' (did you mean tiny_choice",
            "error: --tasks: there is no 'lambada_opnai' (did you mean lambada_openai",
        ],
        capsys,
    )
    check_user_error(
        ["eval", model, "--tasks", "tiny_remote", *OPTIONS],
        ["error: --tasks: cannot load tiny_remote: "],
        capsys,
    )
    check_user_error(
        ["eval", model, "--tasks", "x", "--limit", "1.5", "--batch-size", "0"],
        ["error: --batch-size:", "error: --limit:"],
        capsys,
    )
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    check_user_error(
        ["eval", str(tmp_path / "run"), "--tasks", "tiny_choice", *OPTIONS],
        ["error: MODEL: the run "],
        capsys,
    )
