"""One token after another with a model of transformers, whatever it calls its cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .limits import tolerance

CACHES = ("past_key_values", "cache_params", "state")  # attention; Mamba and xLSTM; RWKV


def suppress(model: Any, logits: Tensor) -> Tensor:
    """The logits [..., vocabulary] with -inf for the tokens that the model's generation configuration
    suppresses: the padding of its vocabulary, if the model does not mask it itself."""
    suppressed = getattr(getattr(model, "generation_config", None), "suppress_tokens", None)
    if not suppressed:
        return logits
    return logits.index_fill(-1, torch.tensor(suppressed, device=logits.device), -torch.inf)


class FamilyDecoder:
    """The counterpart of `decoding.prefill` and `decoding.TokenStep`.

    Tokens that the model's generation configuration suppresses (the padding of the vocabulary) have the logit
    -inf, as in `generate()`.

    A model whose cache does not give the logits of reading the whole text (`has_exact_cache`) reads the whole
    text again for every token.

    Args:
        model: in eval mode.
        input_ids: [batch, time], rows of equal length, at least one token.
        has_cache: `has_exact_cache(model)`, if it is known; None to measure it.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, has_cache: bool | None = None):
        self.model, self.text = model, input_ids.to(model.device)
        has_cache = has_exact_cache(model) if has_cache is None else has_cache
        self.cache: dict[str, Any] | None = {} if has_cache else None
        self.logits = self._read(self.text)
        """Logits of the token after the last, [batch, vocab_size]."""

    @torch.no_grad()
    def _read(self, ids: Tensor) -> Tensor:
        if self.cache is None:
            logits = self.model(input_ids=self.text, use_cache=False).logits[:, -1]
        else:
            logits, self.cache = _read_with_cache(self.model, ids, self.cache)
        return suppress(self.model, logits)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The next token of each row, int64 [batch] -> logits of the token after it, [batch, vocab_size]."""
        self.text = torch.cat([self.text, tokens.unsqueeze(1)], 1)
        self.logits = self._read(tokens.unsqueeze(1))
        return self.logits


def _read_with_cache(
    model: PreTrainedModel, ids: Tensor, cache: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    output: Any = model(input_ids=ids, use_cache=True, **cache)
    return output.logits[:, -1], {name: output[name] for name in CACHES if output.get(name) is not None}


@torch.no_grad()
def has_exact_cache(model: PreTrainedModel) -> bool:
    """Whether two steps from the model's cache give the logits of reading the whole text, measured.

    In transformers 5.23, RecurrentGemma returns no cache, and RWKV's gives other logits. `model` is in eval
    mode.
    """
    draw = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab_size, (1, 8), generator=draw).to(model.device)
    cache: dict[str, Any] = {}
    try:
        whole = logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        for first, last in ((0, 6), (6, 7), (7, 8)):
            logits, cache = _read_with_cache(model, ids[:, first:last], cache)
            if not cache:
                return False
    except Exception:  # not every model can be called like this
        return False
    return bool((logits.float() - whole).abs().max() <= tolerance(model) * whole.abs().max())
