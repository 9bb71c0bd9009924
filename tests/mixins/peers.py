"""The same tests on models of transformers, for comparison of the counts."""

import unittest
from typing import Any

import transformers
from mixin_harness import SIZES, CommonTests


class TestLlama(CommonTests, unittest.TestCase):
    base_model_class, causal_lm_class = transformers.LlamaModel, transformers.LlamaForCausalLM

    def new_config(self) -> Any:
        return transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)


class TestMamba2(CommonTests, unittest.TestCase):
    base_model_class, causal_lm_class = transformers.Mamba2Model, transformers.Mamba2ForCausalLM
    has_attentions = False

    def new_config(self) -> Any:
        sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
        return transformers.Mamba2Config(
            **sizes, num_heads=8, head_dim=8, state_size=16, n_groups=1, chunk_size=8
        )


class TestRecurrentGemma(CommonTests, unittest.TestCase):
    base_model_class = transformers.RecurrentGemmaModel
    causal_lm_class = transformers.RecurrentGemmaForCausalLM
    has_attentions = False

    def new_config(self) -> Any:
        return transformers.RecurrentGemmaConfig(
            **SIZES,
            block_types=("recurrent", "attention"),
            num_attention_heads=2,
            num_key_value_heads=1,
            lru_width=32,
            conv1d_width=4,
            attention_window_size=16,
        )
