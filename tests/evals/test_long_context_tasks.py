"""Accuracy by distance and bands of memory length, against plain forward passes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minrnn.data import IGNORE_INDEX, Task, TaskValidation, build_task
from minrnn.evals.long_context import bands
from minrnn.evals.long_context.distance import measure_task
from minrnn.evals.long_context.positions import token_nats
from minrnn.launch.cli import main
from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.pipeline.export import export_model
from minrnn.pipeline.recipe import build_recipe, resolved_config

OPTIONS = {"min_distance": 3, "max_distance": 40, "validation_examples": 6, "test_lengths": [70]}
NAME = "synthetic/distant-register"


def tiny_model(**fields) -> MinRNNForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 0, "memory_length": 64}
    model = MinRNNForCausalLM(MinRNNConfig(vocab_size=32, **{**sizes, **fields})).eval()
    nn.Module.to(model, torch.float64)
    return model


def task() -> Task:
    built = build_task(NAME, OPTIONS)
    assert isinstance(built, Task)
    return built


@torch.no_grad()
def answers(model: MinRNNForCausalLM, cut: int | None) -> dict[int, list[tuple[bool, float]]]:
    """(is correct, nats) of every answer, by power of two of its distance, one document at a time."""
    found: dict[int, list[tuple[bool, float]]] = {}
    for _, chunk in TaskValidation(task(), 0, 1, 1, piece=1000).chunks():
        assert chunk.distances is not None
        starts = chunk.document_starts
        if cut is not None:
            starts = np.arange(1000)[None] % cut == 0
        ids, labels = torch.from_numpy(chunk.input_ids), chunk.shift_labels[0]
        logits = model(input_ids=ids, document_starts=torch.from_numpy(starts)).logits[0]
        for i in np.flatnonzero(labels != IGNORE_INDEX):
            power = int(np.log2(chunk.distances[0, i]))
            nats = -float(logits[i].log_softmax(-1)[labels[i]])
            found.setdefault(power, []).append((int(logits[i].argmax()) == labels[i], nats))
    return found


@settings(max_examples=3)
@given(st.integers(1, 3000))
def test_accuracies_are_those_of_whole_documents(piece: int):
    """For any size of pieces, carried and cut in one pass."""
    model = tiny_model()
    rows = measure_task(model, task(), [7, 32], [], piece + 50)["distance"]
    for name, cut in (("carried", None), ("7", 7), ("32", 32)):
        expected = answers(model, cut)
        assert [row["from"] for row in rows[:-1]] == [2**power for power in sorted(expected)]
        everything = [each for own in expected.values() for each in own]
        for row, own in zip(
            rows, [*(expected[power] for power in sorted(expected)), everything], strict=True
        ):
            assert row["answers"] == len(own)
            assert row["accuracy"][name] == pytest.approx(np.mean([correct for correct, _ in own]))
            assert row["nats"][name] == pytest.approx(np.mean([nats for _, nats in own]))


@settings(max_examples=15)
@given(st.floats(-4, 8))
def test_memory_lengths_are_those_of_the_decays(bias: float):
    model = tiny_model(conv_kernel=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "in_proj" in name:
                parameter.zero_()
            if name.endswith("gate_bias"):
                parameter.fill_(-bias)
    tokens = np.random.default_rng(0).integers(0, 32, 400)
    lengths = bands.memory_lengths(model, tokens)
    # the decay of a minGRU is 1 - sigmoid(gate) = sigmoid(bias)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1 + np.exp(bias)), rtol=1e-4, atol=1e-4)


@settings(max_examples=8)
@given(st.integers(3, 150), st.integers(40, 500), st.booleans())
def test_resetting_all_channels_is_a_cut_and_none_is_carrying(cut: int, piece: int, learn_h0: bool):
    model = tiny_model(conv_kernel=0, learn_h0=learn_h0)
    if learn_h0:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("h0"):
                    parameter.uniform_(-1, 1)
    tokens = np.random.default_rng(0).integers(0, 32, 300)
    channels = torch.zeros(2, *bands.memory_lengths(model, tokens).shape, dtype=torch.bool)
    channels[1] = True
    nats = bands.band_nats(model, tokens, channels, cut, piece)
    np.testing.assert_allclose(nats, token_nats(model, tokens, (None, cut)), rtol=1e-9, atol=1e-9)


def test_bands_divide_the_channels():
    lengths = torch.tensor([[1.0, 16.0, 300.0], [15.9, 1e6, 2.0]])
    rows, masks = bands.bands_of(lengths, [16, 256, 1000])
    assert [bands.band_name(row) for row in rows] == [
        "below 16",
        "16 to 255",
        "256 to 999",
        "1,000 and more",
        "all channels",
    ]
    assert [row["channels"] for row in rows] == [3, 1, 1, 1, 6]
    assert masks[:-1].sum(0).eq(1).all()
    assert len(bands.bands_of(lengths, [4, 5])[0]) == 3  # none from 4 to 4


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distance") / "model"
    tokenizer = task().tokenizer()
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    recipe = resolved_config(build_recipe({"data": {"corpus": NAME, "task": OPTIONS}}))
    export_model(tiny_model(**tokens), tokenizer, folder, recipe, tokens=0)
    return folder


def test_the_command_reads_a_task(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "far.json"
    words = ["long-context", str(export), "--corpus", NAME, "--cuts", "8", "--bands", "16", "--device", "cpu"]
    main([*words, "--task", str(OPTIONS).replace("'", ""), "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["task"]["max_distance"] == 40
    assert result["chance"] == 1 / 16
    assert set(result["distance"][0]["accuracy"]) == {"carried", "8"}
    assert {row["cut"] for row in result["bands"]} == {8}
    assert out.with_suffix(".png").exists()
    text = capsys.readouterr().out
    assert "accuracy (%) by distance" in text
    assert "all channels" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "synthetic/parity"], "--corpus: synthetic/parity has no documents longer than a chunk"),
        (["--corpus", NAME, "--task", "{max_distanc: 3}"], "--task: of synthetic/distant-register: unknown"),
        (["--corpus", NAME, "--task", "{num_values: 3}"], "MODEL: was not trained on"),
        (["--task", "{num_values: 3}"], "--task: is for synthetic/NAME, not for python-stdlib"),
        (["--bands", "x", "--cuts", ""], "--bands: must be numbers of tokens"),
        (["--bands", "4", "--cuts", ""], "--bands: are reset at every cut"),
    ],
)
def test_user_errors(export: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        main(["long-context", str(export), "--device", "cpu", *words])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_bands_need_a_decay_for_each_channel():
    model = tiny_model(cell="gla")
    with pytest.raises(Exception, match="--bands: needs a decay for each channel, and gla has other states"):
        bands.require_channels(model)
