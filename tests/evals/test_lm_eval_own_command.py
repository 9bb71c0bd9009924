"""lm-eval's own class and command on an export, and several processes: the same results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval_helpers import OPTIONS, TASKS, check_scores

from minrnn.evals.harness.model import MinRNNLM
from minrnn.models import MinRNNConfig

REPOSITORY = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.xdist_group("launcher"),  # one at a time: launchers use the same port
    pytest.mark.usefixtures("relative_task_files"),
]


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
