"""Cuts are exact: any mixture of chunks, documents and padding gives the logits of separate documents."""

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    VOCAB,
    assert_close,
    assert_same_gradients,
    chunked_logits,
    generator,
    gradients,
    logits_of,
    new_model,
    random_ids,
    shared_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minrnn.models import MinRNNCache, MinRNNForCausalLM
from minrnn.models.minimal_coefficients import MINIMAL_CELLS
from minrnn.models.registry import CELLS

VARIANTS = [
    {"cell": cell, "preset": preset, "conv_kernel": kernel, "intermediate_size": mlp}
    for cell, preset, kernel, mlp in [
        ("mingru", "default", 4, 24),
        ("minlstm", "default", 4, 24),
        ("mingru", "paper", 4, 24),
        ("minlstm", "paper", 0, 0),
        ("mingru", "default", 1, 0),
        ("minlstm", "default", 6, 0),
        *((cell, "default", 3, 24) for cell in CELLS if cell not in MINIMAL_CELLS),
    ]
]
cells = pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.endswith("_signed")])
variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=["-".join(map(str, variant.values())) for variant in VARIANTS]
)
cuts_in = st.sets(st.integers(1, 23), max_size=4).map(sorted)
precisions = pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)

# The cells with an RMS norm of each head. Where its input is small, it multiplies rounding errors: with heads
# of 8 channels, rounding the weights to fp32 changes the logits by up to 2e-5.
NORMED_HEADS = ("gla", "hgrn2", "mlstm")


def tolerance(variant: dict[str, Any], atol: float) -> float:
    """`atol`, or in fp32 that of the cells with normed heads."""
    return 1e-4 if variant["cell"] in NORMED_HEADS and atol == 1e-5 else atol


def split_documents(ids: Tensor, mask: Tensor, starts: Tensor) -> list[list[Tensor]]:
    """For each row, its documents [1, length] without the padding."""
    rows = []
    for row in range(ids.shape[0]):
        real, begins = ids[row][mask[row]], starts[row][mask[row]]
        bounds = [0, *(t for t in range(1, len(real)) if begins[t]), len(real)]
        rows.append([real[low:high].unsqueeze(0) for low, high in itertools.pairwise(bounds)])
    return rows


def assert_equals_separate_documents(
    model: MinRNNForCausalLM, logits: Tensor, ids: Tensor, mask: Tensor, starts: Tensor, atol: float
) -> None:
    for row, documents in enumerate(split_documents(ids, mask, starts)):
        alone = torch.cat(
            [logits_of(model, document)[0] for document in documents if document.numel()]
            or [logits.new_zeros(0, VOCAB)]
        )
        assert_close(logits[row][mask[row]], alone, atol=atol, name=f"row {row}")


@precisions
@variants
def test_whole_equals_chunked_equals_token_by_token(variant, dtype, atol):
    atol = tolerance(variant, atol)
    model, ids = shared_model(dtype=dtype, **variant), random_ids(2, 24)
    whole = logits_of(model, ids)
    for cuts in ([1], [2, 3], [7, 7, 20], [23], list(range(1, 24))):
        assert_close(chunked_logits(model, ids, cuts)[0], whole, atol=atol, name=f"cuts {cuts}")


@precisions
@variants
@settings(max_examples=6)
@given(
    seed=st.integers(0, 999),
    real=st.sampled_from([0.1, 0.6, 1]),
    begins=st.sampled_from([0, 0.15, 0.6]),
    cuts=cuts_in,
    whole_mask=st.booleans(),
)
def test_documents_padding_and_cuts_together(variant, dtype, atol, seed, real, begins, cuts, whole_mask):
    """Each row's documents, run alone = packed, with padding anywhere, cut anywhere."""
    atol = tolerance(variant, atol)
    model, ids = shared_model(dtype=dtype, **variant), random_ids(3, 24)
    mask = torch.rand(3, 24, generator=generator(seed)) < real
    starts = (torch.rand(3, 24, generator=generator(seed + 1000)) < begins) & mask
    per_token = {"attention_mask": mask.long(), "document_starts": starts}
    logits, _ = chunked_logits(model, ids, cuts, whole_mask, **per_token)
    assert_equals_separate_documents(model, logits, ids, mask, starts, atol)


