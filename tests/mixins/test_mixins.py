"""transformers' own model tests, at the installed version, on both cells and presets (`make test-transformers`)."""

import importlib
import unittest
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from minrnn.models import MinRNNConfig, MinRNNForCausalLM, MinRNNModel

common: Any = pytest.importorskip("tests.test_modeling_common", reason="make test-transformers unpacks them")
training: Any = importlib.import_module("tests.test_training_mixin")
configuration: Any = importlib.import_module("tests.test_configuration_common")

MODEL_MAPPING_NAMES["minrnn"] = MinRNNModel.__name__  # models in it have no loss, the mixins know


class Tester:
    """What the mixins ask of a model: a tiny configuration and a batch."""

    causal_lm_class, base_model_class = MinRNNForCausalLM, MinRNNModel

    def __init__(self, cell: str, preset: str):
        self.cell, self.preset = cell, preset
        self.batch_size, self.seq_length, self.is_training = 13, 7, True
        self.hidden_size, self.num_hidden_layers, self.vocab_size = 32, 2, 99

    def get_config(self) -> MinRNNConfig:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
        }
        return MinRNNConfig.from_preset(
            self.preset, cell=self.cell, intermediate_size=37, pad_token_id=0, **sizes
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MinRNNConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class MinRNNTests(common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin):
    """The tests of one cell and preset."""

    all_model_classes = (MinRNNModel, MinRNNForCausalLM)
    has_attentions = False
    cell, preset = "mingru", "default"
    model_tester: Any = None

    def setUp(self) -> None:
        self.model_tester = Tester(self.cell, self.preset)

    def test_config(self) -> None:
        properties = ["hidden_size", "num_hidden_layers", "vocab_size"]
        configuration.ConfigTester(
            self, config_class=MinRNNConfig, common_properties=properties, hidden_size=32
        ).run_common_tests()


class TestMinGRU(MinRNNTests, unittest.TestCase):
    pass


class TestMinGRUPaper(MinRNNTests, unittest.TestCase):
    preset = "paper"


class TestMinLSTM(MinRNNTests, unittest.TestCase):
    cell = "minlstm"


class TestMinLSTMPaper(MinRNNTests, unittest.TestCase):
    cell, preset = "minlstm", "paper"
