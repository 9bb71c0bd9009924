"""Batches as other libraries make them: packed documents, padding, labels, unknown keyword arguments.

Data collators pass one or several of these for rows that hold several documents:

    position_ids   [batch, time]    0 1 2 3 0 1 0 1 2     0 at the first token of each document
    seq_idx        [batch, time]    0 0 0 0 1 1 2 2 2     a different number for each document
    cu_seq_lens_q  [documents + 1]  0 4 6 9               the edges of documents in batch * time tokens

Each is converted to `document_starts`. If two of them contradict each other, or contradict the state that the
batch continues, the batch is refused.
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
# What transformers passes by itself and a recurrent model does not need, or what its decorators read.
WITHOUT_EFFECT = (
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "token_type_ids",
    "cache_position",
)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read: not while tracing (compile, export, fake tensors) or on meta."""
    return not tensor.is_meta and not is_tracing(tensor)


def check_keyword_arguments(function: Callable, arguments: dict[str, Any]) -> None:
    """Refuse keyword arguments that `function` does not read.

    Raises:
        TypeError: an unknown name; the message suggests the nearest known one.
        ValueError: is_causal=False.
    """
    for name in arguments:
        if name not in (*PACKING, *WITHOUT_EFFECT, "is_causal"):
            known = [*inspect.signature(function).parameters, *PACKING]
            matches = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {matches[0]}?)" if matches else ""
            raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}{hint}.")
    if arguments.get("is_causal") is False:
        raise ValueError("is_causal=False: a recurrent model reads from left to right only.")


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """(batch, time) of a batch. Rows may be empty: they leave a state as it is.

    Raises:
        ValueError: both or none are given, or shape or dtype are wrong.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
    name, tokens = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
    assert tokens is not None
    form = "[batch, time]" if input_ids is not None else "[batch, time, hidden_size]"
    if tokens.ndim != form.count(",") + 1:
        raise ValueError(f"{name} must be {form}, but is {tuple(tokens.shape)}.")
    if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, but is {input_ids.dtype}.")
    return tokens.shape[0], tokens.shape[1]


def check_targets(name: str, targets: Tensor | None, shape: tuple[int, int]) -> None:
    """Refuse targets of another shape or dtype than int64 `shape`.

    Raises:
        ValueError: they are.
    """
    if targets is not None and (targets.shape != shape or targets.dtype != torch.int64):
        raise ValueError(
            f"{name} must be int64 [batch, time] = {shape}, but is {targets.dtype} {tuple(targets.shape)}."
        )


def left_align_order(attention_mask: Tensor | None, time: int) -> Tensor | None:
    """Indices [B, T] that move each row's real tokens to the left, in order; None without padding.

    A mask whose values cannot be read is assumed to be 0 and 1, with padding. `attention_mask` [B, >= T] is 1
    for real tokens; only its last T columns belong to this call (generate() passes a mask of the whole text).
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < time:
        raise ValueError(
            f"attention_mask must be [batch, time] with at least {time} columns, "
            f"but is {tuple(attention_mask.shape)}."
        )
    mask = attention_mask[:, attention_mask.shape[1] - time :]
    if has_values(mask) and bool((mask == 1).all()):
        return None
    if has_values(mask) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            "attention_mask must be 1 (real) or 0 (padding); numbers of documents are passed as seq_idx."
        )
    return torch.argsort(mask == 0, dim=1, stable=True)


