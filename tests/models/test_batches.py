"""Batches of other libraries: packed rows, left padding, unknown keyword arguments."""

import itertools
from typing import Any

import pytest
import torch
from helpers import assert_close, assert_same_gradients, gradients, logits_of, random_ids, shared_model
from torch import Tensor
from transformers import DataCollatorWithFlattening

from minrnn.models import MinRNNCache

LENGTHS = [5, 1, 7, 4]
PACKINGS = {
    "position_ids": {},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}
packings = pytest.mark.parametrize("packing", PACKINGS)


def documents() -> list[Tensor]:
    return [random_ids(1, length, seed=length) for length in LENGTHS]


def flattened(packing: str) -> dict[str, Any]:
    """What the collator makes of the documents."""
    batch = DataCollatorWithFlattening(return_tensors="pt", **PACKINGS[packing])(
        [{"input_ids": row[0]} for row in documents()]
    )
    return dict(batch)


@packings
@pytest.mark.parametrize("cell", ["mingru", "minlstm"])
def test_flattened_documents_equal_separate_documents(packing, cell):
    """Logits, loss and gradients; the collator's own default is among the packings."""
    model, batch = shared_model(dtype=torch.float64, cell=cell), flattened(packing)
    output = model(**batch, num_items_in_batch=int((batch["labels"] != -100).sum()))
    alone = torch.cat([logits_of(model, row) for row in documents()], dim=1)
    assert_close(output.logits, alone, atol=1e-12)
    losses = [
        model(row, labels=row, num_items_in_batch=sum(LENGTHS) - 4).loss
        for row in documents()
        if row.shape[1] > 1
    ]
    separate = torch.stack(losses).sum()
    assert_close(output.loss, separate, atol=1e-12)
    assert_same_gradients(gradients(model, output.loss), gradients(model, separate), atol=1e-11)
    del batch["labels"]
    hidden = model.model(**batch).last_hidden_state
    assert_close(model.lm_head(hidden), alone, atol=1e-12)


def test_positions_under_padding():
    """position_ids as generate() makes them: any value at padding, restarts behind padding."""
    model, ids = shared_model(dtype=torch.float64), random_ids(2, 8)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1], [1] * 8])
    positions = torch.tensor([[9, 9, 0, 1, 9, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]])
    starts = torch.zeros(2, 8, dtype=torch.bool)
    starts[0, 5] = True
    actual = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(actual, logits_of(model, ids, attention_mask=mask, document_starts=starts))
    numbers = torch.tensor([[7, 7, 1, 1, 7, 2, 2, 2], [1] * 8])
    assert torch.equal(actual, logits_of(model, ids, attention_mask=mask, seq_idx=numbers))


