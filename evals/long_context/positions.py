"""Loss at each position of a long document, with the state carried or reset, and how far back a model looks.

    tokens <bos> t1 .. tn -> token_nats -> nats [rows, n]
      -> bucket_losses (mean, error, bits per byte; paired difference carried minus cut)
      -> memory_curve (the loss of the same targets after different numbers of tokens)

The document is read in pieces, so memory does not grow with its length; one number per token is kept. A cut
is a document start within the document: neither the scan nor the convolution sees anything before it, as in a
separate window.

Neighbouring tokens are correlated (a page is hard or easy as a whole), so standard errors are those of the
means of blocks of BLOCK tokens. Comparisons are made token by token, since the difference varies less with
the text than the losses.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import Encoder
from ...models import MinRNNCache, MinRNNForCausalLM
from ...models.dtypes import at_least_fp32
from ..harness.likelihood import NUM_LOGITS

BLOCK = 512  # tokens whose mean is one observation
MIN_BLOCKS = 4  # no standard error from fewer
FIRST_BUCKET = 64  # positions of the first bucket; each further bucket doubles the position
NUM_TARGETS = 32  # tokens scored before each anchor


def pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the pieces of a document: at most `size` tokens each, with an end at each power of two
    from `size` on.
    """
    first = 0
    while first < length:
        last = min(first + size, length)
        if last > size and (power := 2 ** (last.bit_length() - 1)) > first:
            last = power
        yield first, last
        first = last


