"""The language models that are compared: ours and the peers, with a given number of parameters.

All read the byte tokenizer's vocabulary of 264 tokens, have the same number of layers, and tie the head to
the embedding. Their sizes are those of `model.num_parameters` (pipeline/families/sizes.py). Parameters are
counted on the meta device, without allocation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ...models import MinRNNConfig, MinRNNForCausalLM
from ...models.registry import CELLS
from ...pipeline.families import registry, sizes
from ...pipeline.families.build import causal_lm
from ...pipeline.families.limits import NO_DOCUMENTS, NO_STATE
from ...pipeline.families.sizes import NoSizeError, Size, SizeRule
from ...pipeline.loading import family_limits
from .measure import Unavailable, peer_module

VOCABULARY = 264


@dataclass(frozen=True)
class Options:
    """Options of a model other than its size."""

    num_layers: int
    compiled: bool = False


@dataclass(frozen=True)
class Family:
    """One family of language models."""

    title: str
    build: Callable[[Size, Options], nn.Module]
    """Initializes a model on the current default device; Unavailable if a package is missing."""
    rule: SizeRule

    def parameters(self, size: Size, options: Options) -> int:
        """Number of parameters of the model of this size."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build(size, options).parameters())


def _common(options: Options) -> dict[str, Any]:
    """The settings that all configurations get."""
    # the defaults of these lie outside our vocabulary
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": options.num_layers,
        "tie_word_embeddings": True,
        **special,
    }


def _minrnn(cell: str) -> Family:
    family = registry.FAMILIES[registry.OURS]

    def build(size: Size, options: Options) -> nn.Module:
        return MinRNNForCausalLM(MinRNNConfig(**_common(options), **family.fields(size), cell=cell))

    name = f"min{cell.removeprefix('min').upper()}" if cell.startswith("min") else cell
    return Family(f"{name} (ours)", build, family.rule)


def _peer(name: str, more: Callable[[Options], dict[str, Any]] = lambda options: {}) -> Family:
    """A family of `model.family`, with fields of its configuration for the bench."""
    family = registry.family(name)
    assert family is not None, f"{name} has a width"

    def build(size: Size, options: Options) -> nn.Module:
        fields = {**_common(options), **family.fields(size), **more(options)}
        transformers.logging.set_verbosity_error()
        model: Any = causal_lm(registry.config_of(name, fields))
        # xLSTM in transformers does not tie the head itself.
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        return model

    return Family(family.title, build, family.rule)


def _mamba(options: Options) -> dict[str, Any]:
    """Mamba on its fast path: mamba-ssm's kernels, else torch's associative scan if compiled, else mambapy's
    parallel scan.
    """
    if not (registry.has_package("mamba_ssm") or options.compiled or registry.has_package("mambapy")):
        raise Unavailable("without mambapy transformers loops over time in Python: pip install mambapy")
    return {"use_mambapy": not options.compiled}


def _mingru_pytorch(size: Size, options: Options) -> nn.Module:
    """The package's own language model, without its convolution (with which it cannot decode)."""
    language_model = peer_module("minGRU_pytorch.minLM", "minGRU-pytorch").minLM
    fields: dict[str, Any] = {"num_tokens": VOCABULARY, "dim": size[0], "depth": options.num_layers}
    model = language_model(**fields, ff_mult=(size[1] + 0.5) / size[0])  # it truncates ff_mult * dim
    model.to_logits.weight = model.token_emb.weight
    return model


FAMILIES: dict[str, Family] = {
    "minrnn": _minrnn("mingru"),
    "minrnn-minlstm": _minrnn("minlstm"),
    "minGRU-pytorch": Family("minGRU-pytorch", _mingru_pytorch, SizeRule(64, sizes.mlp(4.0))),
    "llama": _peer("llama", lambda options: {"max_position_embeddings": 2**21}),
    "mamba": _peer("mamba", _mamba),
    "mamba2": _peer("mamba2"),
    "xlstm": _peer("xlstm"),
    "gru": _peer("gru"),
    "lstm": _peer("lstm"),
}
OURS = ("minrnn", "minrnn-minlstm")
PEERS = tuple(name for name in FAMILIES if name not in OURS)
OTHER_OURS = tuple(f"minrnn-{cell}" for cell in CELLS if cell not in ("mingru", "minlstm"))
OTHER_PEERS = ("rwkv", "recurrent_gemma")  # loop over time in Python: only where they are named
FAMILIES |= {name: _minrnn(name.removeprefix("minrnn-")) for name in OTHER_OURS}
FAMILIES |= {name: _peer(name) for name in OTHER_PEERS}


def is_ours(family: str) -> bool:
    """Whether a contender is one of our models."""
    return family in (*OURS, *OTHER_OURS)


@cache
def find_size(family: str, target: int, num_layers: int) -> tuple[Size, int]:
    """The size whose number of parameters is closest to `target`, within 2 %; and that number.

    Raises:
        Unavailable: there is no such size, or the family cannot be built here.
    """
    model, options = FAMILIES[family], Options(num_layers)
    name = f"{family} of {num_layers} layers"
    try:
        return sizes.find_size(name, model.rule, lambda size: model.parameters(size, options), target)
    except NoSizeError as error:
        raise Unavailable(str(error)) from None


def build(family: str, target: int, options: Options, device: torch.device) -> tuple[nn.Module, Size, int]:
    """Build a model with about `target` parameters on a device; also returns its size and its number of
    parameters.
    """
    size, count = find_size(family, target, options.num_layers)
    with torch.device(device):
        model = FAMILIES[family].build(size, options)
    return model, size, count


def limits(model: nn.Module) -> list[str]:
    """What a peer cannot do with documents and states, in the words of `model.limits`; measured."""
    if not isinstance(model, transformers.PreTrainedModel):
        return [NO_STATE, NO_DOCUMENTS]  # as it is called here
    return family_limits(model)


def compute_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [batch, time, vocabulary] of a peer, without a cache."""
    if isinstance(model, transformers.PreTrainedModel):
        return model(input_ids=tokens, use_cache=False).logits
    output = model(tokens)
    return output[0] if isinstance(output, tuple) else output


def kernel_names(family: str, compiled: bool) -> str:
    """The implementation of its recurrence that a family uses here."""
    if family == "minGRU-pytorch":
        return "log-space scan"
    return registry.kernel_names(registry.OURS if is_ours(family) else family, compiled)