def test_positions_may_continue_a_state():
    """A chunk of a text, a token of it, and a row that was padding until now."""
    model, ids = shared_model(dtype=torch.float64), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole, cache, pieces = logits_of(model, ids, attention_mask=mask), MinRNNCache(2), []
    for low, high in itertools.pairwise([0, 4, 6, 7, 8, 9]):
        position_ids = positions[:, low:high]
        part = {
            "attention_mask": mask[:, :high],
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": True,
        }
        pieces.append(logits_of(model, ids[:, low:high], **part))
    actual = torch.cat(pieces, dim=1)
    assert_close(actual[mask.bool()], whole[mask.bool()], atol=1e-12)
    with pytest.raises(ValueError, match="position_ids begins a document, but past_key_values goes on"):
        model(ids, past_key_values=cache, position_ids=torch.arange(9).unsqueeze(0))
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[:, 0] = True
    fresh = logits_of(
        model, ids, past_key_values=cache, position_ids=torch.arange(9).unsqueeze(0), document_starts=starts
    )
    assert_close(fresh, logits_of(model, ids), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": [[0, 1, 2, 4, 5, 6]]}, "neither go on by 1 nor restart at 0: row 0, token 3"),
        ({"position_ids": [[2, 3, 4, 2, 3, 4]]}, "neither go on by 1 nor restart at 0: row 0, token 3"),
        ({"position_ids": [0, 1, 2, 3, 4, 5]}, r"position_ids must be \[batch, time\] = \(2, 6\)"),
        ({"position_ids": [[[0, 1, 2, 3, 4, 5]]] * 3}, "position_ids must be"),
        (
            {"position_ids": [[0, 1, 2, 0, 1, 2]], "seq_idx": [[0, 0, 1, 1, 1, 1]]},
            "different places: row 0, token 2",
        ),
        ({"seq_idx": [[0, 0, 0, 1, 1]]}, "seq_idx must be"),
        ({"cu_seq_lens_q": [0, 2, 11]}, "must rise from 0 to batch"),
        ({"cu_seq_lens_q": [0, 4, 2, 12]}, "must rise from 0 to batch"),
        ({"cu_seq_lens_q": [0, 5, 12]}, "no edge at 6"),
        ({"cu_seq_lens_q": [0, 6, 12], "cu_seq_lens_k": [0, 7, 12]}, "cu_seq_lens_k must be cu_seq_lens_q"),
        ({"cu_seq_lens_q": [0, 6, 12], "max_length_q": 5}, "max_length_q is 5"),
        ({"max_length_q": 5}, "say nothing without cu_seq_lens_q"),
        ({"cu_seq_lens_q": [0, 6, 12], "attention_mask": [[0, 1, 1, 1, 1, 1], [1] * 6]}, "without padding"),
        ({"attention_mask": [[1, 1, 2, 2, 2, 0], [1] * 6]}, "numbers of documents are passed as seq_idx"),
        ({"attention_mask": [[1] * 8] * 2}, "attention_mask must be \\[batch, 6\\], .* but is \\(2, 8\\)"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    model = shared_model()
    arguments = {
        name: value if isinstance(value, int) else torch.tensor(value) for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 6), **arguments)


@pytest.mark.parametrize(
    ("name", "hint"), [("atention_mask", "attention_mask"), ("seq_ids", "seq_idx"), ("cache_params", None)]
)
def test_unknown_keyword_arguments_are_refused(name, hint):
    model, ids = shared_model(), random_ids(2, 6)
    for module in (model, model.model):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'") as caught:
            module(ids, **{name: torch.ones(2, 6)})
        assert hint is None or f"did you mean {hint}?" in str(caught.value)
    with pytest.raises(ValueError, match="from left to right only"):
        model(ids, is_causal=False)


def test_arguments_of_transformers_are_accepted():
    model, ids = shared_model(), random_ids(2, 6)
    options = {
        "output_attentions": False,
        "output_hidden_states": True,
        "output_router_logits": False,
        "is_causal": True,
    }
    output = model(
        ids, **options, return_dict=True, token_type_ids=torch.zeros_like(ids), cache_position=torch.arange(6)
    )
    assert torch.equal(output.logits, logits_of(model, ids))
    assert len(output.hidden_states) == 3


def left_padded_rows() -> list[Tensor]:
    return [random_ids(1, length, seed=length)[0] for length in (9, 3, 6, 4, 9, 2, 7, 5)]


def padded_batch(rows: list[Tensor], side: str, mark_first: bool) -> dict[str, Tensor]:
    """As a collator pads them, labels included."""
    time, batch = max(len(row) for row in rows), {}
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        values = [torch.ones_like(row) if name == "attention_mask" else row.clone() for row in rows]
        for value in values:
            if name == "labels" and mark_first:
                value[0] = -100
        pad = [(time - len(row), 0) if side == "left" else (0, time - len(row)) for row in rows]
        batch[name] = torch.stack(
            [
                torch.nn.functional.pad(value, sides, value=fill)
                for value, sides in zip(values, pad, strict=True)
            ]
        )
    return batch


@pytest.mark.parametrize(("side", "mark_first"), [("left", True), ("right", False), ("right", True)])
def test_loss_does_not_depend_on_the_split_of_a_batch(side, mark_first):
    """Loss and gradient of a batch in 1, 2, 4 and 8 pieces, divided by the labels that Trainer counts."""
    model, rows = shared_model(dtype=torch.float64), left_padded_rows()
    results = []
    for size in (1, 2, 4, 8):
        batches = [padded_batch(rows[low : low + size], side, mark_first) for low in range(0, 8, size)]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss = torch.stack([model(**batch, num_items_in_batch=count).loss for batch in batches]).sum()
        results.append((loss, gradients(model, loss)))
    for loss, grads in results[1:]:
        assert_close(loss, results[0][0], atol=1e-12)
        assert_same_gradients(grads, results[0][1], atol=1e-11)


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Pass exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS[0]}, r"input_ids must be \[batch, time\], but is \(3,\)"),
        ({"input_ids": IDS.float()}, "input_ids must be int64 or int32, but is torch.float32"),
        (
            {"inputs_embeds": torch.ones(3, 8)},
            r"inputs_embeds must be \[batch, time, hidden_size\], but is \(3",
        ),
        (
            {"input_ids": IDS, "labels": IDS[0]},
            r"labels must be int64 .* = \(2, 3\), but is torch.int64 \(3,\)",
        ),
        (
            {"input_ids": IDS, "shift_labels": IDS.int()},
            r"shift_labels must be int64 .*, but is torch.int32 \(",
        ),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        shared_model()(**inputs)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_labels_that_are_counted_but_not_scored_are_refused(size):
    model = shared_model()
    batch = padded_batch(left_padded_rows()[:size], "left", mark_first=False)
    assert model(**batch).loss > 0  # divided by the number of scored labels
    with pytest.raises(ValueError, match="nothing predicts it behind padding"):
        model(**batch, num_items_in_batch=10)
    starts = torch.zeros_like(batch["labels"], dtype=torch.bool)
    starts[0, 4] = True
    with pytest.raises(ValueError, match="or another document"):
        model(batch["input_ids"], labels=batch["input_ids"], document_starts=starts, num_items_in_batch=10)
    del batch["labels"]  # as Trainer does for label smoothing
    with pytest.raises(ValueError, match="labels outside of the model"):
        model(**batch, num_items_in_batch=10)
