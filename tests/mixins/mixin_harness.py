"""What transformers' test mixins ask of a model: a tiny configuration, a batch, the classes."""

import importlib
from typing import Any

import pytest
import torch

common: Any = pytest.importorskip("tests.test_modeling_common", reason="make test-transformers unpacks them")
training: Any = importlib.import_module("tests.test_training_mixin")
configuration: Any = importlib.import_module("tests.test_configuration_common")

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 37,
    "pad_token_id": 0,
}


class Tester:
    """The `model_tester` of one test class."""

    def __init__(self, tests: "CommonTests"):
        self.tests = tests
        self.base_model_class, self.causal_lm_class = tests.base_model_class, tests.causal_lm_class
        self.batch_size, self.seq_length, self.is_training = 13, 7, True
        self.hidden_size, self.num_hidden_layers = SIZES["hidden_size"], SIZES["num_hidden_layers"]
        self.vocab_size = SIZES["vocab_size"]
        self.num_attention_heads = getattr(tests.new_config(), "num_attention_heads", None)

    def get_config(self) -> Any:
        return self.tests.new_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class CommonTests(common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin):
    """The mixins' tests of one model; a subclass names its classes and makes its configuration."""

    base_model_class: Any = None
    causal_lm_class: Any = None
    model_tester: Any = None

    def new_config(self) -> Any:
        raise NotImplementedError

    def setUp(self) -> None:
        self.all_model_classes = (self.base_model_class, self.causal_lm_class)
        self.model_tester = Tester(self)

    def test_config(self) -> None:
        properties = ["hidden_size", "num_hidden_layers", "vocab_size"]
        config_class = type(self.new_config())
        tester = configuration.ConfigTester(
            self, config_class=config_class, common_properties=properties, hidden_size=SIZES["hidden_size"]
        )
        tester.run_common_tests()