def _nats(model: MinRNNForCausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of targets [rows, time] under hidden states [rows, time, width], with few
    logits in memory.
    """
    step = max(1, NUM_LOGITS // (model.config.vocab_size * len(hidden)))
    nats = []
    for part, part_targets in zip(hidden.split(step, 1), targets.split(step, 1), strict=True):
        logits = at_least_fp32(model.logits(part)).flatten(0, 1)
        losses = F.cross_entropy(logits, part_targets.flatten(), reduction="none")
        nats.append(losses.view_as(part_targets))
    return torch.cat(nats, 1)


@torch.no_grad()
def token_nats(
    model: MinRNNForCausalLM,
    tokens: np.ndarray,
    cuts: Sequence[int | None] = (None,),
    piece: int = 8192,
    on_progress: Callable[[int], object] = lambda position: None,
) -> np.ndarray:
    """Negative log-likelihood of each token but the first, in nats.

    Args:
        model: in eval mode.
        tokens: <bos> and the following tokens, int [1 + n].
        cuts: one row each: the state is reset every so many tokens; None: it is carried through.
        piece: tokens per forward pass, over all rows.
        on_progress: called with 0 at the start, and with the end position of each piece when it is computed.

    Returns:
        fp64 [len(cuts), n].
    """
    length = len(tokens) - 1
    nats = np.full((len(cuts), length), np.nan)
    cache = MinRNNCache(model.config.num_hidden_layers)
    on_progress(0)
    for first, last in pieces(length, max(1, piece // len(cuts))):
        starts = cut_starts(first, last, cuts)
        nats[:, first:last] = score(model, tokens[first : last + 1], len(cuts), cache, starts)
        on_progress(last)
    return nats


def cut_starts(first: int, last: int, cuts: Sequence[int | None]) -> np.ndarray:
    """Where the state is reset between two positions of a document: bool [cuts, last - first]."""
    positions = np.arange(first, last)
    return np.stack([np.zeros(last - first, bool) if cut is None else positions % cut == 0 for cut in cuts])


def score(
    model: MinRNNForCausalLM,
    tokens: np.ndarray,
    num_rows: int,
    cache: MinRNNCache,
    starts: np.ndarray | None = None,
) -> np.ndarray:
    """Nats [num_rows, n] of each token but the first, from the state of each row, which moves on.

    Args:
        tokens: int [1 + n].
        starts: where a row's state is reset, bool [num_rows, n].
    """
    part = torch.as_tensor(tokens, dtype=torch.long, device=model.device).expand(num_rows, -1)
    is_reset = starts is not None and starts.any()
    output = model.model(
        input_ids=part[:, :-1],
        past_key_values=cache,
        use_cache=True,
        document_starts=torch.as_tensor(starts, device=model.device) if is_reset else None,
    )
    return _nats(model, output.last_hidden_state, part[:, 1:]).cpu().numpy()


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Mean of [n] neighbouring values and its standard error from blocks; None for too few blocks."""
    num_blocks = len(values) // BLOCK
    if num_blocks < MIN_BLOCKS:
        return float(values.mean()), None
    means = values[: num_blocks * BLOCK].reshape(num_blocks, BLOCK).mean(1)
    return float(values.mean()), float(means.std(ddof=1) / math.sqrt(num_blocks))


def bucket_edges(length: int) -> list[int]:
    """0, 64, 128, 256, ... and the length."""
    edges, edge = [0], FIRST_BUCKET
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def bucket_losses(
    carried: np.ndarray, cut: dict[int, np.ndarray], num_bytes: Callable[[int], int], edges: Sequence[int]
) -> list[dict[str, Any]]:
    """Losses between consecutive edges.

    Args:
        carried: nats [n].
        cut: nats [n], by the number of tokens after which the state is reset.
        num_bytes: bytes of text of the first so many scored tokens.
        edges: positions, rising.
    """
    rows = []
    for first, last in itertools.pairwise(edges):
        size = num_bytes(last) - num_bytes(first)

        def summary(
            nats: np.ndarray, first: int = first, last: int = last, size: int = size
        ) -> dict[str, Any]:
            mean, error = mean_and_error(nats[first:last])
            bits = float(nats[first:last].sum()) / (size * math.log(2)) if size else None
            return {"nats": mean, "error": error, "bits_per_byte": bits}

        row: dict[str, Any] = {
            "from": first,
            "to": last,
            "tokens": last - first,
            "bytes": size,
            "carried": summary(carried),
            "cut": {},
        }
        for length, nats in cut.items():
            gain, error = mean_and_error((carried - nats)[first:last])
            row["cut"][str(length)] = {
                **summary(nats),
                "carried_minus_cut": gain,
                "carried_minus_cut_error": error,
            }
        rows.append(row)
    return rows


def byte_counter(encoder: Encoder, tokens: np.ndarray) -> Callable[[int], int]:
    """A function from a number of scored tokens of `<bos> text [<eos>]` to their bytes of text; <eos> counts
    none.
    """
    text = tokens[1:-1] if tokens[-1] == encoder.eos else tokens[1:]
    return lambda count: encoder.num_bytes(text[:count])


def memory_contexts(length: int, num_anchors: int, budget: int) -> list[int]:
    """1, 2, 4, ... tokens before the targets: at most half of the document, within the budget of tokens to
    read.
    """
    contexts, context, work = [], 1, 0
    while context <= length // 2 and work + num_anchors * (context + NUM_TARGETS) <= budget:
        contexts.append(context)
        work += num_anchors * (context + NUM_TARGETS)
        context *= 2
    return contexts


@torch.no_grad()
def _target_nats(model: MinRNNForCausalLM, rows: np.ndarray, piece: int) -> np.ndarray:
    """Nats of the last NUM_TARGETS tokens of each row [rows, context + NUM_TARGETS], read from an empty
    state.
    """
    tokens = torch.as_tensor(rows, dtype=torch.long, device=model.device)
    cache = MinRNNCache(model.config.num_hidden_layers)
    context, scored = tokens[:, : -NUM_TARGETS - 1], tokens[:, -NUM_TARGETS - 1 :]
    if context.shape[1]:
        for part in context.split(max(1, piece // len(rows)), 1):
            model.model(input_ids=part, past_key_values=cache, use_cache=True)
    hidden = model.model(input_ids=scored[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
    return _nats(model, hidden, scored[:, 1:]).cpu().numpy().astype(np.float64)


def _anchor_nats(
    model: MinRNNForCausalLM, rows: np.ndarray, piece: int, on_progress: Callable[[int], object]
) -> np.ndarray:
    """Mean nats of the targets of each row [rows, context + NUM_TARGETS], read in batches."""
    size = max(1, piece // rows.shape[1])
    nats = []
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        nats.append(_target_nats(model, batch, piece).mean(1))
        on_progress(batch.size)
    return np.concatenate(nats)


def memory_curve(
    model: MinRNNForCausalLM,
    tokens: np.ndarray,
    carried: np.ndarray,
    num_anchors: int = 256,
    budget: int = 4_000_000,
    tolerance: float = 0.01,
    piece: int = 8192,
    on_progress: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Measure how much of the preceding context a model uses.

    The targets are the NUM_TARGETS tokens before each of `num_anchors` positions, spread evenly over the
    document. Their mean loss is measured after reading exactly c tokens before them from an empty state, for
    c = 1, 2, 4, ...; the targets are the same each time. The effective memory length is the smallest c whose
    mean loss is at most `tolerance` nats above the loss with all the context.

    Args:
        model: in eval mode.
        tokens: <bos> and the following tokens, int [1 + n].
        carried: nats of each token but the first with the state carried [n].
        num_anchors: maximum; fewer if targets would overlap.
        budget: maximum of tokens to read.
        tolerance: in nats.
        piece: tokens per forward pass, over all rows.
        on_progress: called with the number of tokens of each forward pass.
    """
    contexts = memory_contexts(len(tokens) - NUM_TARGETS, num_anchors, budget)
    assert contexts, "the budget does not allow a context of one token"
    longest = contexts[-1]
    num_anchors = min(num_anchors, (len(tokens) - longest) // NUM_TARGETS)
    # the targets end before these
    anchors = np.linspace(longest + NUM_TARGETS, len(tokens), num_anchors).round().astype(int)
    all_context = carried[anchors[:, None] - 1 - NUM_TARGETS + np.arange(NUM_TARGETS)].mean(1)  # [anchors]
    curve = []
    for context in contexts:
        width = context + NUM_TARGETS
        rows = tokens[anchors[:, None] - width + np.arange(width)]
        nats = _anchor_nats(model, rows, piece, on_progress)
        difference = nats - all_context
        error = float(difference.std(ddof=1) / math.sqrt(num_anchors)) if num_anchors > 1 else None
        row = {"context": context, "nats": float(nats.mean()), "above_all": float(difference.mean())}
        curve.append({**row, "error": error})
    return {
        "definition": "the smallest number of tokens before the targets, read from an empty state, "
        f"whose mean loss is at most {tolerance:g} nats above that with all the context",
        "effective_memory_length": next(
            (row["context"] for row in curve if row["above_all"] <= tolerance), None
        ),
        "tolerance": tolerance,
        "anchors": num_anchors,
        "targets_per_anchor": NUM_TARGETS,
        "tokens_read": sum(num_anchors * (context + NUM_TARGETS) for context in contexts),
        "nats_with_all": float(all_context.mean()),
        "curve": curve,
    }
