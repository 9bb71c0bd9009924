"""FLOPs and parameters of every model, counted from its layers: for `minrnn plan`, `sweep` and `fit`.

Counted, per token of the forward pass, with an addition and a product as one operation each:

    products      2 per weight of each matrix that multiplies a token; an embedding that is looked up costs 0
    convolution   2 per weight
    attention     2 x 2 x length x width per layer: scores and values over the whole length, as torch's
                  counter counts them, though a causal kernel can leave out half; over a window of
                  minrnn, all keys of which scores are computed (models/attention.py)
    recurrence    the operations of the recurrence as it is written, not those of chunks that compute the same

Training takes three times as many: a product has two of its size in the backward pass. Norms, activations,
gates and the softmax are not counted, and neither is what `train.recompute` computes again.

The layers of minrnn, gru and lstm are counted by formula. Models of transformers run once on tensors without
memory, under `torch.utils.flop_counter`, which sees products, convolutions and attention; recurrences, which
it does not see, are added by formula (RECURRENCES).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from ..common.errors import UserError, one_line_message
from ..models import MinRNNConfig, TorchRNNConfig
from ..models.registry import mixer_classes
from .classification import classifier_fields, new_model
from .config import Recipe
from .families.build import NO_SPECIAL_TOKENS
from .families.registry import CARRYING, config_of

TRAINING = 3  # forward and backward, in forward passes
SHORT = 16  # tokens on which a family without attention is counted: its FLOPs do not depend on the length


@dataclass(frozen=True)
class Flops:
    """FLOPs of the forward pass per token."""

    products: float
    convolution: float
    attention: float
    recurrence: float

    @property
    def forward(self) -> float:
        """All of the forward pass."""
        return self.products + self.convolution + self.attention + self.recurrence

    @property
    def training(self) -> float:
        """All of a training step."""
        return TRAINING * self.forward


@dataclass(frozen=True)
class Parameters:
    """A model's number of parameters, by three conventions. Shared parameters count once."""

    all: int
    without_embeddings: int
    """Without the embeddings of tokens and positions, and without the head."""
    blocks_and_head: int
    """Every parameter that a token is multiplied by: `without_embeddings` and the head, also if the head is
    the embedding."""


@dataclass(frozen=True)
class ModelSize:
    """What a model has and what it costs."""

    parameters: Parameters
    flops: Flops

    def to_json(self) -> dict[str, Any]:
        """Both as one mapping, with the FLOPs of a training step per token."""
        return {"parameters": asdict(self.parameters), "flops_per_token": self.flops.training}


Recurrence = Callable[[Any], float]
RECURRENCES: dict[str, Recurrence] = {
    # a h + b with a product for b, and the readout: 5 per number of the state.
    "mamba": lambda config: 5 * config.num_hidden_layers * config.intermediate_size * config.state_size,
    "falcon_mamba": lambda config: (
        5 * config.num_hidden_layers * config.intermediate_size * config.state_size
    ),
    "mamba2": lambda config: (
        5 * config.num_hidden_layers * config.num_heads * config.head_dim * config.state_size
    ),
    "xlstm": lambda config: (
        5 * config.num_hidden_layers * config.num_heads * config.qk_head_dim * (config.v_head_dim + 1)
    ),
    # Numerator, denominator and their maximum: 2 each.
    "rwkv": lambda config: 6 * config.num_hidden_layers * config.attention_hidden_size,
    "recurrent_gemma": lambda config: (
        2 * config.lru_width * config.layers_block_type.count("linear_attention")
    ),
}
# Their other products of two activations are a recurrence in chunks, or its readout.
WITHOUT_ATTENTION = ("mamba", "falcon_mamba", "mamba2", "xlstm", "rwkv")
# They loop over time in Python. Attention grows linearly with the length, so two short ones tell all.
EXTRAPOLATED = ("recurrent_gemma",)


