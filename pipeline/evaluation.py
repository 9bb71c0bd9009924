"""Validation: held-out documents from their first byte to their last, the state carried as in training."""

import math

import torch
from accelerate import Accelerator
from torch import nn

from ..data import CorpusSpec, Encoder, UserError, ValidationSet, document_validation, joined_tokens, window_validation
from ..data.corpus import Split
from .config import Recipe
from .processes import to_device, total


def validation_sets(recipe: Recipe, corpus: CorpusSpec, encoder: Encoder, readers: range) -> list[ValidationSet]:
    """The shares of these readers.

    Raises:
        UserError: no such corpus, or nothing in it; under data.validation if that was named.
    """
    data = recipe.data
    if data.validation is None:
        return _sets(recipe, corpus, "validation", encoder, readers)
    spec = CorpusSpec(data.validation, None, data.validation_split, None, data.text_field, data.skip_broken)
    try:
        return _sets(recipe, spec, "all", encoder, readers)
    except UserError as error:
        raise UserError(*(("data.validation", message) for _, message in error.problems)) from None


def _sets(recipe: Recipe, spec: CorpusSpec, part: Split, encoder: Encoder, readers: range) -> list[ValidationSet]:
    data, batch = recipe.data, recipe.batch
    layout = (batch.readers, batch.lanes, batch.chunk, data.validation_tokens)
    if data.order == "windows":
        tokens = joined_tokens(spec, part, encoder)
        return [window_validation(tokens, encoder, reader, *layout) for reader in readers]
    return [document_validation(spec, part, encoder, reader, *layout) for reader in readers]


@torch.no_grad()
def validate(model: nn.Module, sets: list[ValidationSet], accelerator: Accelerator, carry_state: bool) -> dict[str, float]:
    """Mean loss in nats per token and bits per byte over all documents of all processes' sets, and their tokens."""
    model.eval()
    nats, tokens = 0.0, 0
    for part in sets:
        cache = None
        for chunk in part.chunks():
            num_running = chunk.input_ids.shape[0]
            if cache is not None:
                cache.batch_select_indices(slice(0, num_running))
            output = model(
                input_ids=to_device(chunk.input_ids, accelerator),
                shift_labels=to_device(chunk.shift_labels, accelerator),
                document_starts=to_device(chunk.document_starts, accelerator),
                past_key_values=cache,
                use_cache=carry_state,
                skip_logits=True,
                num_items_in_batch=1,
            )
            cache = output.past_key_values
            nats += float(output.loss)
            tokens += chunk.num_scored
    model.train()
    nats, tokens, num_bytes = total(accelerator, [nats, tokens, sum(part.num_bytes for part in sets)])
    return {"loss": nats / tokens, "bits_per_byte": nats / (num_bytes * math.log(2)), "validation_tokens": int(tokens)}
