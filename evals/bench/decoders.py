"""Decoders: how each family reads a context and continues it token by token.

    read(tokens)        [batch, time]; advances the state; its cost is the prefill
    set_fake_state(n)   a state as after n tokens; does something only if the cost depends on n (attention)
    step(token)         [batch, 1] -> the most likely next token [batch, 1]; advances the state

A recurrent state has a constant size and cost, whatever was read. Keys and values grow with the context, but
the cost of a step depends only on their number, not on their content: Llama decodes from random ones.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import StaticCache

from ...models.cache import MinRNNCache
from ...pipeline.families.registry import TORCH_RNNS
from ..memory import available_bytes, tensor_bytes
from ..output import si
from .measure import Unavailable


class Decoder:
    """Decodes with a recurrent language model.

    Args:
        model: in evaluation mode.
        forward: (tokens, state) -> (logits of at least the last position, state); the initial state is None.
        tensors: returns the tensors of a state.
        with_tensors: returns the state with these tensors; None if steps update the tensors in place.
    """

    def __init__(
        self,
        model: Any,
        forward: Callable[[Tensor, Any], tuple[Tensor, Any]],
        tensors: Callable[[Any], list[Tensor]],
        with_tensors: Callable[[Any, list[Tensor]], Any] | None = None,
    ):
        self.model = model
        self.state: Any = None
        self._forward, self._tensors, self._with_tensors = forward, tensors, with_tensors

    def read(self, tokens: Tensor) -> None:
        """Advance the state by these tokens."""
        _, self.state = self._forward(tokens, self.state)

    def reset(self) -> None:
        """Return to the initial state."""
        self.state = None

    def set_fake_state(self, context: int) -> None:
        """Nothing to do for a recurrent state: its cost does not depend on the context."""

    def rewind(self) -> None:
        """Called before each turn; nothing to do for a recurrent state, which may advance without limit."""

    def step(self, token: Tensor) -> Tensor:
        """Advance by one token; returns the most likely next one."""
        logits, self.state = self._forward(token, self.state)
        return logits[:, -1:].argmax(-1)

    def state_tensors(self) -> list[Tensor]:
        """All tensors that are kept between two tokens."""
        return self._tensors(self.state)

    def set_state_tensors(self, tensors: list[Tensor]) -> None:
        """Replace the tensors of the state by these."""
        if self._with_tensors is not None:
            self.state = self._with_tensors(self.state, tensors)

    def state_bytes(self) -> int:
        """Size of the state."""
        return tensor_bytes(self.state_tensors())


class LlamaDecoder(Decoder):
    """Decodes with attention over a preallocated cache, transformers' StaticCache.

    Appending would copy all keys and values at every step.
    """

    def __init__(self, model: Any, batch: int, max_steps: int):
        super().__init__(model, lambda tokens, state: (tokens, state), lambda state: [])
        self.batch, self.max_steps, self.context = batch, max_steps, 0

    def read(self, tokens: Tensor) -> None:
        """Read the whole context in one causal pass that keeps keys and values: the fastest way."""
        self.state = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values

    def set_fake_state(self, context: int) -> None:
        """Set random keys and values for `context` tokens, with room for the turns."""
        config, weight = self.model.config, self.model.get_input_embeddings().weight
        self.reset()
        per_layer = self.batch * (context + self.max_steps) * config.hidden_size * weight.element_size()
        needed = 2 * config.num_hidden_layers * per_layer
        free = available_bytes(weight.device)
        if needed > 0.8 * free:
            raise Unavailable(
                f"keys and values of {context:,} tokens need {si(needed, 'B')} of memory, {si(free, 'B')} "
                "are free"
            )
        self.context = context
        self.state = StaticCache(config=config, max_cache_len=context + self.max_steps)
        heads, head_size = config.num_key_value_heads, config.head_dim
        self.state.early_initialization(self.batch, heads, head_size, weight.dtype, weight.device)
        for layer in self.state.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.rewind()

    def rewind(self) -> None:
        """Return to the end of the context, so that every turn sees the same length."""
        if self.state is not None:
            for layer in self.state.layers:
                layer.cumulative_length.fill_(self.context)

    def step(self, token: Tensor) -> Tensor:
        return (
            self.model(input_ids=token, past_key_values=self.state, use_cache=True).logits[:, -1:].argmax(-1)
        )

    def state_tensors(self) -> list[Tensor]:
        return [tensor for layer in self.state.layers for tensor in (layer.keys, layer.values)]


def make_decoder(family: str, model: Any, batch: int, max_steps: int) -> Decoder:
    """The decoder for a family's model."""
    if family == "llama":
        return LlamaDecoder(model, batch, max_steps)
    if family.startswith("minrnn") or family in TORCH_RNNS:
        return Decoder(model, _minrnn_forward(model), _minrnn_tensors, _minrnn_with_tensors)
    if family == "minGRU-pytorch":

        def forward(tokens: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
            return model(tokens, return_prev_hiddens=True, prev_hiddens=state)

        return Decoder(model, forward, list, lambda state, tensors: tensors)
    if family == "xlstm":
        return Decoder(
            model,
            _cache_params_forward(model),
            lambda state: [t for states in state.rnn_state.values() for t in states],
        )
    return Decoder(model, _cache_params_forward(model), _mamba_tensors)


def _minrnn_forward(model: Any) -> Callable[[Tensor, MinRNNCache | None], tuple[Tensor, MinRNNCache]]:
    def forward(tokens: Tensor, state: MinRNNCache | None) -> tuple[Tensor, MinRNNCache]:
        output = model(input_ids=tokens, past_key_values=state, use_cache=True, logits_to_keep=1)
        return output.logits, output.past_key_values

    return forward


def _minrnn_tensors(state: MinRNNCache) -> list[Tensor]:
    return [
        tensor for layer in state.layers for tensor in (layer.recurrent, layer.conv) if tensor is not None
    ]


def _minrnn_with_tensors(state: MinRNNCache, tensors: list[Tensor]) -> MinRNNCache:
    tensors = tensors.copy()
    for layer in state.layers:
        states = (None if old is None else tensors.pop(0) for old in (layer.recurrent, layer.conv))
        layer.replace(*states, num_tokens=0)
    return state


def _cache_params_forward(model: Any) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """The forward function of transformers' Mamba, Mamba-2 and xLSTM."""

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = model(input_ids=tokens, cache_params=state, use_cache=True)
        return output.logits, output.cache_params

    return forward


def _mamba_tensors(state: Any) -> list[Tensor]:
    return [states[0] for layer in state.layers for states in (layer.conv_states, layer.recurrent_states)]
