"""The state of a whole model, as a transformers `Cache`.

One object serves three purposes: `generate()` carries it from token to token, training carries it from chunk
to chunk, and a checkpoint stores it. Its size does not depend on the number of tokens read: per layer, the
recurrent state [batch, width] in fp32 and the last conv inputs [batch, kernel-1, hidden]; of a layer of
attention, keys and values of the window.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer


class MinRNNLayerCache(LinearAttentionLayer):
    """One layer's state. Tensors are replaced, not overwritten, so gradients can flow through them."""

    is_compileable = False  # generate() would build an attention mask for a compileable cache

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens: int | None = 0  # read so far; None if a saved state lacks it

    @property
    def recurrent(self) -> Tensor | None:
        """h after the last token, [batch, width]; None before the first, and in a layer of attention."""
        return self.recurrent_states[0]

    @property
    def conv(self) -> Tensor | None:
        """Last inputs of the convolution, [batch, kernel-1, hidden], or keys and values of the last tokens,
        [batch, window-1, 2 hidden + 1]; None for none."""
        return self.conv_states[0]

    def replace(self, recurrent: Tensor | None, conv: Tensor | None, num_tokens: int) -> None:
        """Set both states, after `num_tokens` more tokens."""
        self.recurrent_states[0], self.conv_states[0] = recurrent, conv
        first = conv if recurrent is None else recurrent
        self.is_recurrent_states_initialized[0] = recurrent is not None
        self.is_conv_states_initialized[0] = conv is not None
        self.has_previous_state[0] = first is not None
        self.device = None if first is None else first.device
        if self.num_tokens is not None:
            self.num_tokens += num_tokens

    def map(self, function) -> None:
        """Apply `function` to each tensor."""
        states = (None if tensor is None else function(tensor) for tensor in (self.recurrent, self.conv))
        self.replace(*states, num_tokens=0)

    def get_seq_length(self) -> int:
        if self.num_tokens is None:
            raise ValueError(
                "This state was saved without its number of tokens, so its position in a text is not known."
            )
        return self.num_tokens

    def reset(self) -> None:
        self.num_tokens = 0
        self.replace(None, None, num_tokens=0)

    def activate_past_recording(self) -> None:
        raise RuntimeError(
            "A recurrent state keeps no record of earlier tokens to go back to: "
            "keep a copy.deepcopy of an earlier state."
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise RuntimeError(
                f"A recurrent state cannot be cropped ({tokens_to_remove} tokens): "
                "keep a copy.deepcopy of an earlier state."
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda tensor: tensor[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))


class MinRNNCache(Cache):
    """State of all layers.

    Args:
        num_hidden_layers: Number of layers.
    """

    layers: list[MinRNNLayerCache]

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[MinRNNLayerCache() for _ in range(num_hidden_layers)])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.layers[layer_idx].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def tensors(self) -> list[Tensor]:
        """The states of all layers, in a fixed order; none before the first token."""
        states = (tensor for layer in self.layers for tensor in (layer.recurrent, layer.conv))
        return [tensor for tensor in states if tensor is not None]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "MinRNNCache":
        """Another state after the same tokens, whose tensors are `function` of this one's."""
        other = type(self)(len(self.layers))
        for new, layer in zip(other.layers, self.layers, strict=True):
            states = (
                None if tensor is None else function(tensor) for tensor in (layer.recurrent, layer.conv)
            )
            new.replace(*states, num_tokens=0)
            new.num_tokens = layer.num_tokens
        return other

    def rows(self, rows: slice) -> "MinRNNCache":
        """The state of some rows of the batch, as views."""
        return self.mapped(lambda tensor: tensor[rows])

    @classmethod
    def of_rows(cls, parts: Sequence["MinRNNCache"]) -> "MinRNNCache":
        """The inverse of `rows`: the state of the rows of all parts, in their order. All must have read as
        many tokens."""
        if len(parts) == 1:
            return parts[0]
        whole = cls(len(parts[0].layers))
        for layer, *own in zip(whole.layers, *(part.layers for part in parts), strict=True):
            kinds = ([part.recurrent for part in own], [part.conv for part in own])
            states = (None if states[0] is None else torch.cat(states) for states in kinds)
            layer.replace(*states, num_tokens=0)
            layer.num_tokens = own[0].num_tokens
        return whole

    def detach_(self) -> "MinRNNCache":
        """Detach all tensors in place, as training does between chunks."""
        for layer in self.layers:
            layer.map(Tensor.detach)
        return self

    def zero_non_finite_rows_(self) -> None:
        """Set the state to 0, in place, in rows where any layer's state holds NaN or infinity."""
        if not (states := self.tensors()):
            return
        is_broken = torch.stack([~tensor.flatten(1).isfinite().all(1) for tensor in states]).any(0)
        for layer in self.layers:
            layer.map(lambda tensor: tensor.masked_fill(is_broken.view(-1, *[1] * (tensor.ndim - 1)), 0))

    def state_dict(self) -> dict[str, Tensor]:
        """Contiguous CPU tensors by name, `num_tokens` among them; empty before the first token."""
        named = {
            f"layers.{i}.{kind}": getattr(layer, kind)
            for i, layer in enumerate(self.layers)
            for kind in ("recurrent", "conv")
        }
        state = {
            name: tensor.detach().cpu().contiguous() for name, tensor in named.items() if tensor is not None
        }
        num_tokens = self.layers[0].num_tokens
        return state | {"num_tokens": torch.tensor(num_tokens)} if state and num_tokens is not None else state

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> "MinRNNCache":
        """The inverse of `state_dict`.

        States saved without `num_tokens` load too, but generate() cannot continue them.

        Raises:
            ValueError: tensors for layers that this state does not have, or a layer without tensors.
        """
        layers = [{f"layers.{i}.recurrent", f"layers.{i}.conv"} for i in range(len(self.layers))]
        unknown = state.keys() - {"num_tokens"}.union(*layers)
        # A layer of attention has no recurrent state.
        missing = {max(layer) for layer in layers if state and not layer & state.keys()}
        if unmatched := sorted(unknown | missing):
            names = ", ".join(unmatched[:4])
            raise ValueError(
                f"The saved state is not one of {len(self.layers)} layers: "
                f"{names} is missing, or should not be there."
            )
        num_tokens = int(state["num_tokens"]) if "num_tokens" in state else None
        for i, layer in enumerate(self.layers):
            recurrent, conv = (state.get(f"layers.{i}.{kind}") for kind in ("recurrent", "conv"))
            layer.replace(
                *(None if tensor is None else tensor.to(device) for tensor in (recurrent, conv)), num_tokens=0
            )
            layer.num_tokens = num_tokens if state else 0
        return self


