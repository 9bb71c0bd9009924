"""What a model of transformers can and cannot do, measured on the model itself with a few short inputs.

    a token in the end is changed         earlier logits must not change: otherwise it is no language model
    a document before another is changed  the second's logits must not change if position_ids restart there
    padding before the text is masked     the text's logits must not change: generate() pads prompts like this
    the head is applied to the last hidden state: equal to the logits, or there is more after the head

Attention masks make the first two equal to rounding where they hold, so the tolerance is small, and it is
compared with the change that the same edit makes where nothing restarts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

NO_STATE = "no state is carried from chunk to chunk"
NO_DOCUMENTS = "documents in a chunk are not separated"
NO_PADDING = "padding before a text is read as text"
NO_ROUTER_LOSS = "the routers' balancing loss is left out"
NUM_TOKENS = 20  # of each input


@dataclass(frozen=True)
class Abilities:
    """What a model can do."""

    is_causal: bool
    separates_documents: bool
    """With position_ids that restart at a document's start."""
    skips_padding: bool
    """Before a text, where attention_mask is 0."""
    has_plain_head: bool
    """The logits are a linear map of the last hidden state, without bias or cap."""

    @property
    def limits(self) -> list[str]:
        """What it cannot do, in words, for results."""
        documents = [] if self.separates_documents else [NO_DOCUMENTS]
        return [NO_STATE, *documents, *([] if self.skips_padding else [NO_PADDING])]


def tolerance(model: PreTrainedModel) -> float:
    """Difference of logits that counts as rounding, as a part of the largest: 1e-4 in fp32, 0.03 in bf16."""
    return max(1e-4, 4 * torch.finfo(model.dtype).eps)


def active_dropout(config: PreTrainedConfig) -> list[str]:
    """The dropout that a language model's configuration asks for, in words, for results; empty if none."""
    fields = {name: value for name, value in config.to_dict().items() if "dropout" in name or "pdrop" in name}
    active = [
        f"{name} {value:g}"
        for name, value in fields.items()
        if isinstance(value, float) and value > 0 and not name.startswith(("summary", "classifier"))
    ]
    return [f"trains with dropout: {', '.join(active)}"] if active else []


def positions_in_documents(document_starts: Tensor) -> Tensor:
    """Position of each token in its document, as far as the chunk shows: bool [batch, time] -> int64 [batch,
    time]."""
    positions = torch.arange(document_starts.shape[1], device=document_starts.device)
    return positions - torch.where(document_starts, positions, 0).cummax(1).values


@torch.no_grad()
def abilities(model: PreTrainedModel) -> Abilities:
    """Measure a model. It is in the same mode afterwards, and random states are unchanged.

    Raises:
        Exception: whatever a forward pass raises that cannot run here.
    """
    was_training = model.training
    model.eval()
    try:
        return _measure(model)
    finally:
        model.train(was_training)


def _measure(model: PreTrainedModel) -> Abilities:
    vocab_size, half = model.config.get_text_config().vocab_size, NUM_TOKENS // 2
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, NUM_TOKENS), generator=draw).to(model.device)
    other_end, other_begin = ids.clone(), ids.clone()
    other_end[:, -1] = (ids[:, -1] + 1) % vocab_size
    other_begin[:, :half] = (ids[:, :half] + 1) % vocab_size

    def logits(ids: Tensor, **options: Any) -> Tensor:
        return model(input_ids=ids, use_cache=False, **options).logits.float()

    plain = logits(ids)
    close = tolerance(model) * plain.abs().max()

    def differ(one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().max()

    is_causal = bool(differ(logits(other_end)[:, :-1], plain[:, :-1]) <= close)
    starts = torch.arange(NUM_TOKENS, device=model.device)[None] == half
    try:
        packed, other = (logits(x, position_ids=positions_in_documents(starts)) for x in (ids, other_begin))
    except TypeError:  # it takes no position_ids
        separates = False
    else:
        reach = differ(
            logits(other_begin)[:, half:], plain[:, half:]
        )  # what the first half changes otherwise
        alone = logits(ids[:, half:])
        separates = bool(
            differ(packed[:, half:], alone) <= close
            and differ(packed[:, half:], other[:, half:]) <= 1e-3 * reach
        )
    padded = _padded_logits(model, ids[:, :half])
    skips_padding = padded is not None and bool(differ(padded, plain[:, :half]) <= close)
    return Abilities(is_causal, separates, skips_padding, _has_plain_head(model, ids, plain, close))


def _padded_logits(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """Logits of a text behind padding, passed as generate() does; None if the model cannot be called so."""
    num_padding = 3
    mask = nn.functional.pad(torch.ones_like(ids), (num_padding, 0))
    inputs = {"input_ids": nn.functional.pad(ids, (num_padding, 0)), "attention_mask": mask}
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    for more in (positions, {}):
        try:
            return model(**inputs, **more, use_cache=False).logits[:, num_padding:].float()
        except TypeError:  # it takes no position_ids
            continue
        except Exception:  # each model raises its own
            break
    return None


def _has_plain_head(model: PreTrainedModel, ids: Tensor, logits: Tensor, close: Tensor) -> bool:
    head, base = model.get_output_embeddings(), model.base_model
    if not isinstance(head, nn.Linear) or head.bias is not None or base is model:
        return False
    hidden = base(input_ids=ids, use_cache=False)[0]
    return hidden.shape[-1] == head.in_features and bool(
        ((head(hidden).float() - logits).abs() <= close).all()
    )
