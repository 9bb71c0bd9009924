"""The families that `model.family` can name, and what is known about each.

A family's configuration is a class of transformers. `Family.fields` says which of its fields make a size
(`sizes.py`); a family without a rule of its own gets the usual one, by the fields that its configuration has.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...models import MinRNNConfig, TorchRNNConfig
from .sizes import Size, SizeRule, mlp

OURS = "minrnn"
TORCH_RNNS = ("gru", "lstm")
CARRYING = (OURS, *TORCH_RNNS)
"""Families whose state training can carry from chunk to chunk."""
HEAD = 64  # channels of an attention head
# These come from the tokenizer.
TOKENIZER_FIELDS = ("vocab_size", "num_tokens", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Family:
    """One family of language models."""

    title: str
    rule: SizeRule
    fields: Callable[[Size], dict[str, Any]]
    """The fields of the configuration that make a size. The first is the width."""
    training_fields: Callable[[], dict[str, Any]] = dict
    """Fields for training only, which an export does not have."""


def _width(size: Size) -> dict[str, Any]:
    return {"hidden_size": size[0]}


def _width_and_mlp(size: Size) -> dict[str, Any]:
    return {"hidden_size": size[0], "intermediate_size": size[1]}


def _heads(width: int) -> dict[str, Any]:
    """Heads of 64 channels, as many for keys as for queries."""
    num_heads = max(1, width // HEAD)
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_heads}


def _llama(size: Size) -> dict[str, Any]:
    return {**_width_and_mlp(size), **_heads(size[0])}


def _recurrent_gemma(size: Size) -> dict[str, Any]:
    return {**_width_and_mlp(size), "lru_width": size[0], **_heads(size[0])}


def _mamba2(size: Size) -> dict[str, Any]:
    """A state of size[1] per channel, heads of 64 channels (32 if the width requires it), one group."""
    width, state = size
    head = HEAD if width % 32 == 0 else HEAD // 2
    return {
        "hidden_size": width,
        "state_size": state,
        "n_groups": 1,
        "head_dim": head,
        "num_heads": 2 * width // head,
    }


def _xlstm(size: Size) -> dict[str, Any]:
    factor = {"ffn_proj_factor": size[1] / size[0], "ffn_round_up_to_multiple_of": 1}
    return {"hidden_size": size[0], "num_heads": 4, **factor}


def has_package(name: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(name) is not None


def _mambapy() -> dict[str, Any]:
    """mambapy's parallel scan where it is installed; only its own training needs it."""
    return {"use_mambapy": True} if has_package("mambapy") else {}


FAMILIES: dict[str, Family] = {
    OURS: Family("minGRU (ours)", SizeRule(32, mlp(2.0), finest_step=8), _width_and_mlp),
    "gru": Family("nn.GRU", SizeRule(1, None), _width),
    "lstm": Family("nn.LSTM", SizeRule(1, None), _width),
    "llama": Family("Llama, SDPA", SizeRule(HEAD, mlp(8 / 3)), _llama),
    "mamba": Family("Mamba", SizeRule(1, None), _width, _mambapy),
    "falcon_mamba": Family("Falcon Mamba", SizeRule(1, None), _width, _mambapy),
    "mamba2": Family("Mamba-2", SizeRule(16, lambda width: (64, 128, 256, 8)), _mamba2),
    "recurrent_gemma": Family("RecurrentGemma", SizeRule(HEAD, mlp(3.0, step=16)), _recurrent_gemma),
    # The cache of transformers 5.23 needs a width that is a multiple of 128, so widths are far apart.
    "xlstm": Family("xLSTM (mLSTM)", SizeRule(128, mlp(8 / 3, smallest=0.25, largest=3.0)), _xlstm),
}


def family_names() -> tuple[str, ...]:
    """All names that `model.family` can have, ours first."""
    own = (OURS, *TORCH_RNNS)
    others = (name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in ("minrnn", "torch_rnn"))
    return (*own, *sorted(others))