def document_starts_from_packing(
    packing: dict[str, Any],
    document_starts: Tensor | None,
    attention_mask: Tensor | None,
    shape: tuple[int, int],
    continues: bool,
) -> Tensor | None:
    """Where documents start, from all arguments that say so.

    Args:
        packing: Values by the names in `PACKING`.
        document_starts: bool [batch, time]; the other arguments must agree with it.
        attention_mask: [batch, >= time]; the last `time` columns belong to this batch.
        shape: (batch, time).
        continues: The batch comes with a state, so its first tokens may belong to a document that began
            earlier.

    Returns:
        bool [batch, time], or None if no document starts behind the first token.

    Raises:
        ValueError: shapes that do not fit, or contradictions.
    """
    order = left_align_order(attention_mask, shape[1])
    claims = _claims(packing, document_starts, order, shape)
    starts = next(iter(claims.values()))
    if has_values(starts):
        real, past = _real_tokens(attention_mask, order, starts)
        if (positions := _left_aligned(packing, "position_ids", order, shape)) is not None:
            jumps = (positions[:, 1:] != positions[:, :-1] + 1) & (positions[:, 1:] != 0)
            jumps = F.pad(jumps, (1, 0))[:, : shape[1]]
            _raise_where(jumps & real, "position_ids neither go on by 1 nor restart at 0")
        _check_agreement(claims, real, past, continues)
        if document_starts is None and not (starts & real)[:, 1:].any():
            return None
    return starts if order is None else torch.zeros_like(starts).scatter(1, order, starts)


def _claims(
    packing: dict[str, Any], document_starts: Tensor | None, order: Tensor | None, shape: tuple[int, int]
) -> dict[str, Tensor]:
    """Document starts according to each argument, bool [batch, time], real tokens on the left."""
    claims: dict[str, Tensor] = {}
    if document_starts is not None:
        claims["document_starts"] = document_starts if order is None else document_starts.gather(1, order)
    if (positions := _left_aligned(packing, "position_ids", order, shape)) is not None:
        claims["position_ids"] = positions == 0
    if (numbers := _left_aligned(packing, "seq_idx", order, shape)) is not None:
        claims["seq_idx"] = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))[:, : shape[1]]
    lengths = (name for name in PACKING if name.startswith(("cu_seq_lens", "max_length")))
    if any(packing.get(name) is not None for name in lengths):
        if order is not None:
            raise ValueError(
                "cu_seq_lens_q divides rows without padding, but attention_mask has padding: "
                "pass one of them."
            )
        claims["cu_seq_lens_q"] = _starts_from_cu_seq_lens(packing, shape)
    return claims


def _left_aligned(
    packing: dict[str, Any], name: str, order: Tensor | None, shape: tuple[int, int]
) -> Tensor | None:
    if (values := packing.get(name)) is None:
        return None
    if values.ndim != 2 or values.shape[1] != shape[1] or values.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} must be [batch, time] = {shape}, but is {tuple(values.shape)}.")
    return values.expand(shape) if order is None else values.expand(shape).gather(1, order)