@precisions
@variants
@pytest.mark.parametrize("side", ["left", "right", "middle", "everything", "nothing"])
def test_padding_has_no_effect(variant, dtype, atol, side):
    """Padded = unpadded on real tokens and in their continuation; the pad token's embedding has no effect."""
    atol = tolerance(variant, atol)
    model, ids, more = shared_model(dtype=dtype, **variant), random_ids(2, 16), random_ids(2, 5, seed=1)
    mask = torch.ones(2, 16, dtype=torch.bool)
    hidden = {
        "left": slice(0, 6),
        "right": slice(9, 16),
        "middle": slice(4, 11),
        "everything": slice(0, 16),
        "nothing": slice(0, 0),
    }[side]
    mask[0, hidden] = False
    ids = ids.masked_fill(~mask, 0)
    cache = MinRNNCache(2)
    logits = logits_of(model, ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True)
    continued = logits_of(model, more, past_key_values=cache, use_cache=True)
    starts = torch.zeros_like(mask)
    assert_equals_separate_documents(model, logits, ids, mask, starts, atol)
    for row in range(2):
        whole = torch.cat([ids[row][mask[row]], more[row]]).unsqueeze(0)
        assert_close(
            continued[row : row + 1], logits_of(model, whole)[:, -5:], atol=atol, name=f"row {row} continued"
        )


@pytest.mark.parametrize(("cell", "kernel"), [("mingru", 0), *((cell, 4) for cell in CELLS)])
@pytest.mark.parametrize("whole_mask", [False, True])
def test_an_empty_chunk_keeps_the_state(cell, kernel, whole_mask):
    model, ids = shared_model(cell=cell, conv_kernel=kernel), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[1, 3] = True
    whole, state = chunked_logits(model, ids, [4], whole_mask, attention_mask=mask, document_starts=starts)
    actual, our_state = chunked_logits(
        model, ids, [0, 4, 4, 9], whole_mask, attention_mask=mask, document_starts=starts
    )
    assert torch.equal(actual[mask.bool()], whole[mask.bool()])
    assert our_state.get_seq_length() == 9
    assert all(
        torch.equal(tensor, state.state_dict()[name]) for name, tensor in our_state.state_dict().items()
    )


@pytest.mark.parametrize("options", [{}, {"attention_mask": torch.ones(2, 0, dtype=torch.long)}])
@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch_has_empty_logits(cell, options):
    """Without a state, with labels and without; the mean over no labels is NaN, as torch's."""
    model, ids = shared_model(cell=cell), torch.zeros(2, 0, dtype=torch.long)
    assert logits_of(model, ids, **options).shape == (2, 0, VOCAB)
    assert torch.isnan(model(ids, labels=ids, **options).loss)


@variants
def test_a_document_start_drops_the_state(variant):
    """Earlier tokens and the carried state change no bit of the logits after it."""
    model, ids = shared_model(**variant), random_ids(2, 12)
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[:, 5] = True
    other = ids.clone()
    other[:, :5] = random_ids(2, 5, seed=7)
    carried = MinRNNCache(2)
    logits_of(model, random_ids(2, 9, seed=8), past_key_values=carried, use_cache=True)
    fresh = MinRNNCache(2)
    again = logits_of(model, other, document_starts=starts, past_key_values=carried, use_cache=True)
    first = logits_of(model, ids, document_starts=starts, past_key_values=fresh, use_cache=True)
    assert torch.equal(first[:, 5:], again[:, 5:])
    assert not torch.allclose(first[:, :5], again[:, :5])
    fresh_saved, carried_saved = fresh.state_dict(), carried.state_dict()
    assert (fresh_saved.pop("num_tokens"), carried_saved.pop("num_tokens")) == (12, 21)
    for name, tensor in fresh_saved.items():
        assert torch.equal(tensor, carried_saved[name]), name


