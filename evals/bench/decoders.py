"""How each family reads a context and goes on after it, token by token.

    read(tokens)    [batch, time]; the state goes on through them        what this costs is the prefill
    pretend(n)      a state as after n tokens, without reading them      only where its cost depends on n: attention
    step(token)     [batch, 1] -> the likeliest next token [batch, 1]    the state moves on

A recurrent state has one size and one cost, whatever was read. Keys and values grow with the context, but the cost of a step depends on their
number alone, not on what they hold: Llama decodes from random ones.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import StaticCache

from ...models.cache import MinRNNCache
from ..memory import available_bytes, tensor_bytes
from ..output import si
from .measure import Unavailable


class Decoder:
    """A recurrent language model.

    Args:
        model: in evaluation mode.
        forward: (tokens, state) -> (logits of the last position at least, state); the state of no tokens is None.
        tensors: of a state, its tensors.
        with_tensors: the state that has these tensors; None where steps write into the tensors that are there.
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
        """Go on through these tokens."""
        _, self.state = self._forward(tokens, self.state)

    def forget(self) -> None:
        """Back to the state of no tokens."""
        self.state = None

    def pretend(self, context: int) -> None:
        """Any state will do: its cost does not depend on the context."""

    def rewind(self) -> None:
        """Before each turn: nothing to do, a recurrent state may run on for ever."""

    def step(self, token: Tensor) -> Tensor:
        """One token further."""
        logits, self.state = self._forward(token, self.state)
        return logits[:, -1:].argmax(-1)

    def state_tensors(self) -> list[Tensor]:
        """All that has to be kept between two tokens."""
        return self._tensors(self.state)

    def put(self, tensors: list[Tensor]) -> None:
        """Make these tensors the state's own."""
        if self._with_tensors is not None:
            self.state = self._with_tensors(self.state, tensors)

    def state_bytes(self) -> int:
        """Their size."""
        return tensor_bytes(self.state_tensors())


class LlamaDecoder(Decoder):
    """Attention over a preallocated cache (appending would copy all keys and values at every step), as transformers' StaticCache."""

    def __init__(self, model: Any, batch: int, max_steps: int):
        super().__init__(model, lambda tokens, state: (tokens, state), lambda state: [])
        self.batch, self.max_steps, self.context = batch, max_steps, 0

    def read(self, tokens: Tensor) -> None:
        """The whole context in one causal pass, keys and values kept: the fastest way to read it."""
        self.state = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values

    def pretend(self, context: int) -> None:
        """Random keys and values for `context` tokens, and room for the turns."""
        config, weight = self.model.config, self.model.get_input_embeddings().weight
        self.forget()
        needed = (
            2
            * config.num_hidden_layers
            * self.batch
            * (context + self.max_steps)
            * config.hidden_size
            * weight.element_size()
        )
        free = available_bytes(weight.device)
        if needed > 0.8 * free:
            raise Unavailable(
                f"keys and values of {context:,} tokens need {si(needed, 'B')} of memory, {si(free, 'B')} are free"
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
        """Back to the end of the context, so that no turn sees more than another."""
        if self.state is not None:
            for layer in self.state.layers:
                layer.cumulative_length.fill_(self.context)

    def step(self, token: Tensor) -> Tensor:
        return (
            self.model(input_ids=token, past_key_values=self.state, use_cache=True).logits[:, -1:].argmax(-1)
        )

    def state_tensors(self) -> list[Tensor]:
        return [tensor for layer in self.state.layers for tensor in (layer.keys, layer.values)]


def decoder_of(family: str, model: Any, batch: int, max_steps: int) -> Decoder:
    """The decoder of a family's model."""
    if family == "llama":
        return LlamaDecoder(model, batch, max_steps)
    if family.startswith("minrnn"):
        return Decoder(model, _minrnn_forward(model), _minrnn_tensors, _minrnn_with_tensors)
    if family == "gru":
        return Decoder(model, model, lambda state: [state], lambda state, tensors: tensors[0])
    if family == "lstm":
        return Decoder(model, model, list, lambda state, tensors: tuple(tensors))
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
    for i, layer in enumerate(state.layers):
        layer.replace(tensors[2 * i], tensors[2 * i + 1], num_tokens=0)
    return state


def _cache_params_forward(model: Any) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """Mamba, Mamba-2 and xLSTM of transformers."""

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = model(input_ids=tokens, cache_params=state, use_cache=True)
        return output.logits, output.cache_params

    return forward


def _mamba_tensors(state: Any) -> list[Tensor]:
    return [states[0] for layer in state.layers for states in (layer.conv_states, layer.recurrent_states)]
