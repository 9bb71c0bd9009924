"""Tiny models of each family that the tests look at closely."""

from typing import Any

import torch
from transformers import PreTrainedModel

from minrnn.data import byte_tokenizer
from minrnn.pipeline.export import model_config
from minrnn.pipeline.families.build import build_causal_lm

VOCAB = 264
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_heads": 4,
        "state_size": 16,
        "n_groups": 1,
    },
    "recurrent_gemma": {
        "hidden_size": 32,
        "lru_width": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
    "xlstm": {"hidden_size": 128, "num_hidden_layers": 1, "num_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gru": {"hidden_size": 16, "num_hidden_layers": 2},
    "lstm": {"hidden_size": 16, "num_hidden_layers": 2},
}
TRANSFORMERS = tuple(name for name in FIELDS if name not in ("gru", "lstm"))


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """A model with new weights, in eval mode."""
    torch.manual_seed(0)
    config = model_config({**FIELDS[name], **more}, byte_tokenizer(), VOCAB, name)
    model = build_causal_lm(name, config).eval()
    torch.nn.Module.to(model, dtype)
    return model
