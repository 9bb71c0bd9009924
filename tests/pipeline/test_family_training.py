"""Families train in our loop as ours do: exact resume, validation, exports, samples, several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from run_helpers import Crash, Values, before_step, losses, recipe_file
from test_engines import ddp, launch, zero
from tiny_families import FIELDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from minrnn.common.errors import UserError
from minrnn.launch.cli import main
from minrnn.models import TorchRNNForCausalLM
from minrnn.pipeline import export, set_up
from minrnn.pipeline.checkpoint import checkpoint_paths
from minrnn.pipeline.families import registry
from minrnn.pipeline.families.limits import NO_DOCUMENTS, NO_STATE

Run = Callable[[Values], Path]
TRAINED = ("llama", "mamba2", "recurrent_gemma", "gru", "lstm")


def with_family(values: Values, name: str, folder: Path | None = None, **more: Any) -> Values:
    """The tiny recipe for a family."""
    own = {"family_config": FIELDS[name]} if name not in ("gru", "lstm") else FIELDS[name]
    run = values["run"] if folder is None else {"dir": str(folder)}
    return {**values, "run": run, "model": {"family": name, **own, **more}}


def fail() -> None:
    raise Crash


@pytest.mark.parametrize("name", ["llama", "lstm"])
def test_a_crashed_run_resumes_exactly(
    values: Values, run_recipe: Run, tmp_path: Path, monkeypatch, name: str
):
    values["train"]["precision"] = "fp32"
    undisturbed = run_recipe(with_family(values, name, tmp_path / "undisturbed"))
    with monkeypatch.context() as patched:
        before_step(patched, 7, fail)
        with pytest.raises(Crash):
            run_recipe(with_family(values, name))
    folder = run_recipe(with_family(values, name))
    for kind in ("train", "validation"):
        assert losses(folder, kind) == losses(undisturbed, kind)
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (folder, undisturbed)]
    assert weights[0] == weights[1]
    assert len((folder / "samples.txt").read_text()) > len("=== prompt ''")


def test_limits_are_said_once_and_kept(values: Values, run_recipe: Run, capfd):
    folder = run_recipe(with_family(values, "mamba2"))
    log = capfd.readouterr().err
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["limits"] == [NO_STATE, NO_DOCUMENTS]
    assert config["batch"]["carry_state"] is False
    for limit in config["model"]["limits"]:
        assert log.count(f"mamba2: {limit}") == 1
    assert "mamba2 (transformers' chunked form in torch" in log


def test_gru_has_no_limits_and_carries_its_state(values: Values, run_recipe: Run):
    folder = run_recipe(with_family(values, "gru"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["limits"] == []
    assert config["batch"]["carry_state"] is True
    newest = checkpoint_paths(folder / "checkpoints")[0]
    assert all(path.stat().st_size > 100 for path in newest.glob("reader-*.safetensors"))


def test_the_state_of_a_gru_decides_its_losses(values: Values, run_recipe: Run, tmp_path: Path):
    carried = run_recipe(with_family(values, "gru", tmp_path / "carried"))
    values["batch"]["carry_state"] = False
    cut = run_recipe(with_family(values, "gru", tmp_path / "cut"))
    assert losses(carried)[0] == losses(cut)[0]
    assert losses(carried)[-1] != losses(cut)[-1]


@pytest.mark.parametrize("name", ["llama", "gru"])
def test_sizes_are_searched_once(values: Values, run_recipe: Run, monkeypatch, name: str):
    values["model"] = {"family": name, "num_hidden_layers": 1, "num_parameters": "80k"}
    values["train"]["steps"] = 2
    folder = run_recipe(values)
    config = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    assert config["sizes"]["hidden_size"] > 1
    monkeypatch.setattr(set_up, "with_sizes", lambda *_: pytest.fail("searched again"))
    values["train"]["steps"] = 3
    run_recipe(values)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert abs(model.num_parameters() / 80_000 - 1) <= 0.02


def test_defaults_of_another_transformers_are_refused_on_resume_and_kept_in_an_export(
    values: Values, run_recipe: Run, monkeypatch, tmp_path: Path
):
    values["train"]["steps"] = 2
    folder = run_recipe(with_family(values, "llama"))
    values["train"]["steps"] = 3
    monkeypatch.setattr(
        export, "config_of", lambda name, fields: registry.config_of(name, {"rms_norm_eps": 0.5, **fields})
    )
    with pytest.raises(
        UserError, match=r"model.family: rms_norm_eps is 0.5 in transformers .*, but was 1e-06 when"
    ):
        run_recipe(with_family(values, "llama"))
    export.export_run(folder, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "llama",
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads: llama cannot run",
        ),
        ("llama", {"hidden_act": "foo"}, "hidden_act: llama cannot be built: KeyError: 'foo'"),
        ("gpt2", {"n_inner": -3}, "n_inner: gpt2 cannot be built: RuntimeError: "),
    ],
)
def test_the_field_at_fault_is_named(
    values: Values, run_recipe: Run, name: str, fields: dict[str, Any], message: str
):
    """Before training, where the configuration's own checks accept it."""
    values["model"] = {"family": name, "family_config": {**FIELDS[name], **fields}}
    values["batch"]["carry_state"] = False
    with pytest.raises(UserError) as raised:
        run_recipe(values)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"error: model.family_config.{message}")
    assert not (Path(values["run"]["dir"]) / "metrics.jsonl").exists()


def test_a_target_that_cannot_be_met_stops_before_training(values: Values, run_recipe: Run):
    values["model"] = {"family": "llama", "num_hidden_layers": 2, "num_parameters": 1000}
    with pytest.raises(UserError, match=r"model.num_parameters: no llama of 2 layers has 1,000 parameters"):
        run_recipe(values)
    assert not (Path(values["run"]["dir"]) / "metrics.jsonl").exists()


