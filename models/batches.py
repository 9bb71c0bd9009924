"""Batches as other libraries make them: where documents start in a row without padding, and what may be passed at all.

Data collators say in one of three ways that a row holds several documents, and some in all of them:

    position_ids   [batch, time]   0 1 2 3 0 1 0 1 2      0 at each document's first token
    seq_idx        [batch, time]   0 0 0 0 1 1 2 2 2      another number for each document
    cu_seq_lens_q  [documents + 1]  0 4 6 9               where they begin and end in batch * time tokens

Each becomes `document_starts`. Where two of them, or the state that goes on, contradict each other, no reading is right: an error.
"""

import difflib
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from .loss import IGNORE_INDEX

PACKING = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What transformers passes by itself, and says nothing to a recurrent model, or is read by its decorators.
WITHOUT_EFFECT = (
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "token_type_ids",
    "cache_position",
)


def has_values(tensor: Tensor) -> bool:
    """Whether one may look into a tensor: not while tracing (compile, export, fake tensors), nor on the meta device."""
    return not tensor.is_meta and not is_tracing(tensor)


def check_names(function: Callable, arguments: dict[str, Any]) -> None:
    """Refuse keyword arguments of `function` that nobody reads.

    Raises:
        TypeError: a name that is not known, with the nearest one that is.
        ValueError: is_causal=False.
    """
    for name in arguments:
        if name not in (*PACKING, *WITHOUT_EFFECT, "is_causal"):
            near = difflib.get_close_matches(name, [*inspect.signature(function).parameters, *PACKING], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}{hint}.")
    if arguments.get("is_causal") is False:
        raise ValueError("is_causal=False: a recurrent model reads from left to right only.")


