"""The model around the recurrence: loss, initialisation, precision, checkpointing, cache."""

from typing import Any

import pytest
import torch
from helpers import (
    VOCAB,
    assert_close,
    assert_same_gradients,
    gradients,
    logits_of,
    new_model,
    random_ids,
    shared_model,
)
from torch import Tensor

import minrnn.models.minimal_cells as minimal_cells
from minrnn.models import MinRNNCache, MinRNNConfig, MinRNNForCausalLM
from minrnn.models.minimal_coefficients import MINIMAL_CELLS
from minrnn.models.registry import CELLS

cells = pytest.mark.parametrize("cell", CELLS)
minimal_cells_only = pytest.mark.parametrize("cell", MINIMAL_CELLS)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over targets >= 0 of -log softmax."""
    scored = targets >= 0
    return -torch.log_softmax(logits, dim=-1)[scored].gather(1, targets[scored].unsqueeze(1)).sum()


@pytest.mark.parametrize("with_starts", [False, True])
def test_loss_is_that_of_the_next_token(with_starts):
    model, ids = shared_model(dtype=torch.float64), random_ids(3, 11)
    labels = ids.clone()
    labels[0, 4] = labels[2, 8:] = -100
    starts = None
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    if with_starts:
        starts = torch.zeros(3, 11, dtype=torch.bool)
        starts[:, [0, 3]] = starts[1, 7] = True
        targets[:, 2] = targets[1, 6] = -100
    logits = logits_of(model, ids, document_starts=starts)
    summed, count = cross_entropy(logits, targets), int((targets >= 0).sum())
    with torch.no_grad():
        assert_close(model(ids, labels=labels, document_starts=starts).loss, summed / count, atol=1e-13)
        assert_close(
            model(ids, shift_labels=targets, document_starts=starts).loss, summed / count, atol=1e-13
        )
        if starts is not None:
            labels = labels.masked_fill(starts, -100)  # what nothing predicts may not be counted
        for items in (7, torch.tensor(7)):
            assert_close(
                model(ids, labels=labels, document_starts=starts, num_items_in_batch=items).loss,
                summed / 7,
                atol=1e-13,
            )
            assert_close(
                model(ids, shift_labels=targets, document_starts=starts, num_items_in_batch=items).loss,
                summed / 7,
                atol=1e-13,
            )
        assert model(ids, document_starts=starts).loss is None


def test_accumulated_loss_is_the_loss_of_the_batch():
    model, ids = shared_model(dtype=torch.float64), random_ids(4, 9)
    count = 4 * 8
    with torch.no_grad():
        parts = [model(part, labels=part, num_items_in_batch=count).loss for part in ids.split([1, 3])]
        assert_close(torch.stack(parts).sum(), model(ids, labels=ids).loss, atol=1e-13)


def test_logits_to_keep_and_embeddings_as_input():
    model, ids = shared_model(), random_ids(2, 7)
    whole = logits_of(model, ids)
    assert_close(logits_of(model, ids, logits_to_keep=3), whole[:, -3:], atol=1e-6)
    assert_close(logits_of(model, ids, logits_to_keep=torch.tensor([0, 5])), whole[:, [0, 5]], atol=1e-6)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert_close(embedded, whole, atol=1e-6)


def test_hidden_states_and_tuples():
    model, ids = shared_model(), random_ids(2, 7)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        as_tuple = model(ids, labels=ids, return_dict=False)
    assert len(output.hidden_states) == 3
    assert_close(model.lm_head(output.hidden_states[-1]), output.logits, atol=1e-6)
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[1], output.logits)


@cells
@pytest.mark.parametrize("carried", [False, True])
def test_gradient_checkpointing_changes_nothing(cell, carried):
    """Same loss, same gradients, same state; with a carried state, the chunk before it matters."""
    ids = random_ids(2, 12)
    results, calls = [], []
    for checkpointing in (False, True):
        model = new_model(dtype=torch.float64, cell=cell).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        cache = None
        if carried:
            cache = MinRNNCache(2)
            model(ids[:, :5], past_key_values=cache, use_cache=True)
            cache.detach_()
        output = model(ids[:, 5:], labels=ids[:, 5:], past_key_values=cache, use_cache=carried)
        state = {} if output.past_key_values is None else output.past_key_values.state_dict()
        count = []
        model.model.layers[0].get_submodule("mixer").register_forward_hook(
            lambda *args, count=count: count.append(1)
        )
        results.append((output.loss, gradients(model, output.loss), state))
        calls.append(len(count))
    assert calls == [0, 1]  # blocks that the backward pass ran again
    (loss, grads, state), (actual, our_grads, our_state) = results
    assert_close(actual, loss, atol=1e-14)
    assert_same_gradients(our_grads, grads, atol=1e-13)
    assert our_state.keys() == state.keys()
    assert bool(state) == carried
    assert all(torch.equal(our_state[name], tensor) for name, tensor in state.items())


def test_dropout_only_in_training():
    model, ids = new_model(dropout=0.5), random_ids(2, 9)
    assert torch.equal(logits_of(model, ids), logits_of(model, ids))
    model.train()
    assert not torch.equal(logits_of(model, ids), logits_of(model, ids))


@pytest.mark.parametrize(
    ("preset", "cell"), [("default", cell) for cell in CELLS] + [("paper", cell) for cell in MINIMAL_CELLS]
)
def test_activation_scale_is_steady_with_depth(preset, cell):
    """At initialisation, the residual stream after 16 blocks is as large as after 2."""
    sizes = {}
    for depth in (2, 16):
        torch.manual_seed(0)
        config = MinRNNConfig.from_preset(
            preset, cell=cell, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=depth, intermediate_size=64
        )
        model, norms = MinRNNForCausalLM(config).eval(), []

        def record(module, args, output: Any, norms=norms) -> None:
            norms.append(output[0].square().mean().sqrt())

        model.model.layers[-1].register_forward_hook(record)
        logits = logits_of(model, random_ids(8, 64))
        assert 0.3 < logits.std() < 3
        sizes[depth] = float(norms[0])
    assert 0.6 < sizes[16] / sizes[2] < 1.6, sizes


@minimal_cells_only
def test_state_is_fp32_under_autocast(cell, monkeypatch):
    seen = []

    def recording(projected, gate_bias, h0, **kwargs):
        seen.append((projected.dtype, gate_bias.dtype, None if h0 is None else h0.dtype))
        return scan(projected, gate_bias, h0, **kwargs)

    scan = minimal_cells.cell_scan
    monkeypatch.setattr(minimal_cells, "cell_scan", recording)
    model, ids, cache = new_model(cell=cell), random_ids(2, 9), MinRNNCache(2)
    exact = logits_of(model, ids)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pieces = [
            logits_of(model, ids[:, low:high], past_key_values=cache, use_cache=True)
            for low, high in ((0, 4), (4, 9))
        ]
        output = model(ids, labels=ids)
    assert (
        seen[:4]
        == [(torch.bfloat16, torch.float32, None)] * 2 + [(torch.bfloat16, torch.float32, torch.float32)] * 2
    )
    assert all(
        layer.recurrent is not None and layer.recurrent.dtype == torch.float32 for layer in cache.layers
    )
    assert output.loss.dtype == torch.float32
    assert_close(torch.cat(pieces, dim=1), exact, atol=0.05)  # a few layers of bf16, 2**-8 each


@cells
def test_a_bf16_model_keeps_its_state_in_fp32(cell):
    model, ids = new_model(dtype=torch.bfloat16, cell=cell), random_ids(2, 9)
    cache = MinRNNCache(2)
    logits = logits_of(model, ids, past_key_values=cache, use_cache=True)
    assert logits.dtype == torch.bfloat16
    for layer in cache.layers:
        assert layer.recurrent is not None
        assert layer.conv is not None
        assert (layer.recurrent.dtype, layer.conv.dtype) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        assert model(ids, labels=ids).loss.dtype == torch.float32


def test_backends_agree():
    ids = random_ids(2, 33)
    expected = logits_of(new_model(scan_backend="reference"), ids)
    for backend in ("torch", "numba", None):
        assert_close(logits_of(new_model(scan_backend=backend), ids), expected, atol=1e-5)


def test_cache_stores_and_loads():
    model, ids, more = shared_model(), random_ids(2, 6), random_ids(2, 4, seed=1)
    cache = MinRNNCache(2)
    assert cache.state_dict() == {}
    logits_of(model, ids, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 6
    state = cache.state_dict()
    assert set(state) == {f"layers.{i}.{kind}" for i in range(2) for kind in ("recurrent", "conv")} | {
        "num_tokens"
    }
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    restored = MinRNNCache(2).load_state_dict(state)
    expected = logits_of(model, more, past_key_values=cache, use_cache=True)
    assert torch.equal(logits_of(model, more, past_key_values=restored, use_cache=True), expected)
    restored.load_state_dict({})
    assert torch.equal(
        logits_of(model, more, past_key_values=restored, use_cache=True), logits_of(model, more)
    )


def test_cache_is_read_but_not_written_without_use_cache():
    model, ids, more = shared_model(), random_ids(2, 6), random_ids(2, 4, seed=1)
    cache = MinRNNCache(2)
    logits_of(model, ids, past_key_values=cache, use_cache=True)
    before = cache.state_dict()
    first = logits_of(model, more, past_key_values=cache, use_cache=False)
    assert torch.equal(first, logits_of(model, more, past_key_values=cache, use_cache=False))
    assert not torch.allclose(first, logits_of(model, more))
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.state_dict().items())


def test_cache_rows_can_be_picked_repeated_and_reset():
    model, ids, more = shared_model(dtype=torch.float64), random_ids(3, 6), random_ids(4, 4, seed=1)
    cache = MinRNNCache(2)
    logits_of(model, ids, past_key_values=cache, use_cache=True)
    cache.reorder_cache(torch.LongTensor([2, 0]))
    cache.batch_repeat_interleave(2)
    actual = logits_of(model, more, past_key_values=cache, use_cache=True)
    assert_close(actual, logits_of(model, torch.cat([ids[[2, 2, 0, 0]], more], dim=1))[:, 6:], atol=1e-12)
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.layers[0].recurrent is not None
    assert cache.layers[0].recurrent.shape == (1, model.config.recurrent_size)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits_of(model, more, past_key_values=cache, use_cache=True), logits_of(model, more))
