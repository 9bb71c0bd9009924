"""Tasks of lm-eval and samples during training: once a step, with the scores of `minrnn eval`, without an
effect on the losses."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import config as datasets_config
from run_helpers import Values, losses, recipe_file, stop_at_step_7
from transformers import PreTrainedModel

from minrnn.common.errors import UserError
from minrnn.launch.cli import main
from minrnn.models import MinRNNForCausalLM
from minrnn.pipeline import task_evaluation
from minrnn.pipeline.recipe import build_recipe

Run = Callable[[Values], Path]
TASKS = Path(__file__).parents[1] / "evals" / "lm_eval_tasks"


@pytest.fixture
def with_tasks(values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Values:
    """The tiny recipe with tasks whose files are relative to their own folder."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    values["eval"] = {"tasks": ["tiny_choice", "tiny_writing"], "every": 6, "include_path": str(TASKS)}
    values["eval"]["samples_every"] = 6
    return values


def entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


class Evaluator:
    """Scores that depend on the weights, and a task that fails. It seeds all generators, as lm-eval does."""

    names = ["sum", "broken"]

    def evaluate(self, name: str, model: PreTrainedModel, tokenizer: Any) -> dict[str, float]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        if name == "broken":
            raise RuntimeError("this task is broken")
        assert not model.training
        return {"sum/weights": sum(float(parameter.sum()) for parameter in model.parameters())}


def test_each_is_there_once_and_changes_no_loss(
    values: Values, run_recipe: Run, tmp_path: Path, monkeypatch, capfd
):
    """Also after a stop between two of them, and next to a task that fails."""
    undisturbed = losses(run_recipe({**values, "run": {"dir": str(tmp_path / "plain")}}))
    monkeypatch.setattr(task_evaluation, "_evaluator", lambda section: Evaluator())
    values["eval"] = {"tasks": ["any"], "every": 6, "samples_every": 6}
    stop_at_step_7(values, run_recipe, monkeypatch)
    capfd.readouterr()
    folder = run_recipe(values)
    warning = "warning: step 12: broken could not be evaluated (RuntimeError: this task is broken)"
    assert f"{warning}; training goes on" in capfd.readouterr().err.splitlines()
    assert losses(folder) == undisturbed
    evaluations, samples = entries(folder, "eval"), entries(folder, "samples")
    assert [entry["step"] for entry in evaluations] == [entry["step"] for entry in samples] == [6, 12]
    model = MinRNNForCausalLM.from_pretrained(folder / "model")
    assert evaluations[-1]["sum/weights"] == Evaluator().evaluate("sum", model.eval(), None)["sum/weights"]
    text = (folder / "samples.txt").read_text()
    assert [line for line in text.splitlines() if line.startswith("=== ")] == [
        "=== step 6, prompt ''",
        "=== step 12, prompt ''",
        "=== prompt ''",
    ]
    final = text.split("=== prompt ''\n")[1].removesuffix("\n\n")
    assert samples[-1]["samples"] == [{"prompt": "", "text": final}]


@pytest.mark.slow
def test_scores_are_those_of_the_exported_model(with_tasks: Values, run_recipe: Run, tmp_path: Path, capfd):
    with_tasks["eval"]["tasks"].append("tiny_broken")
    folder = run_recipe(with_tasks)
    log = capfd.readouterr().err
    assert "\r" not in log
    assert "step 12: tiny_broken could not be evaluated (RuntimeError: this task is broken)" in log
    out = tmp_path / "results.json"
    options = ["--include-path", str(TASKS), "--bootstrap-iters", "0", "--device", "cpu", "--out", str(out)]
    main(["eval", str(folder), "--tasks", "tiny_choice,tiny_writing", *options])
    results, (_, last) = json.loads(out.read_text())["results"], entries(folder, "eval")
    assert last["tiny_choice/acc"] == results["tiny_choice"]["acc,none"]
    assert last["tiny_writing/exact_match"] == results["tiny_writing"]["exact_match,none"]


@pytest.mark.slow
def test_unknown_tasks_and_a_missing_lm_eval_are_errors_before_the_first_step(
    with_tasks: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch
):
    with_tasks["eval"]["tasks"] = ["tiny_chioce"]
    with pytest.raises(UserError, match=r"error: eval\.tasks: there is no 'tiny_chioce' \(did you mean"):
        run_recipe(with_tasks)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "minrnn.evals.harness.in_training")
    with pytest.raises(UserError, match=r"error: eval\.tasks: lm-eval is not installed: make setup-eval"):
        run_recipe(with_tasks)
    assert not (Path(with_tasks["run"]["dir"]) / "metrics.jsonl").exists()


def test_settings_that_would_do_nothing_are_refused():
    with pytest.raises(UserError) as raised:
        build_recipe(
            {
                "eval": {"every": 3, "limit": 2.5, "samples_every": 4},
                "train": {"sample_tokens": 0},
                "run": {"dir": "x"},
            }
        )
    assert [key for key, _ in raised.value.errors] == ["eval.every", "eval.limit"]
    with pytest.raises(UserError, match=r"eval\.samples_every: train\.prompts and train\.sample_tokens"):
        build_recipe({"eval": {"samples_every": 4}, "train": {"sample_tokens": 0}})
    with pytest.raises(UserError) as raised:
        build_recipe({"eval": {"tasks": ["x"], "samples_every": 4}, "data": {"corpus": "synthetic/parity"}})
    assert {"eval.tasks", "eval.samples_every"} <= {key for key, _ in raised.value.errors}


@pytest.mark.slow
def test_every_engine_and_layout_gives_the_same_scores(with_tasks: Values, run_recipe: Run, tmp_path: Path):
    from test_engines import ddp, launch, zero

    with_tasks["model"]["dropout"] = 0.0
    with_tasks["train"]["steps"] = 6
    single = run_recipe(with_tasks)
    with_tasks["run"]["dir"] = str(tmp_path / "other")
    recipe = recipe_file(with_tasks, tmp_path)
    for number, (launcher, options) in enumerate(
        [(ddp(2), []), (ddp(2), ["--parallel.context", "2"]), (zero(2), []), (zero(3), [])]
    ):
        folder = tmp_path / f"other-{number}"
        result = launch(launcher, recipe, "--run.dir", str(folder), *options)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "could not be evaluated" not in result.stderr
        (one,), (other,) = entries(single, "eval"), entries(folder, "eval")
        assert other["tiny_choice/acc"] == one["tiny_choice/acc"]
        assert [entry["step"] for entry in entries(folder, "samples")] == [6]
