"""FLOPs counted from the layers are those that torch counts, where it sees them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minrnn.models import MinRNNConfig
from minrnn.models.attention import WindowAttention
from minrnn.models.boundaries import NO_BOUNDARIES
from minrnn.models.registry import CELLS
from minrnn.pipeline.classification import new_model
from minrnn.pipeline.families.build import NO_SPECIAL_TOKENS
from minrnn.pipeline.families.registry import config_of
from minrnn.pipeline.flops import count_flops, count_parameters, model_size
from minrnn.pipeline.recipe import build_recipe

VOCAB, TOKENS = 40, 16


def products_of_torch(model: Any) -> float:
    """Products per token in a forward pass, counted by torch."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    counts = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    return (
        sum(flops for operation, flops in counts.items() if operation in ("aten.mm", "aten.addmm")) / TOKENS
    )


@settings(max_examples=10)
@given(
    st.sampled_from(sorted(CELLS)),
    st.fixed_dictionaries(
        {
            "num_hidden_layers": st.integers(1, 2),
            "expansion_factor": st.sampled_from([1.0, 2.0]),
            "intermediate_size": st.sampled_from([0, 24]),
            "conv_kernel": st.sampled_from([0, 4]),
            "output_gate": st.booleans(),
            "tie_word_embeddings": st.booleans(),
            "ternary": st.booleans(),
        }
    ),
)
def test_products_of_every_cell_are_those_that_torch_counts(cell: str, fields: dict):
    fields |= {"scan_backend": "torch"}  # compiles nothing
    recipe = build_recipe({"model": {"cell": cell, "hidden_size": 32, **fields}})
    config = MinRNNConfig(**recipe.resolved_model_fields(), vocab_size=VOCAB)
    model = new_model("minrnn", config).eval()
    flops = count_flops("minrnn", model, TOKENS)
    assert flops.products == products_of_torch(model)
    assert flops.training == 3 * (flops.products + flops.convolution + flops.recurrence)
    assert flops.recurrence >= 2 * config.recurrent_size * config.num_hidden_layers


def test_attention_reads_a_window_in_every_nth_layer():
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 5, "vocab_size": VOCAB}
    plain = count_flops("minrnn", new_model("minrnn", MinRNNConfig(**sizes)), TOKENS)
    config = MinRNNConfig(**sizes, attention_every=2, attention_window=100)
    model = new_model("minrnn", config).eval()
    flops = count_flops("minrnn", model, TOKENS)
    assert flops.attention == 2 * 4 * (128 + 99) * 32
    assert flops.recurrence == plain.recurrence * 3 / 5
    assert flops.convolution == plain.convolution * 3 / 5
    assert flops.products == products_of_torch(model)


@pytest.mark.parametrize("window", [2, 100, 300])
def test_a_window_costs_what_torch_counts(window: int):
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "attention_every": 2}
    config = MinRNNConfig(**sizes, attention_window=window)
    mixer, length = WindowAttention(config, 1), 600 if window == 300 else 256
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        mixer(torch.randn(1, length, 32), (None, None), NO_BOUNDARIES)
    products = 2 * length * 4 * 32 * 32
    assert counter.get_total_flops() - products == length * WindowAttention.attention_flops(config)


def test_a_real_state_takes_two_operations_and_a_matrix_five():
    def recurrence(cell: str, **fields: Any) -> float:
        recipe = build_recipe({"model": {"cell": cell, "hidden_size": 64, "num_hidden_layers": 3, **fields}})
        return model_size(recipe, VOCAB).flops.recurrence / 3

    assert recurrence("mingru", expansion_factor=2) == 2 * 128
    assert recurrence("gilr_lstm", expansion_factor=2) == 2 * 2 * 128
    assert recurrence("lru", expansion_factor=2) == 8 * 64
    assert recurrence("s4d", expansion_factor=1, state_expansion=4) == 11 * 64 * 4
    assert recurrence("hgrn2", expansion_factor=1, head_dim=16) == 5 * 64 * 16
    assert recurrence("linear_attention", expansion_factor=1, head_dim=16) == 4 * 64 * 17


@pytest.mark.parametrize("length", [16, 64])
def test_attention_grows_with_the_length_and_products_do_not(length: int):
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config_of(
        "llama", {**fields, "num_key_value_heads": 2, "vocab_size": VOCAB, **NO_SPECIAL_TOKENS}
    )
    model = new_model("llama", config)
    flops = count_flops("llama", model, length)
    assert flops.attention == 2 * 4 * length * 32
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48) + VOCAB * 32
    assert flops.products == 2 * matrices
    parameters = count_parameters(model)
    assert parameters.all == sum(weight.numel() for weight in model.parameters())
    assert parameters.all - parameters.blocks_and_head == VOCAB * 32
    assert parameters.blocks_and_head - parameters.without_embeddings == VOCAB * 32


@pytest.mark.parametrize("family", ["gru", "lstm"])
def test_a_torch_rnn_multiplies_each_token_by_all_its_matrices(family: str):
    config = config_of(family, {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": VOCAB})
    model: Any = new_model(family, config)
    gates, layers = (4 if family == "lstm" else 3), 2
    matrices = layers * gates * (24 * 24 + 24 * 24) + VOCAB * 24  # of the input and of h, and the head
    assert count_flops(family, model, TOKENS).products == 2 * matrices


def test_a_head_that_is_the_embedding_counts_once_and_multiplies():
    recipe = build_recipe({"model": {"hidden_size": 32, "tie_word_embeddings": True}})
    tied = model_size(recipe, VOCAB).parameters
    assert tied.all == tied.blocks_and_head
    recipe = build_recipe({"model": {"hidden_size": 32, "tie_word_embeddings": False}})
    untied = model_size(recipe, VOCAB).parameters
    assert untied.all == tied.all + VOCAB * 32
    assert untied.blocks_and_head == tied.blocks_and_head
