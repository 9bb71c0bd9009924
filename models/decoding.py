"""Decoding in a loop of your own: read a prompt into a state, then one token at a time.

    logits, cache = prefill(model, input_ids)    in pieces, so that memory does not grow with the prompt
    step = TokenStep(model, cache)
    logits = step(tokens)                        [batch] -> [batch, vocab_size], again and again

Each token reads the weights and the state once. `generate()` does the same with more overhead per token. On a
GPU a step is one CUDA graph: it replays some hundred small kernels, whose separate launches would take longer
than their work.
"""

import torch
from torch import Tensor

from .boundaries import NO_BOUNDARIES
from .cache import MinRNNCache
from .mixer import State
from .modeling_minrnn import PREFILL, MinRNNForCausalLM


@torch.no_grad()
def prefill(
    model: MinRNNForCausalLM, input_ids: Tensor, cache: MinRNNCache | None = None, piece: int = PREFILL
) -> tuple[Tensor, MinRNNCache]:
    """Read a prompt.

    Args:
        model: In eval mode.
        input_ids: [batch, time], at least one token, on any device (a long prompt may stay on the CPU).
        cache: State to continue from; updated in place.
        piece: Tokens read at once.

    Returns:
        Logits of the token after the prompt [batch, vocab_size], and the state.

    Raises:
        ValueError: no tokens, or a piece of no tokens.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0 or piece < 1:
        shape = tuple(input_ids.shape)
        raise ValueError(
            "prefill takes input_ids [batch, time] and a piece of at least 1 token each, "
            f"but got {shape}, {piece}."
        )
    cache = MinRNNCache(model.config.num_hidden_layers) if cache is None else cache
    logits = None
    for ids in input_ids.split(piece, dim=1):
        logits = model(
            input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
    assert logits is not None
    return logits[:, -1], cache


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


class TokenStep:
    """One token through the model.

    The state is held in tensors of fixed addresses, as a CUDA graph needs; `cache` returns a copy.

    Args:
        model: In eval mode.
        cache: The state after the prompt (`prefill`); it is copied.
        graph: Replay a CUDA graph; by default if the whole model is on one GPU.

    Raises:
        ValueError: a cache that has read nothing, or a graph of a model that is not on one GPU.
    """

    def __init__(self, model: MinRNNForCausalLM, cache: MinRNNCache, graph: bool | None = None):
        if cache.layers[0].recurrent is None:
            raise ValueError(
                "TokenStep goes on from a prompt, but this cache has read none: call prefill first."
            )
        devices = {parameter.device for parameter in model.parameters()}
        is_on_one_gpu = len(devices) == 1 and model.device.type == "cuda"
        if graph and not is_on_one_gpu:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"A CUDA graph needs a model on one GPU, but this one is on {names}: use graph=False or none."
            )
        self.model, self.num_tokens = model, cache.get_seq_length()
        self.states: list[State] = [(_clone(layer.recurrent), _clone(layer.conv)) for layer in cache.layers]
        recurrent = self.states[0][0]
        assert recurrent is not None
        self.tokens = torch.zeros(len(recurrent), 1, dtype=torch.long, device=model.device)
        self.graph = self.logits = None
        if is_on_one_gpu if graph is None else graph:
            self._capture()

    @property
    def cache(self) -> MinRNNCache:
        """A copy of the state after the last token."""
        cache = MinRNNCache(len(self.states))
        for layer, (recurrent, conv) in zip(cache.layers, self.states, strict=True):
            layer.replace(_clone(recurrent), _clone(conv), num_tokens=self.num_tokens)
        return cache

    @torch.no_grad()
    def _forward(self) -> Tensor:
        """The logits of `self.tokens`; overwrites the states."""
        model = self.model.model
        x, states = model.run_layers(model.embed_tokens(self.tokens), self.states, NO_BOUNDARIES)
        for state, after in zip(self.states, states, strict=True):
            for old, new in zip(state, after, strict=True):
                if old is not None and new is not None:
                    old.copy_(new)
        return self.model.logits(model.norm(x))[:, -1]

    def _capture(self) -> None:
        """Record `_forward` on the model's device, which need not be the current one."""
        before = [(_clone(recurrent), _clone(conv)) for recurrent, conv in self.states]
        with torch.cuda.device(self.tokens.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # warm up: libraries allocate on their first calls, a graph may not
                    self._forward()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Not torch.cuda.graph's default stream, which stays on the device of the process's first graph.
            with torch.cuda.graph(self.graph, stream=stream):
                self.logits = self._forward()
        for state, saved in zip(self.states, before, strict=True):
            for tensor, value in zip(state, saved, strict=True):
                if tensor is not None and value is not None:
                    tensor.copy_(value)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The next token of each row, int64 [batch] -> logits of the token after it, [batch, vocab_size].

        With a graph, the next call overwrites the logits.
        """
        self.tokens.copy_(tokens.view_as(self.tokens))
        self.num_tokens += 1
        if self.graph is None:
            return self._forward()
        with torch.cuda.device(self.tokens.device):
            self.graph.replay()
        assert self.logits is not None
        return self.logits
