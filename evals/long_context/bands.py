"""Which channels carry the state's gain: the loss if only some of them are reset at every cut.

    tokens -> memory_lengths, of every channel of every layer
           -> bands of memory length -> one row for each band: its channels are reset at every cut
           -> loss minus that with the whole state carried

The memory length of a channel is 1 / (1 - a), where log a is the mean of the logarithm of its decay |a_t|
over tokens of the text. The product of the decays over a few tokens is the derivative of the state after them
by the state before them, so every cell with a decay per channel is measured without knowing its equation.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import UserError
from ...models import MinRNNCache, MinRNNForCausalLM
from ...models.minimal_cells import MinimalMixer
from .positions import mean_and_error, pieces, score

NUM_WINDOWS = 64  # places of the text where decays are measured
WINDOW = 16  # tokens; the product of so many decays is above fp32's smallest number
CONTEXT = 256  # tokens that are read before each


def require_channels(model: MinRNNForCausalLM) -> list[MinimalMixer]:
    """The mixers of a model whose states are channels with one decay each.

    Raises:
        UserError: its cell has other states.
    """
    blocks = getattr(model.model, "layers", [])
    mixers = [getattr(block, "mixer", None) for block in blocks]
    own = [mixer for mixer in mixers if isinstance(mixer, MinimalMixer)]
    if not own or len(own) < len(mixers):
        cell = getattr(model.config, "cell", model.config.model_type)
        owner = "attention" if getattr(model.config, "attention_every", None) else cell
        message = f"needs a decay for each channel, and {owner} has other states; leave it out"
        raise UserError("--bands", message)
    return own


def memory_lengths(model: MinRNNForCausalLM, tokens: np.ndarray) -> Tensor:
    """The memory length of each channel in tokens, fp64 [layers, width], measured at places spread over the
    text.

    Args:
        model: in eval mode, with one decay per channel (`require_channels`).
        tokens: <bos> and the following tokens, int [1 + n], n > WINDOW.
    """
    context = min(CONTEXT, len(tokens) - WINDOW)
    ends = np.unique(np.linspace(context + WINDOW, len(tokens), NUM_WINDOWS).round().astype(int))
    rows = tokens[ends[:, None] - context - WINDOW + np.arange(context + WINDOW)]
    ids = torch.as_tensor(rows.astype(np.int64), device=model.device)
    with torch.no_grad():
        before = model.model(input_ids=ids[:, :context], use_cache=True).past_key_values
    entering = before.mapped(lambda tensor: tensor.detach().requires_grad_())
    cache = entering.mapped(lambda tensor: tensor)
    with torch.enable_grad():
        model.model(input_ids=ids[:, context:], past_key_values=cache, use_cache=True)
    logs = []
    for first, last in zip(entering.layers, cache.layers, strict=True):
        assert first.recurrent is not None
        assert last.recurrent is not None
        # A channel's inputs do not depend on its own layer's state, so this is the product of its decays.
        (product,) = torch.autograd.grad(last.recurrent.sum(), first.recurrent, retain_graph=True)
        logs.append(product.abs().double().clamp_min(1e-38).log().mean(0) / WINDOW)
    return 1 / -torch.expm1(torch.stack(logs).clamp_max(-1e-9))


def bands_of(lengths: Tensor, edges: Sequence[int]) -> tuple[list[dict[str, Any]], Tensor]:
    """The bands between edges that have channels, then all channels as one.

    Args:
        lengths: [layers, width].
        edges: tokens, rising.

    Returns:
        {"from", "to", "channels"} of each, where to is None for no limit, and which channels they have, bool
        [bands, layers, width].
    """
    bands, masks = [], []
    for first, last in itertools.pairwise([0, *edges, math.inf]):
        mask = (lengths >= first) & (lengths < last)
        if mask.any():
            upper = None if math.isinf(last) else int(last)
            bands.append({"from": int(first), "to": upper, "channels": int(mask.sum())})
            masks.append(mask)
    everything = {"from": 0, "to": None, "channels": lengths.numel()}
    return [*bands, everything], torch.stack([*masks, torch.ones_like(lengths, dtype=torch.bool)])


def reset_channels(model: MinRNNForCausalLM, cache: MinRNNCache, masks: Tensor) -> None:
    """Give some channels of a state the values with which a document begins; the convolution's inputs stay.

    Args:
        masks: which channels, bool [rows, layers, width].
    """
    for mixer, layer, mask in zip(require_channels(model), cache.layers, masks.unbind(1), strict=True):
        assert layer.recurrent is not None
        initial = mixer.initial_state()
        empty = torch.zeros_like(layer.recurrent) if initial is None else initial.to(layer.recurrent)
        layer.replace(torch.where(mask, empty, layer.recurrent), layer.conv, num_tokens=0)


@torch.no_grad()
def band_nats(
    model: MinRNNForCausalLM,
    tokens: np.ndarray,
    masks: Tensor,
    cut: int,
    piece: int,
    on_progress: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Nats of each token but the first, fp64 [bands, n], where each band's channels are reset every `cut`
    tokens.

    Args:
        masks: the channels of each band, bool [bands, layers, width].
        piece: tokens per forward pass, over all rows.
        on_progress: called with the number of tokens of each forward pass.
    """
    length, num_bands = len(tokens) - 1, len(masks)
    nats = np.empty((num_bands, length))
    cache = MinRNNCache(model.config.num_hidden_layers)
    for start in range(0, length, cut):
        if start:
            reset_channels(model, cache, masks)
        for first, last in pieces(min(cut, length - start), max(1, piece // num_bands)):
            part = slice(start + first, start + last)
            nats[:, part] = score(model, tokens[part.start : part.stop + 1], num_bands, cache)
            on_progress(last - first)
    return nats


def band_costs(
    model: MinRNNForCausalLM,
    tokens: np.ndarray,
    carried: np.ndarray,
    cuts: Sequence[int],
    edges: Sequence[int],
    piece: int,
    on_progress: Callable[[int], object] = lambda count: None,
) -> list[dict[str, Any]]:
    """What it costs to reset each band at every cut: a row for each cut and band.

    Args:
        carried: nats of each token but the first with the state carried [n].
        edges: of the bands, in tokens.
    """
    bands, masks = bands_of(memory_lengths(model, tokens), edges)
    rows = []
    for cut in cuts:
        nats = band_nats(model, tokens, masks.to(model.device), cut, piece, on_progress)
        for band, own in zip(bands, nats, strict=True):
            cost, error = mean_and_error(own - carried)
            rows.append({"cut": cut, **band, "cost": cost, "error": error})
    return rows


def band_name(row: dict[str, Any]) -> str:
    """A band in words."""
    if row["to"] is None:
        return "all channels" if row["from"] == 0 else f"{row['from']:,} and more"
    return f"below {row['to']:,}" if row["from"] == 0 else f"{row['from']:,} to {row['to'] - 1:,}"
