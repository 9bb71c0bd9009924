"""The language models that are compared: ours and the peers, with a given number of parameters.

All read the byte tokenizer's vocabulary of 264 tokens and tie the head to the embedding. A family has a width
in steps that suit the hardware and, if it has an MLP or the like, a second size with finer steps. `find_size`
chooses the width so that the fine size can meet the target, and prefers the setting that is closest to the
family's own recommendation. The number of layers is the same for all. Parameters are counted on the meta
device, without allocation.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, MambaConfig, xLSTMConfig

from ...models import MinRNNConfig, MinRNNForCausalLM
from .measure import Unavailable, peer_module

VOCABULARY = 264
TOLERANCE = 0.02  # relative difference from the target number of parameters
Size = tuple[int, int]  # width, and the fine size (0 if there is none)


@dataclass(frozen=True)
class Options:
    """Options of a model other than its size."""

    num_layers: int
    compiled: bool = False
    decoding: bool = False
    """For generation; xLSTM has a mode for it."""


@dataclass(frozen=True)
class Family:
    """One family of language models."""

    title: str
    build: Callable[[Size, Options], nn.Module]
    """Initializes a model on the current default device; Unavailable if a package is missing."""
    step: int
    """Widths are multiples of this."""
    fine: Callable[[int], tuple[int, int, int, int]] | None
    """Returns minimum, recommendation, maximum and step of the fine size for a width."""

    def parameters(self, size: Size, options: Options) -> int:
        """Number of parameters of the model of this size."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build(size, options).parameters())


def _tied(model: Any) -> nn.Module:
    """Tie the head of a model to its embedding (xLSTM in transformers does not do so itself)."""
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def _from_config(config: Any) -> nn.Module:
    transformers.logging.set_verbosity_error()
    return _tied(AutoModelForCausalLM.from_config(config))


def _common(size: Size, options: Options) -> dict[str, Any]:
    """The settings that all configurations of transformers get."""
    # the defaults of these lie outside our vocabulary
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size[0],
        "num_hidden_layers": options.num_layers,
        **special,
    }


def _minrnn(cell: str) -> Callable[[Size, Options], nn.Module]:
    def build(size: Size, options: Options) -> nn.Module:
        return MinRNNForCausalLM(MinRNNConfig(**_common(size, options), intermediate_size=size[1], cell=cell))

    return build