def check_state(state: Any, shapes: Sequence[tuple[tuple[int, ...] | None, tuple[int, ...] | None]]) -> None:
    """Refuse a state that does not belong to this model and batch.

    Args:
        state: The `past_key_values` argument.
        shapes: `MinRNNConfig.state_shapes` of the model and the batch.

    Raises:
        ValueError: another library's cache, or one of another model or batch.
    """
    # Checked by attributes, since the state may be of a remote-code copy's class.
    layers = getattr(state, "layers", [None])
    if not hasattr(state, "detach_") or not all(hasattr(layer, "recurrent") for layer in layers):
        raise ValueError(
            "past_key_values must be a MinRNNCache, or None to begin a text, "
            f"but is a {type(state).__name__}."
        )
    if len(layers) != len(shapes):
        raise ValueError(
            f"past_key_values is the state of a model of {len(layers)} layers, "
            f"but this one has {len(shapes)}."
        )
    is_empty = layers[0].recurrent is None
    for i, (layer, expected) in enumerate(zip(layers, shapes, strict=True)):
        for kind, shape in zip(("recurrent", "conv"), (None, None) if is_empty else expected, strict=True):
            tensor = getattr(layer, kind)
            actual = None if tensor is None else tuple(tensor.shape)
            if actual == shape:
                continue
            if actual and shape and actual[0] != shape[0] and actual[1:] == shape[1:]:
                raise ValueError(
                    f"past_key_values is the state of {actual[0]} rows, but the batch has {shape[0]}: "
                    "batch_select_indices and batch_repeat_interleave choose and repeat rows."
                )
            raise ValueError(
                f"past_key_values is the state of another model: {kind} of layer {i} is "
                f"{actual or 'missing'}, but should be {shape or 'none'}."
            )


# So that torch.load(weights_only=True) reads a state.
torch.serialization.add_safe_globals([MinRNNCache, MinRNNLayerCache])
