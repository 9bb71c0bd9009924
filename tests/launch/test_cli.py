"""The command line and the recipes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from minrnn.data import BYTES, TextStream, byte_tokenizer, model_vocab_size, prompt_tokens, run_tokenizer
from minrnn.launch.cli import main
from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.pipeline.classification import classifier_fields, new_model
from minrnn.pipeline.export import export_model, model_config
from minrnn.pipeline.families.registry import OURS
from minrnn.pipeline.recipe import (
    build_recipe,
    read_recipe,
    resolved_config,
    shipped_recipes,
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny exported model."""
    folder = tmp_path_factory.mktemp("export") / "model"
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = MinRNNConfig(
        hidden_size=16, num_hidden_layers=1, intermediate_size=0, bos_token_id=tokenizer.bos_token_id
    )
    export_model(MinRNNForCausalLM(config), tokenizer, folder, resolved_config(build_recipe({})), tokens=0)
    return folder


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_each_recipe_parses_and_its_model_builds(name: str):
    recipe = read_recipe(["--config", name])
    data = recipe.data
    # Tests cannot reach the hub; only the vocabulary differs.
    tokenizer = run_tokenizer(data.corpus, BYTES, data.task)
    vocab_size = model_vocab_size(tokenizer) if data.tokenizer == BYTES else 50_264
    with torch.device("meta"):
        fields = {**recipe.resolved_model_fields(), **classifier_fields(data.corpus, data.task)}
        model = new_model(OURS, model_config(fields, tokenizer, vocab_size))
    expected = {
        "quickstart": (1e6, 2e6),
        "shakespeare-paper": (4e6, 7e6),
        "fineweb-350m": (300e6, 400e6),
        "fineweb-1b": (950e6, 1050e6),
        "synthetic-formal": (0.4e6, 0.6e6),
        "synthetic-selective-copying": (0.2e6, 0.3e6),
        "synthetic-distant": (50e3, 90e3),
        "lra-listops": (1.5e6, 3e6),
        "lra-text": (5e6, 9e6),
        "lra-retrieval": (1e6, 2.5e6),
        "lra-image": (15e6, 25e6),
        "lra-pathfinder": (2.5e6, 5e6),
        "lra-pathx": (5e6, 9e6),
    }[name]
    assert expected[0] < model.num_parameters() < expected[1]


def test_generate_reads_a_prompt_in_pieces(export: Path, tmp_path: Path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("a prompt that is longer than a piece")
    texts = []
    for prefill in ("3", "1000"):
        main(
            [
                "generate",
                str(export),
                "--prompt-file",
                str(prompt),
                "--prefill",
                prefill,
                "--max-new-tokens",
                "8",
                "--temperature",
                "0",
            ]
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(prompt.read_text())


def test_generate_accepts_a_run_s_folder_device_and_dtype(export: Path, capsys):
    texts = []
    for model, *more in ((export,), (export.parent,), (export.parent, "--device", "cpu", "--dtype", "fp64")):
        main(
            [
                "generate",
                str(model),
                "--prompt",
                "a run",
                "--max-new-tokens",
                "5",
                "--temperature",
                "0",
                *more,
            ]
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprot"], "error: exprot: unknown command (did you mean export?)"),
        (["generate", "./nowhere"], "error: MODEL: cannot load ./nowhere"),
        (["generate", "x", "--device", "gpu"], "error: --device: 'gpu' is no device"),
        (["generate", "x", "--temperature", "-1", "--prefill", "0"], "error: --prefill: must be at least 1"),
        (["export", "nowhere", "--out", "x", "--step", "3"], "error: RUN: there is no folder nowhere"),
        (["export", ".", "--out", "x"], "error: RUN: . holds no valid checkpoint; name the folder of"),
        (
            ["export", ".", "--out", "x", "--step", "3"],
            "error: --step: . has no checkpoint of step 3; those there: none",
        ),
        (["train", "--train.stpes", "3"], "error: train.stpes: unknown key (did you mean train.steps?)"),
    ],
)
def test_user_errors_end_with_status_2_and_one_line_each(
    arguments: list[str], message: str, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"]])
def test_help(arguments: list[str], capsys):
    main(arguments)
    assert "minrnn train --config quickstart" in capsys.readouterr().out


def test_generate_samples_as_transformers_does(export: Path, capsys):
    main(
        [
            "generate",
            str(export),
            "--prompt",
            "a",
            "--max-new-tokens",
            "20",
            "--top-p",
            "0.9",
            "--seed",
            "3",
            "--dtype",
            "fp32",
        ]
    )
    tokenizer = byte_tokenizer()
    # Any, because type checkers do not see that the class has generate().
    model: Any = MinRNNForCausalLM.from_pretrained(export).eval()
    set_seed(3)
    sampling = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 0,
        "max_new_tokens": 20,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids = model.generate(torch.tensor([prompt_tokens(tokenizer, "a")]), **sampling)
    stream = TextStream(tokenizer, b"a")
    assert capsys.readouterr().out == "a" + stream.write(ids[0, 2:].tolist()) + stream.end() + "\n"
