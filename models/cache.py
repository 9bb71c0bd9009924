"""The state of a whole model, as the `Cache` that transformers hands around.

One object serves three purposes: `generate()` carries it from token to token, training carries it from chunk to chunk, a checkpoint stores it.
Its size does not depend on how much has been read: per layer the recurrent state [batch, width] in fp32 and the last conv inputs
[batch, kernel-1, hidden].
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer


class MinRNNLayerCache(LinearAttentionLayer):
    """One layer's state. Tensors are replaced, not copied into, so a gradient may flow through them."""

    is_compileable = False  # generate() would build an attention mask for a compileable cache

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

    @property
    def recurrent(self) -> Tensor | None:
        """h after the last token, [batch, width]; None before the first."""
        return self.recurrent_states[0]

    @property
    def conv(self) -> Tensor | None:
        """Inputs of the convolution, [batch, kernel-1, hidden]; None before the first token or without a convolution."""
        return self.conv_states[0]

    def replace(self, recurrent: Tensor | None, conv: Tensor | None, num_tokens: int) -> None:
        """Set both states, after `num_tokens` more tokens."""
        self.recurrent_states[0], self.conv_states[0] = recurrent, conv
        self.is_recurrent_states_initialized[0] = self.has_previous_state[0] = recurrent is not None
        self.is_conv_states_initialized[0] = conv is not None
        self.device = None if recurrent is None else recurrent.device
        self.num_tokens += num_tokens

    def map(self, function) -> None:
        """Apply `function` to each tensor."""
        states = (None if tensor is None else function(tensor) for tensor in (self.recurrent, self.conv))
        self.replace(*states, num_tokens=0)

    def get_seq_length(self) -> int:
        return self.num_tokens

    def reset(self) -> None:
        self.replace(None, None, -self.num_tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda tensor: tensor[indices])


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

    def detach_(self) -> "MinRNNCache":
        """Cut the gradient here, in place: what is carried from chunk to chunk."""
        for layer in self.layers:
            layer.map(Tensor.detach)
        return self

    def zero_non_finite_rows_(self) -> None:
        """Begin anew, in place, in rows whose state holds NaN or infinity in any layer."""
        states = [tensor for layer in self.layers for tensor in (layer.recurrent, layer.conv) if tensor is not None]
        if not states:
            return
        broken = torch.stack([~tensor.flatten(1).isfinite().all(1) for tensor in states]).any(0)
        for layer in self.layers:
            layer.map(lambda tensor: tensor.masked_fill(broken.view(-1, *[1] * (tensor.ndim - 1)), 0))

    def state_dict(self) -> dict[str, Tensor]:
        """Contiguous CPU tensors by name, empty before the first token."""
        named = {f"layers.{i}.{kind}": getattr(layer, kind) for i, layer in enumerate(self.layers) for kind in ("recurrent", "conv")}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> "MinRNNCache":
        """The inverse of `state_dict`."""
        for i, layer in enumerate(self.layers):
            recurrent, conv = (state.get(f"layers.{i}.{kind}") for kind in ("recurrent", "conv"))
            layer.reset()
            layer.replace(*(None if tensor is None else tensor.to(device) for tensor in (recurrent, conv)), num_tokens=0)
        return self
