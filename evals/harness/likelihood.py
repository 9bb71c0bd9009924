"""Log-likelihoods of continuations under a recurrent model, on tokens.

    contexts -> read_contexts -> logits and state of each context -> select_rows
      -> score_continuations -> log-likelihood of each continuation

A shared prefix is read once: if many contexts begin alike (the same examples before every question), the
state after that prefix is reused. (Merging equal contexts is up to the caller.) Rows of different lengths are
padded on the left, so all end in the same column. Texts of any length are read in pieces, so memory does not
grow with the length.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...models import MinRNNCache, MinRNNForCausalLM
from ...models.modeling_minrnn import PREFILL

Score = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would give the same tokens
NUM_LOGITS = 2**24  # in memory at once


def pad_left(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask (1: token, 0: padding), both int64 [batch, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.long, device=device
    )
    return ids, mask


def select_rows(cache: MinRNNCache, rows: list[int]) -> MinRNNCache:
    """A new cache with these rows of another cache; rows may repeat."""
    selected = MinRNNCache(len(cache.layers))
    for layer, old in zip(selected.layers, cache.layers, strict=True):
        layer.replace(
            *(None if tensor is None else tensor[rows] for tensor in (old.recurrent, old.conv)),
            num_tokens=old.get_seq_length(),
        )
    return selected


@torch.no_grad()
def read_rows(
    model: MinRNNForCausalLM,
    rows: Sequence[list[int]],
    cache: MinRNNCache | None = None,
    piece: int = PREFILL,
) -> tuple[Tensor, MinRNNCache]:
    """`decoding.prefill` for rows of different lengths.

    Args:
        model: in eval mode.
        rows: [batch] of at least one token each.
        cache: state of as many rows to start from; updated in place.
        piece: tokens read at once, over all rows.

    Returns:
        Logits of the token after each row [batch, vocab_size], and the state.
    """
    cache, logits = MinRNNCache(model.config.num_hidden_layers) if cache is None else cache, None
    ids, mask = pad_left(rows, model.device)
    step = max(1, piece // len(rows))
    for part, part_mask in zip(ids.split(step, 1), mask.split(step, 1), strict=True):
        logits = model(
            input_ids=part, attention_mask=part_mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
    assert logits is not None
    return logits[:, -1], cache


def log_likelihood(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood in fp32 or better of targets [...] under logits [..., vocab_size], and whether each is
    the argmax.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1), logits.argmax(-1) == targets


@torch.no_grad()
def score_continuations(
    model: MinRNNForCausalLM,
    logits: Tensor,
    cache: MinRNNCache,
    rows: Sequence[list[int]],
    piece: int = PREFILL,
) -> list[Score]:
    """Log-likelihoods of continuations.

    Args:
        model: in eval mode.
        logits: of each row's first token, [batch, vocab_size].
        cache: the state before the continuations; updated in place.
        rows: [batch] of at least one token each.
        piece: tokens read at once, over all rows.
    """
    value, is_greedy = log_likelihood(logits, torch.tensor([row[0] for row in rows], device=logits.device))
    total = value.cpu().numpy().astype(np.float64)  # on the CPU, since the device may not support fp64
    if max(len(row) for row in rows) > 1:
        ids, mask = pad_left([row[:-1] for row in rows], model.device)
        targets, _ = pad_left([row[1:] for row in rows], model.device)
        step = max(1, min(piece, NUM_LOGITS // logits.shape[-1]) // len(rows))
        pieces = zip(ids.split(step, 1), mask.split(step, 1), targets.split(step, 1), strict=True)
        for part, part_mask, part_targets in pieces:
            output = model(
                input_ids=part, attention_mask=part_mask, past_key_values=cache, use_cache=True
            ).logits
            values, is_argmax = log_likelihood(output, part_targets)
            total += values.masked_fill(part_mask == 0, 0).cpu().numpy().sum(1, dtype=np.float64)
            is_greedy &= (is_argmax | (part_mask == 0)).all(1)
    return list(zip(total.tolist(), is_greedy.tolist(), strict=True))


def make_batches(
    numbers: Sequence[int], lengths: Sequence[int] | dict[int, int], size: int
) -> list[list[int]]:
    """Split numbers into batches of similar length, the longest first."""
    ordered = sorted(numbers, key=lambda number: -lengths[number])
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _common_prefix_length(one: list[int], other: list[int]) -> int:
    """Number of tokens before the two differ or one ends."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def group_by_prefix(contexts: Sequence[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """Indices of contexts, grouped by a prefix that two or more share, if it is at least half of each; the
    others under ().

    Every context has at least one token after its prefix.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    members: list[int] = []
    shared: list[int] = []
    longest = 0
    for number in sorted(range(len(contexts)), key=contexts.__getitem__):
        context = contexts[number]
        common = _common_prefix_length(shared, context[:-1])
        if not common or 2 * common < max(longest, len(context)):
            groups[tuple(shared) if len(members) > 1 else ()] += members
            members, shared, longest, common = [], context, 0, len(context) - 1
        members, shared, longest = [*members, number], shared[:common], max(longest, len(context))
    groups[tuple(shared) if len(members) > 1 else ()] += members
    return {prefix: numbers for prefix, numbers in groups.items() if numbers}


def read_contexts(
    model: MinRNNForCausalLM, contexts: Sequence[list[int]], size: int, piece: int = PREFILL
) -> Iterator[tuple[list[int], Tensor, MinRNNCache]]:
    """Read contexts of at least one token each, `size` rows at a time.

    Yields:
        Indices of some contexts, the logits of the token after each [rows, vocab_size], and their states.
    """
    groups = group_by_prefix(contexts)
    for batch in make_batches(groups.pop((), []), [len(context) for context in contexts], size):
        yield batch, *read_rows(model, [contexts[number] for number in batch], None, piece)
    prefixes = [list(prefix) for prefix in groups]
    for group in make_batches(range(len(prefixes)), [len(prefix) for prefix in prefixes], size):
        _, shared = read_rows(model, [prefixes[number] for number in group], None, piece)
        row_of = {
            number: row for row, prefix in enumerate(group) for number in groups[tuple(prefixes[prefix])]
        }
        suffixes = {number: contexts[number][len(prefixes[group[row]]) :] for number, row in row_of.items()}
        lengths = {number: len(tokens) for number, tokens in suffixes.items()}
        for batch in make_batches(list(row_of), lengths, size):
            cache = select_rows(shared, [row_of[number] for number in batch])
            yield batch, *read_rows(model, [suffixes[number] for number in batch], cache, piece)