def _real_tokens(
    attention_mask: Tensor | None, order: Tensor | None, starts: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(real tokens of this batch, left-aligned bool [batch, time]; real tokens of earlier text, or None)."""
    if attention_mask is None:
        return torch.ones_like(starts), None
    time = starts.shape[1]
    mask, num_past = attention_mask != 0, attention_mask.shape[1] - time
    real = torch.ones_like(starts) if order is None else mask[:, num_past:].gather(1, order)
    return real, mask[:, :num_past] if num_past else None


def _raise_where(condition: Tensor, message: str) -> None:
    if condition.any():
        row, column = (int(index) for index in condition.nonzero()[0])
        raise ValueError(f"{message}: row {row}, token {column} (padding not counted).")


def _check_agreement(claims: dict[str, Tensor], real: Tensor, past: Tensor | None, continues: bool) -> None:
    """All claims must agree on every token but the first. On the first, none may contradict the state or
    `document_starts`."""
    (first, starts), *others = claims.items()
    for name, claim in others:
        difference = F.pad((claim != starts)[:, 1:], (1, 0))
        _raise_where(difference & real, f"{first} and {name} put documents' starts at different places")
    if not continues or not real.shape[1]:
        return
    # A row that was all padding until now may begin here.
    in_document = real[:, 0] if past is None else real[:, 0] & past.any(1)
    for name in claims.keys() & {"position_ids", "cu_seq_lens_q"}:
        begins = claims[name][:, 0]
        if "document_starts" in claims:
            begins = begins & ~starts[:, 0]
        message = (
            f"{name} begins a document, but past_key_values goes on with one "
            "(True in document_starts ends it)"
        )
        _raise_where((begins & in_document).unsqueeze(1), message)


def _starts_from_cu_seq_lens(packing: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    """bool [batch, time] from the cumulated lengths."""
    edges, keys = (packing.get(f"cu_seq_lens_{kind}") for kind in "qk")
    edges = keys if edges is None else edges
    if edges is None:
        raise ValueError("max_length_q and max_length_k say nothing without cu_seq_lens_q.")
    if has_values(edges):
        _check_cu_seq_lens(edges, keys, packing, shape)
    num_tokens, edges = shape[0] * shape[1], edges[:-1].long()
    # One element more than tokens, for empty documents at the end.
    flat = torch.zeros(num_tokens + 1, dtype=torch.bool, device=edges.device)
    return flat.index_fill(0, edges, True)[:-1].view(shape)


def _check_cu_seq_lens(
    edges: Tensor, keys: Tensor | None, packing: dict[str, Any], shape: tuple[int, int]
) -> None:
    (_, time), num_tokens, values = shape, shape[0] * shape[1], edges.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(values)]
    if edges.ndim != 1 or not lengths or values[0] != 0 or values[-1] != num_tokens or min(lengths) < 0:
        raise ValueError(f"cu_seq_lens_q must rise from 0 to batch * time = {num_tokens}, but is {values}.")
    if keys is not None and keys.tolist() != values:
        raise ValueError("cu_seq_lens_k must be cu_seq_lens_q: a recurrent model reads each token once.")
    if missing := set(range(0, num_tokens, time or 1)) - set(values):
        raise ValueError(
            f"cu_seq_lens_q must divide the batch's rows of {time} tokens, but has no edge at {min(missing)}."
        )
    for name in ("max_length_q", "max_length_k"):
        if packing.get(name) is not None and packing[name] < max(lengths):
            raise ValueError(
                f"{name} is {int(packing[name])}, "
                f"but cu_seq_lens_q holds a document of {max(lengths)} tokens."
            )


def shifted_labels(
    labels: Tensor, attention_mask: Tensor | None, document_starts: Tensor | None, is_counted: bool
) -> Tensor:
    """Targets [batch, time] of labels [batch, time].

    They are IGNORE_INDEX where the label follows padding or belongs to the next document.

    Args:
        is_counted: The caller divides the loss by a number of labels that it has counted itself.

    Raises:
        ValueError: a counted label that nothing predicts. The loss would be too small and depend on the
            padding.
    """
    targets, unpredicted = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:], None
    if attention_mask is not None:
        unpredicted = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :] == 0
    if document_starts is not None:
        is_last = F.pad(document_starts, (0, 1))[:, 1:]
        unpredicted = is_last if unpredicted is None else is_last | unpredicted
    if unpredicted is None:
        return targets
    if is_counted and has_values(targets) and bool(((targets != IGNORE_INDEX) & unpredicted).any()):
        raise ValueError(_COUNTED_LABEL_ERROR.format("the labels"))
    return targets.masked_fill(unpredicted, IGNORE_INDEX)


def check_padding_of_counted_labels(attention_mask: Tensor | None) -> None:
    """Refuse padding before real tokens if the caller shifts and counts the labels itself.

    Trainer does so with label smoothing, where it computes the loss from the logits.

    Raises:
        ValueError: as in `shifted_labels`.
    """
    if attention_mask is None or not has_values(attention_mask):
        return
    if bool(((attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] == 0)).any()):
        raise ValueError(_COUNTED_LABEL_ERROR.format("labels outside of the model"))


_COUNTED_LABEL_ERROR = (
    "num_items_in_batch counts a document's first token among {}, but nothing predicts it behind padding or "
    "another document: set its label to -100, or pad on the right (tokenizer.padding_side = 'right')."
)