def _llama(size: Size, options: Options) -> nn.Module:
    """Llama with torch's scaled_dot_product_attention and heads of 64 channels, as many for keys as for
    queries.
    """
    fields: dict[str, Any] = _common(size, options) | {
        "intermediate_size": size[1],
        "num_attention_heads": max(1, size[0] // 64),
    }
    fields |= {"max_position_embeddings": 2**21, "attn_implementation": "sdpa"}
    return _from_config(LlamaConfig(**fields))


def _mamba(size: Size, options: Options) -> nn.Module:
    """Mamba on its fast path: mamba-ssm's kernels, else torch's associative scan if compiled, else mambapy's
    parallel scan.
    """
    if (
        importlib.util.find_spec("mamba_ssm") is None
        and not options.compiled
        and importlib.util.find_spec("mambapy") is None
    ):
        raise Unavailable("without mambapy transformers loops over time in Python: pip install mambapy")
    return _from_config(MambaConfig(**_common(size, options), use_mambapy=not options.compiled))


def _mamba2(size: Size, options: Options) -> nn.Module:
    """Mamba-2 with a state of size[1] per channel, heads of 64 channels (32 if the width requires it), and
    one group.
    """
    head = 64 if size[0] % 32 == 0 else 32
    fields: dict[str, Any] = _common(size, options) | {"state_size": size[1], "n_groups": 1}
    return _from_config(Mamba2Config(**fields, head_dim=head, num_heads=2 * size[0] // head))


def _xlstm(size: Size, options: Options) -> nn.Module:
    mode = "inference" if options.decoding else "train"
    config = xLSTMConfig(
        **_common(size, options),
        num_heads=4,
        ffn_proj_factor=size[1] / size[0],
        ffn_round_up_to_multiple_of=1,
        mode=mode,
    )
    return _from_config(config)


def _mingru_pytorch(size: Size, options: Options) -> nn.Module:
    """The package's own language model, without its convolution (with which it cannot decode)."""
    language_model = peer_module("minGRU_pytorch.minLM", "minGRU-pytorch").minLM
    fields: dict[str, Any] = {"num_tokens": VOCABULARY, "dim": size[0], "depth": options.num_layers}
    model = language_model(**fields, ff_mult=(size[1] + 0.5) / size[0])  # it truncates ff_mult * dim
    model.to_logits.weight = model.token_emb.weight
    return model


class TorchRNN(nn.Module):
    """Embedding, nn.GRU or nn.LSTM layers, and head."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], width: int, num_layers: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.recurrent = kind(width, width, num_layers, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits [batch, time, vocabulary], and the state after the last token."""
        hidden, state = self.recurrent(self.embedding(tokens), state)
        return self.head(hidden), state


def _mlp(ratio: float, step: int = 8) -> Callable[[int], tuple[int, int, int, int]]:
    """The fine size of an MLP, around `ratio` times the width."""
    return lambda width: (
        step * int(0.5 * ratio * width / step),
        int(ratio * width),
        step * int(2 * ratio * width / step),
        step,
    )


FAMILIES: dict[str, Family] = {
    "minrnn": Family("minGRU (ours)", _minrnn("mingru"), 32, _mlp(2.0)),
    "minrnn-minlstm": Family("minLSTM (ours)", _minrnn("minlstm"), 32, _mlp(2.0)),
    "minGRU-pytorch": Family("minGRU-pytorch", _mingru_pytorch, 64, _mlp(4.0)),
    "llama": Family("Llama, SDPA", _llama, 64, _mlp(8 / 3)),
    "mamba": Family("Mamba", _mamba, 1, None),
    "mamba2": Family("Mamba-2", _mamba2, 16, lambda width: (64, 128, 256, 8)),
    "xlstm": Family("xLSTM (mLSTM)", _xlstm, 64, _mlp(8 / 3)),
    "gru": Family("nn.GRU", lambda size, options: TorchRNN(nn.GRU, size[0], options.num_layers), 1, None),
    "lstm": Family("nn.LSTM", lambda size, options: TorchRNN(nn.LSTM, size[0], options.num_layers), 1, None),
}
OURS = ("minrnn", "minrnn-minlstm")
PEERS = tuple(name for name in FAMILIES if name not in OURS)


@cache
def find_size(family: str, target: int, num_layers: int) -> tuple[Size, int]:
    """The size whose number of parameters is closest to `target`, within TOLERANCE; and that number.

    Raises:
        Unavailable: there is no such size, or the family cannot be built here.
    """
    candidates = _candidates(FAMILIES[family], target, Options(num_layers))

    def rank(entry: tuple[Size, int, float]) -> tuple[bool, bool, bool, float]:
        (width, _), count, distance = entry
        error = abs(count - target) / target
        # tensor cores need multiples of 8
        return (error > TOLERANCE, width % 8 != 0, error > TOLERANCE / 4, distance)

    size, count, _ = min(candidates, key=rank)
    if abs(count - target) > TOLERANCE * target:
        raise Unavailable(
            f"no {family} of {num_layers} layers has {target:,} parameters within {TOLERANCE:.0%}; the "
            f"nearest has {count:,}"
        )
    return size, count


def _candidates(family: Family, target: int, options: Options) -> list[tuple[Size, int, float]]:
    """Sizes near the target: (size, parameters, distance of the setting from the recommended one)."""

    def count(width: int, fine: int) -> int:
        return family.parameters((width, fine), options)

    def bounds(width: int) -> tuple[int, int, int, int]:
        return (0, 0, 0, 1) if family.fine is None else family.fine(width)

    low, high = 0, 1
    while count(high * family.step, bounds(high * family.step)[2]) < target:
        low, high = high, 2 * high
    while high - low > 1:  # find the smallest width that can reach the target
        middle = (low + high) // 2
        reaches = count(middle * family.step, bounds(middle * family.step)[2]) >= target
        low, high = (low, middle) if reaches else (middle, high)
    first = high if family.fine is not None else max(1, high - 8)
    candidates = []
    for width in range(first * family.step, (high + 9) * family.step, family.step):
        minimum, recommended, maximum, step = bounds(width)
        smallest = count(width, minimum)
        fine = minimum
        if family.fine is not None:
            # the number of parameters is affine in the fine size
            slope = (count(width, maximum) - smallest) / (maximum - minimum)
            steps = round((target - smallest) / slope / step + minimum / step)
            fine = min(max(step * steps, minimum), maximum)
        number = count(width, fine)
        distance = abs(fine / recommended - 1) if recommended else abs(number / target - 1)
        candidates.append(((width, fine), number, distance))
        if smallest > (1 + TOLERANCE) * target:
            break
    return candidates


def build(family: str, target: int, options: Options, device: torch.device) -> tuple[nn.Module, Size, int]:
    """Build a model with about `target` parameters on a device; also returns its size and its number of
    parameters.
    """
    size, count = find_size(family, target, options.num_layers)
    with torch.device(device):
        model = FAMILIES[family].build(size, options)
    return model, size, count


def compute_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [batch, time, vocabulary] of a peer, without a cache."""
    if isinstance(model, transformers.PreTrainedModel):
        return model(input_ids=tokens, use_cache=False).logits
    output = model(tokens)
    return output[0] if isinstance(output, tuple) else output


def kernel_names(family: str, compiled: bool) -> str:
    """The implementation of its recurrence that a family uses here."""
    if family in OURS:
        return "ours"
    if family in ("mamba", "mamba2"):
        if importlib.util.find_spec("mamba_ssm") is not None:
            return f"mamba-ssm {importlib.metadata.version('mamba-ssm')}"
        if family == "mamba":
            return "torch's associative scan, compiled" if compiled else "mambapy"
        return "transformers' chunked form in torch (pip install mamba-ssm, with CUDA, for kernels)"
    return {
        "llama": "torch SDPA",
        "xlstm": "transformers' chunkwise form in torch",
        "minGRU-pytorch": "log-space scan",
    }.get(family, "torch")