def test_init_from(values: Values, run_recipe: Run, tmp_path: Path):
    values["train"]["steps"] = 2
    first = run_recipe(with_family(values, "llama"))
    second = with_family(values, "llama", tmp_path / "second", init_from=str(first / "model"))
    start, end = losses(run_recipe(second))[0][1], losses(first)[0][1]
    assert start < end
    other = with_family(values, "mamba", tmp_path / "other", init_from=str(first / "model"))
    with pytest.raises(UserError, match=r"is a llama model, not mamba; set model.family"):
        run_recipe(other)
    wider = with_family(values, "llama", tmp_path / "wider", init_from=str(first / "model"))
    wider["model"]["family_config"] = {**FIELDS["llama"], "hidden_size": 64}
    with pytest.raises(UserError, match=r"model.hidden_size: is 64, but .* has 32"):
        run_recipe(wider)


def minrnn(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minrnn.launch.cli", *arguments]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    """The process's standard output."""
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_killed_and_resumed_exported_reloaded_and_continued(values: Values, tmp_path: Path, name: str):
    """As a user does it, with kill -9 in the middle."""
    values["train"] |= {"steps": 40, "save_every": 5, "eval_every": 20, "log_every": 1}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = recipe_file(with_family(values, name, tmp_path / "whole"), tmp_path / "a")
    finished(minrnn("train", "--config", str(whole)))
    folder = tmp_path / "killed"
    recipe = recipe_file(with_family(values, name, folder), tmp_path / "b")
    process = minrnn("train", "--config", str(recipe))
    deadline = time.monotonic() + 300
    while not checkpoint_paths(folder / "checkpoints") and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    finished(minrnn("train", "--config", str(recipe)))
    for kind in ("train", "validation"):
        assert losses(folder, kind) == losses(tmp_path / "whole", kind)
    assert [step for step, _ in losses(folder)] == list(range(1, 41))

    finished(minrnn("export", str(folder), "--out", str(tmp_path / "export")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert isinstance(model, TorchRNNForCausalLM) == (name in ("gru", "lstm"))
    ids = tokenizer("the state", return_tensors="pt")["input_ids"]
    generate = cast(Any, model).generate
    continued = generate(ids, max_new_tokens=8, do_sample=False)[0]
    expected = tokenizer.decode(continued, skip_special_tokens=True)
    options = ("--max-new-tokens", "8", "--temperature", "0", "--prompt", "the state")
    assert finished(minrnn("generate", str(tmp_path / "export"), *options)).rstrip("\n") == expected


@pytest.mark.slow
@pytest.mark.xdist_group("launcher")
@pytest.mark.parametrize("name", ["llama", "gru"])
def test_two_processes_and_zero_compute_the_same_losses(
    values: Values, run_recipe: Run, tmp_path: Path, name: str
):
    values["train"] |= {"steps": 6, "save_every": 3, "eval_every": 3}
    alone = run_recipe(with_family(values, name, tmp_path / "alone"))
    for engine, launcher in {"ddp": ddp(2), "zero2": zero(2)}.items():
        (tmp_path / f"{engine}-recipe").mkdir()
        recipe = recipe_file(with_family(values, name, tmp_path / engine), tmp_path / f"{engine}-recipe")
        result = launch(launcher, recipe)
        assert result.returncode == 0, (engine, result.stderr[-3000:])
        for kind in ("train", "validation"):
            np.testing.assert_allclose(
                losses(tmp_path / engine, kind), losses(alone, kind), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("name", ["llama", "gru"])
def test_commands_take_a_run_of_any_family(
    values: Values, run_recipe: Run, tmp_path: Path, capsys, name: str
):
    values["train"] |= {"steps": 2, "save_every": None, "eval_every": None}
    folder = run_recipe(with_family(values, name))
    capsys.readouterr()
    main(["generate", str(folder), "--prompt", "the", "--max-new-tokens", "4", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the")
    card = (folder / "model" / "README.md").read_text()
    assert ModelCard(card).data.to_dict()["tags"] == ["minrnn", name]
    assert ("Its state has a fixed size" in card) == (name == "gru")
    arguments = [
        "long-context",
        str(folder),
        "--device",
        "cpu",
        "--tokens",
        "300",
        "--out",
        str(tmp_path / "l.json"),
    ]
    if name == "llama":
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 2
        assert "is a llama model, which carries no state over a long document" in capsys.readouterr().err
    else:
        main([*arguments, "--anchors", "4", "--cuts", "64"])
        assert json.loads((tmp_path / "l.json").read_text())["model"]["parameters"] > 0


def test_torch_rnns_train_in_bf16(values: Values, run_recipe: Run):
    values["train"] |= {"precision": "bf16", "steps": 2, "save_every": None, "eval_every": None}
    assert np.isfinite([loss for _, loss in losses(run_recipe(with_family(values, "lstm")))]).all()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["llama", "lstm"])
def test_a_synthetic_task_is_scored(values: Values, run_recipe: Run, name: str):
    task = {"max_length": 12, "test_lengths": [12, 30], "validation_examples": 10}
    values["data"] = {"corpus": "synthetic/cycle-navigation", "task": task, "workers": 0}
    values["train"] |= {"steps": 2, "sample_tokens": 0, "save_every": None, "eval_every": None}
    folder = run_recipe(with_family(values, name))
    entry = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert entry["kind"] == "validation"
    assert entry["by_length"].keys() == {"12", "30"}