@pytest.mark.parametrize(
    ("cell", "preset"),
    [
        ("mingru", "paper"),
        ("minlstm", "paper"),
        *((cell, "default") for cell in CELLS if "signed" not in cell),
    ],
)
def test_gradients_of_a_packed_batch_are_the_sum(cell, preset):
    model, ids = shared_model(preset, torch.float64, cell=cell), random_ids(2, 17)
    starts = torch.zeros(2, 17, dtype=torch.bool)
    starts[:, [0, 4, 5, 11]] = True
    mask = torch.ones_like(starts)
    packed = gradients(
        model,
        model(ids, labels=ids.masked_fill(starts, -100), document_starts=starts, num_items_in_batch=1).loss,
    )
    documents = [document for row in split_documents(ids, mask, starts) for document in row]
    losses = [model(document, labels=document, num_items_in_batch=1).loss for document in documents]
    assert_same_gradients(
        packed, gradients(model, sum(losses, torch.zeros((), dtype=torch.float64))), atol=1e-12
    )


@cells
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_gradients_of_a_padded_batch_are_the_sum(cell, side):
    model, ids = shared_model(dtype=torch.float64, cell=cell), random_ids(2, 14)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, {"left": slice(0, 5), "right": slice(9, 14), "middle": slice(4, 9)}[side]] = False
    rows = [ids[row][mask[row]].unsqueeze(0) for row in range(2)]
    targets = torch.full_like(ids, -100)
    for row in range(2):
        targets[row, mask[row]] = torch.cat([rows[row][0, 1:], torch.tensor([-100])])
    padded = model(ids, attention_mask=mask.long(), shift_labels=targets, num_items_in_batch=3).loss
    alone = sum(
        (model(row, labels=row, num_items_in_batch=3).loss for row in rows),
        torch.zeros((), dtype=torch.float64),
    )
    assert_close(padded, alone, atol=1e-12)
    assert_same_gradients(gradients(model, padded), gradients(model, alone), atol=1e-12)


@cells
def test_gradient_flows_through_a_cut(cell):
    """An undetached cache: the losses of the chunks together have the gradient of the whole."""
    model, ids = shared_model(dtype=torch.float64, cell=cell), random_ids(2, 20)
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    whole = model(ids, shift_labels=targets, num_items_in_batch=1).loss
    cache, loss = MinRNNCache(2), torch.zeros((), dtype=torch.float64)
    for low, high in ((0, 2), (2, 3), (3, 20)):
        output = model(
            ids[:, low:high],
            past_key_values=cache,
            use_cache=True,
            shift_labels=targets[:, low:high],
            num_items_in_batch=1,
        )
        loss = loss + output.loss
    assert_close(loss, whole, atol=1e-12)
    assert_same_gradients(gradients(model, loss), gradients(model, whole), atol=1e-11)


def test_detach_cuts_the_gradient():
    model, ids = new_model(), random_ids(2, 6)
    cache = model(ids, use_cache=True).past_key_values
    assert all(layer.recurrent.requires_grad and layer.conv.requires_grad for layer in cache.layers)
    assert cache.detach_() is cache
    assert not any(layer.recurrent.requires_grad or layer.conv.requires_grad for layer in cache.layers)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("columns", [3, 7])
def test_boundaries_that_do_not_fit_are_refused(columns):
    model, ids = shared_model(), random_ids(2, 5)
    with pytest.raises(ValueError, match=r"document_starts must be \[batch, time\] = \(2, 5\)"):
        model(ids, document_starts=torch.zeros(2, columns, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, min(columns, 4)))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@cells
def test_a_row_of_padding_changes_no_gradient(cell):
    model, ids = shared_model(dtype=torch.float64, cell=cell), random_ids(3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1] = 0
    mask[2, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)

    def summed(rows: list[int]) -> dict[str, Tensor]:
        output = model(ids[rows], attention_mask=mask[rows], labels=labels[rows], num_items_in_batch=1)
        return gradients(model, output.loss)

    assert_same_gradients(summed([0, 1, 2]), summed([0, 2]), atol=1e-12)
