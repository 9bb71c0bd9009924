"""Scores and decoding with models of transformers, which carry no state: every request is read whole.

Rows are padded on the right, where no token of a causal model reads the padding, so a score does not depend
on the rows beside it. A text is never cut: one that is longer than the model's positions is an error.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...pipeline.families.decoding import FamilyDecoder
from ...pipeline.families.registry import max_positions
from .likelihood import NUM_LOGITS, Score, log_likelihood, make_batches


def _check_length(model: PreTrainedModel, num_tokens: int) -> None:
    if (limit := max_positions(model.config)) is not None and num_tokens > limit:
        raise ValueError(
            f"a text of {num_tokens} tokens is longer than the {limit} positions of this "
            f"{model.config.model_type}"
        )


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[tuple[list[int], list[int]]],
    size: int,
    on_progress: Callable[[int], object],
) -> list[Score]:
    """Log-likelihood of the continuation of each (context, continuation), at least one token each.

    Args:
        model: in eval mode.
        size: rows at once, fewer if they are long.
        on_progress: called with the number of rows of each batch.

    Raises:
        ValueError: a row is longer than the model's positions.
    """
    lengths = [len(context) + len(continuation) - 1 for context, continuation in rows]
    scores: list[Score] = [(0.0, True)] * len(rows)
    for batch in make_batches(range(len(rows)), lengths, size):
        _check_length(model, lengths[batch[0]])
        step = max(1, NUM_LOGITS // (model.config.get_text_config().vocab_size * lengths[batch[0]]))
        for first in range(0, len(batch), step):
            part = batch[first : first + step]
            for number, score in zip(part, _score(model, [rows[number] for number in part]), strict=True):
                scores[number] = score
            on_progress(len(part))
    return scores


def _score(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]]) -> list[Score]:
    texts = [context + continuation for context, continuation in rows]
    longest = max(map(len, texts)) - 1
    ids = torch.tensor([[*text[:-1], *[0] * (longest + 1 - len(text))] for text in texts])
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    scores = []
    for row, (context, continuation) in zip(logits, rows, strict=True):
        first = len(context) - 1
        targets = torch.tensor(continuation, device=row.device)
        values, is_greedy = log_likelihood(row[first : first + len(continuation)], targets)
        scores.append((float(values.cpu().double().sum()), bool(is_greedy.all())))
    return scores


def same_lengths(contexts: Sequence[list[int]]) -> list[list[int]]:
    """Indices of contexts, grouped by length: rows of one length need no padding."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, context in enumerate(contexts):
        groups[len(context)].append(number)
    return list(groups.values())


def decoder(
    model: PreTrainedModel, contexts: list[list[int]], max_new_tokens: int, has_cache: bool
) -> tuple[Tensor, Any]:
    """Logits of the token after contexts of one length [rows, vocab_size], and the step for further tokens.

    Args:
        has_cache: `has_exact_cache(model)`.

    Raises:
        ValueError: the text becomes longer than the model's positions.
    """
    _check_length(model, len(contexts[0]) + max_new_tokens)
    step = FamilyDecoder(model, torch.tensor(contexts), has_cache)
    return step.logits, step