@cache
def config_class(name: str) -> type[PreTrainedConfig]:
    """The configuration class of a family: transformers' own.

    flash-linear-attention, once it is imported, registers classes of its own as mamba and mamba2.

    Raises:
        ImportError: a package is missing that it needs.
    """
    if name == OURS:
        return MinRNNConfig
    return TorchRNNConfig if name in TORCH_RNNS else getattr(transformers, CONFIG_MAPPING_NAMES[name])


@cache
def config_fields(name: str) -> frozenset[str]:
    """The fields of a family's configuration that a recipe may set, with the names that stand for them."""
    cls = config_class(name)
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {*TOKENIZER_FIELDS}
    own = ({field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)) - general
    return frozenset(own - {"cell"} if name in TORCH_RNNS else own)


def has_vocabulary(name: str) -> bool:
    """Whether the configuration itself has the size of the vocabulary, not one of its parts."""
    return any(field.name == "vocab_size" for field in dataclasses.fields(config_class(name)))


def config_of(name: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a family with these fields."""
    return config_class(name)(**({"cell": name} if name in TORCH_RNNS else {}), **fields)


def canonical_name(name: str, field: str) -> str:
    """The configuration's own name of a field (GPT-2 calls hidden_size n_embd)."""
    return config_class(name).attribute_map.get(field, field)


def canonical(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields under the configuration's own names."""
    return {canonical_name(name, field): value for field, value in fields.items()}


def family(name: str) -> Family | None:
    """What is known about a family; None if its configuration has no field for the width."""
    return FAMILIES.get(name) or _usual_family(name)


def size_fields(name: str, size: Size, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a family's configuration that make a size, without those that the user has given.

    There are as many heads for keys as for queries, also where the user gives the number for queries.
    """
    known = family(name)
    assert known is not None, "only a family with a width has sizes"
    fields = canonical(name, known.fields(size))
    if "num_attention_heads" in given and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = given["num_attention_heads"]
    return {field: value for field, value in fields.items() if field not in given}


@cache
def _usual_family(name: str) -> Family | None:
    """A family by the fields that its configuration has: width, MLP and heads."""
    config = head_dim = None
    fields = config_fields(name)
    with contextlib.suppress(Exception):  # some cannot be built without further fields, or lack the last
        config = config_class(name)()
        head_dim = config.head_dim
    width = getattr(config, "hidden_size", None)
    if config is None or "hidden_size" not in fields or not isinstance(width, int):
        return None
    has_heads = "num_attention_heads" in fields
    has_mlp = "intermediate_size" in fields and isinstance(config.intermediate_size, int)
    ratio = config.intermediate_size / width if has_mlp else 0.0

    def fields_of(size: Size) -> dict[str, Any]:
        values = _width_and_mlp(size) if has_mlp else _width(size)
        if has_heads:
            values |= {key: value for key, value in _heads(size[0]).items() if key in fields}
        if has_heads and isinstance(head_dim, int) and "head_dim" in fields:
            values["head_dim"] = HEAD
        return canonical(name, values)

    return Family(name, SizeRule(HEAD if has_heads else 8, mlp(ratio) if has_mlp else None), fields_of)


def kernel_names(name: str, compiled: bool = False) -> str:
    """The implementation of its recurrence or attention that a family uses here."""
    if name == OURS:
        return "ours"
    if name in ("mamba", "falcon_mamba", "mamba2"):
        if has_package("mamba_ssm"):
            return f"mamba-ssm {importlib.metadata.version('mamba-ssm')}"
        if name == "mamba2":
            return "transformers' chunked form in torch (pip install mamba-ssm, with CUDA, for kernels)"
        if compiled:
            return "torch's associative scan, compiled"
        return "mambapy" if has_package("mambapy") else "a loop over time in Python (pip install mambapy)"
    return {
        "llama": "torch SDPA",
        "xlstm": "transformers' chunkwise form in torch",
        "recurrent_gemma": "transformers' loop over time in Python",
        "rwkv": "transformers' loop over time in Python",
    }.get(name, "torch")


def max_positions(config: PreTrainedConfig) -> int | None:
    """Tokens that a model of this configuration can read at once; None if it has no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
