"""Validation: held-out documents from their first byte to their last, the state carried as in training."""

import math
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from torch import nn

from ..data import CorpusSpec, Encoder, UserError, ValidationSet, document_validation, joined_tokens, window_validation
from ..data.corpus import Split
from .config import Recipe
from .processes import Layout, largest, to_device, total


def validation_sets(recipe: Recipe, corpus: CorpusSpec, encoder: Encoder, readers: Iterable[int]) -> list[ValidationSet]:
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


def _sets(recipe: Recipe, spec: CorpusSpec, part: Split, encoder: Encoder, readers: Iterable[int]) -> list[ValidationSet]:
    data, batch = recipe.data, recipe.batch
    layout = (batch.readers, batch.lanes, batch.chunk, data.validation_tokens)
    if data.order == "windows":
        tokens = joined_tokens(spec, part, encoder)
        return [window_validation(tokens, encoder, reader, *layout) for reader in readers]
    return [document_validation(spec, part, encoder, reader, *layout) for reader in readers]


@torch.no_grad()
def validate(
    model: nn.Module,
    sets: list[ValidationSet],
    accelerator: Accelerator,
    carry_state: bool,
    layout: Layout | None = None,
    in_lockstep: bool = False,
    moved: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss in nats per token and bits per byte over all documents of all processes' sets, and their tokens.

    Args:
        layout: where processes share sequences.
        in_lockstep: a forward pass needs all processes, so those that have read all their documents go on in vain until all have.
        moved: called after each chunk.
    """
    layout = layout or Layout()
    model.eval()
    nats, tokens = 0.0, 0
    for part in sets:
        cache = None
        for chunk in part.chunks():
            if cache is not None:
                cache.batch_select_indices(slice(0, chunk.input_ids.shape[0]))
            piece = layout.piece(chunk)
            output = model(
                input_ids=to_device(piece.input_ids, accelerator),
                shift_labels=to_device(piece.shift_labels, accelerator),
                document_starts=to_device(piece.document_starts, accelerator),
                past_key_values=cache,
                use_cache=carry_state,
                skip_logits=True,
                num_items_in_batch=1,
            )
            cache = output.past_key_values
            nats += float(output.loss)
            tokens += piece.num_scored
            moved()
    if in_lockstep:
        num_chunks = sum(1 for part in sets for _ in part.chunks())
        empty = torch.zeros(1, 64, dtype=torch.long, device=accelerator.device)
        for _ in range(largest(accelerator, num_chunks) - num_chunks):
            model(input_ids=empty, shift_labels=empty, skip_logits=True, num_items_in_batch=1)
            moved()
    model.train()
    num_bytes = sum(part.num_bytes for part in sets) / layout.context
    nats, tokens, num_bytes = total(accelerator, [nats, tokens, num_bytes])
    return {"loss": nats / tokens, "bits_per_byte": nats / (num_bytes * math.log(2)), "validation_tokens": int(tokens)}