def packing_order(attention_mask: Tensor | None, time: int) -> Tensor | None:
    """Indices [B, T] that bring each row's real tokens to the left, in order; None if nothing is padded.

    A mask whose values cannot be looked at is taken to have padding, and to be 0 and 1.
    `attention_mask` [B, >= T] is 1 for real tokens; only its last T columns belong to this call (generate() passes the whole past).
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < time:
        raise ValueError(
            f"attention_mask must be [batch, time] with at least {time} columns, but is {tuple(attention_mask.shape)}."
        )
    mask = attention_mask[:, attention_mask.shape[1] - time :]
    if has_values(mask) and bool((mask == 1).all()):
        return None
    if has_values(mask) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            "attention_mask must be 1 (real) or 0 (padding); numbers of documents are passed as seq_idx."
        )
    return torch.argsort(mask == 0, dim=1, stable=True)


def starts_of_packing(
    packing: dict[str, Any],
    document_starts: Tensor | None,
    attention_mask: Tensor | None,
    shape: tuple[int, int],
    goes_on: bool,
) -> Tensor | None:
    """Where documents start, from whatever says so.

    Args:
        packing: Values by the names in `PACKING`.
        document_starts: bool [batch, time]; what the others say must agree with it.
        attention_mask: [batch, >= time]; the last `time` columns belong to this batch.
        shape: (batch, time).
        goes_on: A state comes with the batch, so its first tokens may belong to a document that has begun before.

    Returns:
        bool [batch, time], or None where no document starts behind the first token.

    Raises:
        ValueError: shapes that do not fit, or contradictions.
    """
    time = shape[1]
    order, past = packing_order(attention_mask, time), None
    mask = (
        None
        if order is None or attention_mask is None
        else attention_mask[:, attention_mask.shape[1] - time :] != 0
    )
    if attention_mask is not None and attention_mask.shape[1] > time:
        past = attention_mask[:, : attention_mask.shape[1] - time] != 0

    def real_first(name: str) -> Tensor | None:
        if (values := packing.get(name)) is None:
            return None
        if values.ndim != 2 or values.shape[1] != time or values.shape[0] not in (1, shape[0]):
            raise ValueError(f"{name} must be [batch, time] = {shape}, but is {tuple(values.shape)}.")
        return values.expand(shape) if order is None else values.expand(shape).gather(1, order)

    # What each source says, in the order of real tokens, padding behind them.
    claims, jumps = {}, None
    if document_starts is not None:
        claims["document_starts"] = document_starts if order is None else document_starts.gather(1, order)
    if (positions := real_first("position_ids")) is not None:
        claims["position_ids"] = positions == 0
        jumps = F.pad((positions[:, 1:] != positions[:, :-1] + 1) & (positions[:, 1:] != 0), (1, 0))[:, :time]
    if (numbers := real_first("seq_idx")) is not None:
        claims["seq_idx"] = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))[:, :time]
    if any(packing.get(name) is not None for name in PACKING[2:]):
        if order is not None:
            raise ValueError(
                "cu_seq_lens_q divides rows without padding, but attention_mask has padding: pass one of them."
            )
        claims["cu_seq_lens_q"] = _starts_of_lengths(packing, shape)

    starts = next(iter(claims.values()))
    if has_values(starts):
        real = torch.ones_like(starts) if mask is None or order is None else mask.gather(1, order)
        if jumps is not None:
            _refuse_where(jumps & real, "position_ids neither go on by 1 nor restart at 0")
        _refuse_contradictions(claims, real, past, goes_on)
        if document_starts is None and not (starts & real)[:, 1:].any():
            return None
    return starts if order is None else torch.zeros_like(starts).scatter(1, order, starts)


def _refuse_where(where: Tensor, message: str) -> None:
    if where.any():
        row, column = (int(index) for index in where.nonzero()[0])
        raise ValueError(f"{message}: row {row}, token {column} (padding not counted).")


def _refuse_contradictions(
    claims: dict[str, Tensor], real: Tensor, past: Tensor | None, goes_on: bool
) -> None:
    """All must say the same of all tokens but the first, and of the first nothing that a state or `document_starts` contradicts."""
    (first, starts), *others = claims.items()
    for name, claim in others:
        _refuse_where(
            F.pad((claim != starts)[:, 1:], (1, 0)) & real,
            f"{first} and {name} put documents' starts at different places",
        )
    if not goes_on or not real.shape[1]:
        return
    in_document = (
        real[:, 0] if past is None else real[:, 0] & past.any(1)
    )  # a row that was padding until now begins here
    for name in claims.keys() & {"position_ids", "cu_seq_lens_q"}:
        begins = claims[name][:, 0] if "document_starts" not in claims else claims[name][:, 0] & ~starts[:, 0]
        message = f"{name} begins a document, but past_key_values goes on with one (True in document_starts ends it)"
        _refuse_where((begins & in_document).unsqueeze(1), message)


def _starts_of_lengths(packing: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    """bool [batch, time] from the sums of lengths, after checking all that comes with them."""
    edges, keys = (packing.get(f"cu_seq_lens_{kind}") for kind in "qk")
    edges = keys if edges is None else edges
    if edges is None:
        raise ValueError("max_length_q and max_length_k say nothing without cu_seq_lens_q.")
    (batch, time), num_tokens = shape, shape[0] * shape[1]
    if has_values(edges):
        values = edges.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(values)]
        if edges.ndim != 1 or not lengths or values[0] != 0 or values[-1] != num_tokens or min(lengths) < 0:
            raise ValueError(
                f"cu_seq_lens_q must rise from 0 to batch * time = {num_tokens}, but is {values}."
            )
        if keys is not None and keys.tolist() != values:
            raise ValueError("cu_seq_lens_k must be cu_seq_lens_q: a recurrent model reads each token once.")
        if missing := set(range(0, num_tokens, time or 1)) - set(values):
            raise ValueError(
                f"cu_seq_lens_q must divide the batch's rows of {time} tokens, but has no edge at {min(missing)}."
            )
        for name in ("max_length_q", "max_length_k"):
            if packing.get(name) is not None and packing[name] < max(lengths):
                raise ValueError(
                    f"{name} is {int(packing[name])}, but cu_seq_lens_q holds a document of {max(lengths)} tokens."
                )
    edges = edges[:-1].long()
    flat = torch.zeros(
        num_tokens + 1, dtype=torch.bool, device=edges.device
    )  # one more, for empty documents at the end
    return flat.index_fill(0, edges, True)[:-1].view(batch, time)


def shift_labels_of(
    labels: Tensor, attention_mask: Tensor | None, document_starts: Tensor | None, is_counted: bool
) -> Tensor:
    """Targets [batch, time] of labels [batch, time]: -100 where a pad would predict, or the document before.

    Args:
        is_counted: The caller divides the loss by a number of labels that he has counted himself.

    Raises:
        ValueError: a label that is counted, but predicted by nothing: the loss would be too small, and change with the padding.
    """
    targets, alone = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), None
    if attention_mask is not None:
        alone = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :] == 0
    if document_starts is not None:
        begins = F.pad(document_starts[:, 1:], (0, 1))
        alone = begins if alone is None else begins | alone
    if alone is None:
        return targets
    if is_counted and has_values(targets) and bool(((targets != IGNORE_INDEX) & alone).any()):
        raise ValueError(_COUNTED.format("the labels"))
    return targets.masked_fill(alone, IGNORE_INDEX)


def check_counted(attention_mask: Tensor | None) -> None:
    """Refuse padding before real tokens where a caller takes the logits, shifts and counts labels himself (label smoothing in Trainer).

    Raises:
        ValueError: as in `shift_labels_of`.
    """
    if attention_mask is None or not has_values(attention_mask):
        return
    if bool(((attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] == 0)).any()):
        raise ValueError(_COUNTED.format("labels outside of the model"))


_COUNTED = (
    "num_items_in_batch counts a document's first token among {}, but nothing predicts it behind padding or another document: "
    "set its label to -100, or pad on the right (tokenizer.padding_side = 'right')."
)
