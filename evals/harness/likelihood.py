"""Log-likelihoods of continuations under a recurrent model, on tokens.

    contexts -> read_contexts -> logits and state of each context -> select_rows -> score -> log-likelihood of each continuation

What contexts have in common is read once: equal contexts are the caller's to merge, and where many begin alike (the same examples before every
question) the state behind that beginning is handed on. Rows of unlike lengths are padded on the left, so that all end in the same column.
Texts of any length go through in pieces, so memory does not grow with them.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...models import MinRNNCache, MinRNNForCausalLM
from ...models.modeling_minrnn import PREFILL

Score = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would have written the same
NUM_LOGITS = 2**24  # held at once


def left_padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask (1: real), both int64 [batch, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.long, device=device
    )
    return ids, mask


def select_rows(cache: MinRNNCache, rows: list[int]) -> MinRNNCache:
    """A cache of its own with these rows of another, repeated where they are named again."""
    selected = MinRNNCache(len(cache.layers))
    for layer, old in zip(selected.layers, cache.layers, strict=True):
        layer.replace(
            *(None if tensor is None else tensor[rows] for tensor in (old.recurrent, old.conv)),
            num_tokens=old.get_seq_length(),
        )
    return selected


@torch.no_grad()
def read(
    model: MinRNNForCausalLM,
    rows: Sequence[list[int]],
    cache: MinRNNCache | None = None,
    piece: int = PREFILL,
) -> tuple[Tensor, MinRNNCache]:
    """`decoding.prefill` for rows of any lengths.

    Args:
        model: In eval mode.
        rows: [batch] of at least one token each.
        cache: State to go on from, of as many rows; updated in place.
        piece: Tokens read at once, over all rows.

    Returns:
        Logits of the token after each row [batch, vocab_size], and the state.
    """
    cache, logits = MinRNNCache(model.config.num_hidden_layers) if cache is None else cache, None
    ids, mask = left_padded(rows, model.device)
    step = max(1, piece // len(rows))
    for part, real in zip(ids.split(step, 1), mask.split(step, 1), strict=True):
        logits = model(
            input_ids=part, attention_mask=real, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
    assert logits is not None
    return logits[:, -1], cache


def _log_likelihood(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each target [...] under logits [..., vocab_size]: its log-likelihood, in fp32 or better, and whether it is the likeliest."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1), logits.argmax(-1) == targets


@torch.no_grad()
def score(
    model: MinRNNForCausalLM,
    logits: Tensor,
    cache: MinRNNCache,
    rows: Sequence[list[int]],
    piece: int = PREFILL,
) -> list[Score]:
    """Log-likelihood of continuations.

    Args:
        model: In eval mode.
        logits: Of each row's first token, [batch, vocab_size].
        cache: The state before the continuations; updated in place.
        rows: [batch] of at least one token each.
        piece: Tokens read at once, over all rows.
    """
    value, is_greedy = _log_likelihood(logits, torch.tensor([row[0] for row in rows], device=logits.device))
    total = value.cpu().numpy().astype(np.float64)  # not on the device, which may have no fp64
    if max(len(row) for row in rows) > 1:
        ids, mask = left_padded([row[:-1] for row in rows], model.device)
        targets, _ = left_padded([row[1:] for row in rows], model.device)
        step = max(1, min(piece, NUM_LOGITS // logits.shape[-1]) // len(rows))
        for part, real, after in zip(
            ids.split(step, 1), mask.split(step, 1), targets.split(step, 1), strict=True
        ):
            output = model(input_ids=part, attention_mask=real, past_key_values=cache, use_cache=True).logits
            values, likeliest = _log_likelihood(output, after)
            total += values.masked_fill(real == 0, 0).cpu().numpy().sum(1, dtype=np.float64)
            is_greedy &= (likeliest | (real == 0)).all(1)
    return list(zip(total.tolist(), is_greedy.tolist(), strict=True))


def batches(numbers: Sequence[int], lengths: Sequence[int] | dict[int, int], size: int) -> list[list[int]]:
    """Numbers in batches of like length, the longest first."""
    ordered = sorted(numbers, key=lambda number: -lengths[number])
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _common(one: list[int], other: list[int]) -> int:
    """Tokens until the two differ, or one ends."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def by_prefix(contexts: Sequence[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Numbers of the contexts by a beginning that two or more share, if it is at least half of each; those that share none by ().

    Every context goes on behind its beginning, by a token at least.
    """
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    members: list[int] = []
    shared: list[int] = []
    longest = 0
    for number in sorted(range(len(contexts)), key=contexts.__getitem__):
        context = contexts[number]
        common = _common(shared, context[:-1])
        if not common or 2 * common < max(longest, len(context)):
            found[tuple(shared) if len(members) > 1 else ()] += members
            members, shared, longest, common = [], context, 0, len(context) - 1
        members, shared, longest = [*members, number], shared[:common], max(longest, len(context))
    found[tuple(shared) if len(members) > 1 else ()] += members
    return {prefix: numbers for prefix, numbers in found.items() if numbers}


def read_contexts(
    model: MinRNNForCausalLM, contexts: Sequence[list[int]], size: int, piece: int = PREFILL
) -> Iterator[tuple[list[int], Tensor, MinRNNCache]]:
    """Read contexts of at least one token each, `size` rows at once.

    Yields:
        Numbers of some contexts, and for each a row of logits of the token after it [rows, vocab_size] and of the state.
    """
    families = by_prefix(contexts)
    for batch in batches(families.pop((), []), [len(context) for context in contexts], size):
        yield batch, *read(model, [contexts[number] for number in batch], None, piece)
    prefixes = [list(prefix) for prefix in families]
    for family in batches(range(len(prefixes)), [len(prefix) for prefix in prefixes], size):
        _, shared = read(model, [prefixes[number] for number in family], None, piece)
        row_of = {
            number: row for row, prefix in enumerate(family) for number in families[tuple(prefixes[prefix])]
        }
        rest = {number: contexts[number][len(prefixes[family[row]]) :] for number, row in row_of.items()}
        for batch in batches(list(row_of), {number: len(tokens) for number, tokens in rest.items()}, size):
            cache = select_rows(shared, [row_of[number] for number in batch])
            yield batch, *read(model, [rest[number] for number in batch], cache, piece)
