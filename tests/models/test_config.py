"""The configuration: presets, and errors, all in one message."""

import pytest
from transformers import AutoConfig

from minrnn.models import MinRNNConfig
from minrnn.models.configuration_minrnn import PRESETS


def test_presets():
    assert MinRNNConfig.from_preset("default").to_dict() == MinRNNConfig().to_dict()
    paper = MinRNNConfig.from_preset("paper", hidden_size=32)
    assert (paper.candidate_activation, paper.output_gate, paper.gated_mlp, paper.hidden_size) == (
        "g",
        False,
        False,
        32,
    )
    for preset in PRESETS:
        assert MinRNNConfig.from_preset(preset, memory_length=7).memory_length == 7
    with pytest.raises(ValueError, match="no preset 'papre'; choose one of default, paper"):
        MinRNNConfig.from_preset("papre")


def test_all_errors_in_one_message():
    wrong = {
        "cell": "gru",
        "candidate_activation": "relu",
        "scan_backend": "cuda",
        "hidden_act": "nothing",
        "vocab_size": 0,
        "hidden_size": -1,
        "num_hidden_layers": 0,
        "max_position_embeddings": 0,
        "expansion_factor": 0.0,
        "intermediate_size": -1,
        "conv_kernel": -2,
        "dropout": 1.0,
        "memory_length": 1.9,
        "initializer_range": 0.0,
    }
    with pytest.raises(ValueError, match="MinRNNConfig") as error:
        MinRNNConfig(**wrong)
    assert [name for name in wrong if f"{name}: " not in str(error.value)] == []
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: ") as error:
            MinRNNConfig(**{name: value})
        assert str(error.value).count(";") == 0 or name == "hidden_act"


@pytest.mark.parametrize(
    "name", ["expansion_factor", "memory_length", "initializer_range", "dropout", "rms_norm_eps"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(name, value):
    with pytest.raises(ValueError, match=f"{name}: "):
        MinRNNConfig(**{name: value})


def test_at_least_one_channel():
    with pytest.raises(ValueError, match="expansion_factor: "):
        MinRNNConfig(hidden_size=4, expansion_factor=0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "16"),
        ("hidden_size", 16.0),
        ("num_hidden_layers", None),
        ("cell", 3),
        ("output_gate", "yes"),
        ("dropout", "0.1"),
        ("scan_backend", 1),
        ("memory_length", [2]),
    ],
)
def test_wrong_types_are_refused(name, value):
    with pytest.raises(Exception, match=name) as error:
        MinRNNConfig(**{name: value})
    assert "Validation" in type(error.value).__name__ or isinstance(error.value, (TypeError, ValueError))


def test_round_trip(tmp_path):
    config = MinRNNConfig.from_preset(
        "paper", cell="minlstm", expansion_factor=2, eos_token_id=[1, 2], scan_backend="torch"
    )
    config.save_pretrained(tmp_path)
    for loaded in (MinRNNConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, MinRNNConfig)
        actual, expected = loaded.to_dict(), config.to_dict()
        assert {name: actual[name] for name in expected if name not in ("auto_map", "_name_or_path")} == {
            name: value for name, value in expected.items() if name not in ("auto_map", "_name_or_path")
        }
    assert AutoConfig.for_model("minrnn", hidden_size=32).hidden_size == 32


def test_recurrent_size():
    assert MinRNNConfig(hidden_size=100, expansion_factor=1.5).recurrent_size == 150
    assert MinRNNConfig(hidden_size=10, expansion_factor=1).recurrent_size == 10
