"""transformers' own model tests, of the installed version, on both cells and presets."""

import unittest

from mixin_harness import SIZES, CommonTests
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from minrnn.models import MinRNNConfig, MinRNNForCausalLM, MinRNNModel

MODEL_MAPPING_NAMES["minrnn"] = MinRNNModel.__name__  # the mixins know by it that such a model has no loss


class MinRNNTests(CommonTests):
    """The tests of one cell and preset."""

    base_model_class, causal_lm_class = MinRNNModel, MinRNNForCausalLM
    has_attentions = False
    cell, preset = "mingru", "default"

    def new_config(self) -> MinRNNConfig:
        return MinRNNConfig.from_preset(self.preset, cell=self.cell, **SIZES)


class TestMinGRU(MinRNNTests, unittest.TestCase):
    pass


class TestMinGRUPaper(MinRNNTests, unittest.TestCase):
    preset = "paper"


class TestMinLSTM(MinRNNTests, unittest.TestCase):
    cell = "minlstm"


class TestMinLSTMPaper(MinRNNTests, unittest.TestCase):
    cell, preset = "minlstm", "paper"
