"""`minrnn eval` and lm-eval's own command on an export, with tasks that need no network."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import config as datasets_config
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from mlflow import MlflowClient

from minrnn.data import build_task, byte_tokenizer
from minrnn.evals.harness.model import MinRNNLM
from minrnn.launch.cli import main
from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.pipeline.export import export_model
from minrnn.pipeline.recipe import build_recipe, resolved_config

TASKS = Path(__file__).parent / "lm_eval_tasks"
REPOSITORY = Path(__file__).parents[2]
TOKENIZER = byte_tokenizer()
BOS = TOKENIZER.bos_token_id
pytestmark = pytest.mark.xdist_group("launcher")  # one at a time: launchers use the same port
OPTIONS = ["--include-path", str(TASKS), "--bootstrap-iters", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with untied embeddings, in the folder of a run with tracking."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "tie_word_embeddings": False}
    tokens = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = MinRNNForCausalLM(MinRNNConfig(vocab_size=264, **sizes, **tokens))
    export_model(model, TOKENIZER, run / "model", resolved_config(build_recipe({})), tokens=0)
    uri = f"sqlite:///{run / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    run_id = client.create_run(client.create_experiment("tests")).info.run_id
    (run / "mlflow.json").write_text(json.dumps({"uri": uri, "run_id": run_id}))
    (run / "config.yaml").write_text("")
    (run / ".finished").write_text("12")
    return run / "model"


@pytest.fixture(autouse=True)
def relative_task_files(tmp_path: Path, monkeypatch):
    """The tasks name their files relative to their own folder."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def read_lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def log_likelihood(model: MinRNNForCausalLM, context: str, continuation: str) -> float:
    tokens = [BOS, *(context + continuation).encode()]
    with torch.no_grad():
        logs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    first = 1 + len(context.encode())
    return sum(logs[position - 1, tokens[position]].item() for position in range(first, len(tokens)))


def expected_scores(export: Path) -> dict[str, float]:
    """Computed with forward passes only."""
    model = MinRNNForCausalLM.from_pretrained(export).eval()
    questions, documents = read_lines("questions.jsonl"), read_lines("documents.jsonl")
    chosen, answers = [], []
    for question in questions:
        values = [log_likelihood(model, question["question"], choice) for choice in question["choices"]]
        chosen.append(values.index(max(values)) == question["answer"])
        answers.append(values[question["answer"]])
    nats = -sum(log_likelihood(model, "", document["page"]) for document in documents)
    num_bytes = sum(len(document["page"].encode()) for document in documents)
    return {
        "choice": sum(chosen) / len(chosen),
        "log_perplexity": -sum(answers) / len(answers),
        "bits_per_byte": nats / num_bytes / math.log(2),
    }


def check_scores(results: dict[str, Any], export: Path) -> None:
    expected = expected_scores(export)
    assert results["tiny_choice"]["acc,none"] == pytest.approx(expected["choice"])
    assert math.log(results["tiny_completion"]["perplexity,none"]) == pytest.approx(
        expected["log_perplexity"], rel=1e-5
    )


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


@pytest.mark.parametrize("task", ["tiny_choice", "tiny_completion", "tiny_document", "tiny_writing"])
def test_lm_evals_own_class_gives_the_same_results(export: Path, task: str):
    """Compared with `--model hf` for every sample, including left-padded generation and empty contexts.

    lm-eval scores <bos> as a document's first token if the tokenizer writes it, unless add_bos_token is
    False.
    """
    manager = TaskManager(include_path=TASKS, include_defaults=False)
    bos = {"add_bos_token": False} if task == "tiny_document" else {}
    factory: Any = evaluator.simple_evaluate
    options = {"tasks": [task], "task_manager": manager, "bootstrap_iters": 0, "device": "cpu"}
    hf_results = factory("hf", model_args={"pretrained": str(export), **bos}, batch_size=3, **options)
    results = factory(MinRNNLM(str(export), batch_size=2, device="cpu"), **options)
    assert hf_results["max_length"] == MinRNNConfig().max_position_embeddings
    for sample, expected in zip(results["samples"][task], hf_results["samples"][task], strict=True):
        assert sample["arguments"] == expected["arguments"]
        for values, expected_values in zip(sample["resps"], expected["resps"], strict=True):
            if task == "tiny_writing":
                assert values == expected_values
            else:
                numbers, others = (
                    torch.tensor(each, dtype=torch.float64).flatten() for each in (values, expected_values)
                )
                torch.testing.assert_close(numbers, others, rtol=1e-5, atol=0)


def launch(*command: str, home: Path) -> str:
    """Standard output of a command run offline; it must succeed."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments"),
    [("lm_eval", "hf trust_remote_code=True"), ("minrnn.launch.cli lm-eval", "minrnn piece=100")],
)
def test_lm_evals_own_command(export: Path, tmp_path: Path, module: str, arguments: str):
    """In a process of its own, with the export's own code or with our class."""
    model, extra = arguments.split()
    options = [
        "--include_path",
        str(TASKS),
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "out"),
        "--batch_size",
        "2",
    ]
    command = [
        *module.split(),
        "--model",
        model,
        "--model_args",
        f"pretrained={export},{extra}",
        "--tasks",
        "tiny_choice,tiny_completion",
        *options,
    ]
    assert f"{model} (" in launch(*command, home=tmp_path)
    (file,) = (tmp_path / "out").rglob("results_*.json")
    check_scores(json.loads(file.read_text())["results"], export)


@pytest.mark.slow
def test_lm_evals_own_command_finds_its_batch_size(export: Path, tmp_path: Path):
    """For the length that the export states: 64 rows of it, five times."""
    options = ["--include_path", str(TASKS), "--device", "cpu", "--batch_size", "auto", "--limit", "2"]
    command = [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={export},trust_remote_code=True",
        "--tasks",
        "tiny_writing",
        *options,
    ]
    assert "Largest batch size: 64" in launch(*command, home=tmp_path)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(export: Path, tmp_path: Path):
    config = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"
    two = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2", "-m"]
    results = []
    for name, launcher in {"one": [], "two": two}.items():
        out = tmp_path / f"{name}.json"
        names = "tiny_choice,tiny_completion,tiny_document,tiny_writing"
        launch(
            *launcher,
            "minrnn.launch.cli",
            "eval",
            str(export),
            "--tasks",
            names,
            *OPTIONS,
            "--out",
            str(out),
            home=tmp_path / name,
        )
        results.append(json.loads(out.read_text()))
    one, two_results = (each["results"] for each in results)
    assert one.keys() == two_results.keys()
    for task, values in one.items():
        for key, value in values.items():
            assert two_results[task][key] == (
                pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            )
    assert results[0]["n-samples"] == results[1]["n-samples"]