def model_size(recipe: Recipe, vocab_size: int) -> ModelSize:
    """Parameters and FLOPs of a recipe's model. Nothing is allocated.

    Args:
        recipe: with its sizes, if model.num_parameters is set (`family_settings.with_sizes`). FLOPs are
            counted for chunks of `batch.chunk` tokens.

    Raises:
        UserError: the model cannot be built, or its FLOPs cannot be counted.
    """
    name = recipe.model.family
    head = classifier_fields(recipe.data.corpus, recipe.data.task)
    fields = {**recipe.resolved_model_fields(), **head, **NO_SPECIAL_TOKENS, "vocab_size": vocab_size}
    config = config_of(name, fields)
    with torch.device("meta"):
        model = new_model(name, config)
    return ModelSize(count_parameters(model), count_flops(name, model, recipe.batch.chunk))


def count_parameters(model: Any) -> Parameters:
    """The parameters of a language model or a classifier."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_weights = set(head.parameters()) if isinstance(head, nn.Module) else set()
    outside = sum(weight.numel() for weight in embeddings | head_weights)
    looked_up = sum(weight.numel() for weight in embeddings - head_weights)
    return Parameters(total, total - outside, total - looked_up)


def count_flops(name: str, model: Any, length: int) -> Flops:
    """FLOPs per token of the forward pass over `length` tokens.

    Args:
        name: the family.
        model: may be on the meta device.

    Raises:
        UserError: a family of transformers cannot run on tensors without memory.
    """
    if name in CARRYING:
        return _counted_by_formula(model)
    return _counted_by_torch(name, model.config, length)


def _counted_by_formula(model: Any) -> Flops:
    """Of minrnn, gru and lstm, whose FLOPs do not depend on the length."""
    config, layers = model.config, list(model.modules())
    inside = [layer for layer in model.model.modules() if isinstance(layer, nn.Linear)]
    products = sum(layer.weight.numel() for layer in inside)
    if getattr(config, "problem_type", None) is None:  # a classifier's head is computed once for each row
        products += config.vocab_size * config.hidden_size
    for layer in layers:
        if isinstance(layer, nn.RNNBase):
            products += sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    if isinstance(config, TorchRNNConfig):
        return Flops(2 * products, 0, 0, 2 * config.num_hidden_layers * config.hidden_size)
    assert isinstance(config, MinRNNConfig)
    weights = [getattr(layer, "conv_weight", None) for layer in layers]
    convolution = sum(weight.numel() for weight in weights if weight is not None)
    directions, mixers = 2 if config.bidirectional else 1, mixer_classes(config)
    recurrence = directions * sum(mixer.recurrence_flops(config) for mixer in mixers)
    attention = directions * sum(mixer.attention_flops(config) for mixer in mixers)
    return Flops(2 * products, 2 * convolution, attention, recurrence)


def _counted_by_torch(name: str, config: PreTrainedConfig, length: int) -> Flops:
    """Of a model of transformers."""
    has_attention = name not in WITHOUT_ATTENTION
    if name in EXTRAPOLATED and length > 2 * SHORT:
        short, long = (_counted_by_torch(name, config, tokens) for tokens in (SHORT, 2 * SHORT))
        slope = (long.attention - short.attention) / SHORT
        return replace(short, attention=short.attention + slope * (length - SHORT))
    tokens = length if has_attention else min(SHORT, length)
    try:
        config._attn_implementation = "eager"  # as products, which the counter sees on every device
        with FakeTensorMode():
            model = new_model(name, config).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    except UserError:
        raise
    except Exception as error:  # each model raises its own
        message = f"the FLOPs of {name} cannot be counted: {one_line_message(error)}"
        raise UserError("model.family", message) from None
    by_kind: dict[str, float] = dict.fromkeys(("products", "convolution", "attention"), 0.0)
    for operation, flops in counter.get_flop_counts()["Global"].items():
        by_kind[_kind(str(operation))] += flops / tokens
    if not has_attention:
        by_kind["attention"] = 0.0
    return Flops(**by_kind, recurrence=RECURRENCES.get(name, lambda _: 0.0)(config))


def _kind(operation: str) -> str:
    """What an operation of torch counts as: products with two batches are those of attention."""
    if "convolution" in operation:
        return "convolution"
    return "attention" if "bmm" in operation or "attention" in operation else "products"
