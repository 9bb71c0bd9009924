"""Blocks with attention over a sliding window: against a naive twin, and cut anywhere."""

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_close,
    assert_gradients_through_chunks,
    chunked_logits,
    generate,
    generator,
    logits_of,
    new_model,
    random_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.models import attention as attention_module
from minrnn.models.attention import BASE, WindowAttention, window_attention
from minrnn.models.boundaries import NO_BOUNDARIES, Boundaries
from minrnn.models.registry import mixer_classes

TIME = 14
starts_in = st.lists(st.booleans(), min_size=TIME, max_size=TIME)
windows = pytest.mark.parametrize("window", [2, 5, TIME, 3 * TIME])


def hybrid(window: int = 4, **fields: Any) -> MinRNNForCausalLM:
    return new_model(attention_every=2, attention_window=window, **fields)


def mixer_of(model: MinRNNForCausalLM) -> WindowAttention:
    return cast(Any, model.model.layers)[1].mixer


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Several blocks in a row of `TIME` tokens."""
    monkeypatch.setattr(attention_module, "BLOCK", 2)


def naive(mixer: WindowAttention, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """x [T, H] -> [T, H], one head and one token at a time, positions counted from the row's first token."""
    q, k, v = mixer.in_proj(x).split(mixer.widths, dim=-1)
    width = x.shape[1] // mixer.num_heads
    frequencies = BASE ** -(torch.arange(width // 2, dtype=x.dtype) / (width // 2))
    document = starts.long().cumsum(0)

    def head(values: torch.Tensor, index: int, token: int) -> torch.Tensor:
        values = values[token, index * width : (index + 1) * width]
        values = values / (values.square().mean() + 1e-6).sqrt()
        pairs = torch.complex(values[: width // 2], values[width // 2 :])
        pairs = pairs * torch.exp(1j * token * frequencies)
        return torch.cat([pairs.real, pairs.imag])

    rows = []
    for token in range(len(x)):
        read = [s for s in range(token + 1) if s > token - mixer.window and document[s] == document[token]]
        parts = []
        for index in range(mixer.num_heads):
            query = head(q, index, token)
            scores = torch.stack([query @ head(k, index, s) for s in read]) / math.sqrt(width)
            values = torch.stack([v[s, index * width : (index + 1) * width] for s in read])
            parts.append(scores.softmax(0) @ values)
        rows.append(torch.cat(parts))
    return mixer.out_proj(torch.stack(rows))


@windows
@given(starts=starts_in)
@settings(max_examples=5)
def test_it_equals_the_naive_twin(window, starts):
    mixer = mixer_of(hybrid(window, hidden_size=128, dtype=torch.float64))
    assert mixer.num_heads == 2
    x = torch.randn(1, TIME, 128, generator=generator(0), dtype=torch.float64, requires_grad=True)
    boundaries = Boundaries.of(torch.tensor([starts]), None, 4)
    actual, _ = mixer(x, (None, None), boundaries)
    expected = naive(mixer, x[0], torch.tensor(starts))
    assert_close(actual[0], expected, atol=1e-10)
    weights = torch.randn(TIME, 128, generator=generator(1), dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), x) for y in (actual[0], expected)), strict=True)
    for gradient, naive_gradient in pairs:
        assert_close(gradient, naive_gradient, atol=1e-10)


@windows
@given(starts=starts_in, cuts=st.sets(st.integers(1, TIME - 1), max_size=4))
@settings(max_examples=5)
def test_whole_cut_and_token_by_token_are_the_same(window, starts, cuts):
    """With documents, and padding on the left."""
    model, ids, starts = hybrid(window), random_ids(1, TIME), torch.tensor([starts])
    whole = logits_of(model, ids, document_starts=starts)
    for edges in (sorted(cuts), list(range(1, TIME))):
        pieces, _ = chunked_logits(model, ids, edges, document_starts=starts)
        assert_close(pieces, whole, atol=1e-4)
    padded, mask = F.pad(ids, (3, 0)), F.pad(torch.ones_like(ids), (3, 0))
    inputs = {"attention_mask": mask, "document_starts": F.pad(starts, (3, 0))}
    assert_close(logits_of(model, padded, **inputs)[:, 3:], whole, atol=1e-4)


@given(lengths=st.lists(st.integers(1, TIME), min_size=3, max_size=3))
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=5)
def test_the_state_after_padded_rows_is_that_of_the_rows_alone(side, lengths):
    model, ids = hybrid(), random_ids(3, TIME)
    mask = torch.arange(TIME) < torch.tensor(lengths).unsqueeze(1)
    mask = mask.flip(1) if side == "left" else mask
    with torch.no_grad():
        state = model(ids, attention_mask=mask.long(), use_cache=True).past_key_values
        following = model(ids[:, :3], past_key_values=state).logits
        for row in range(3):
            own = model(ids[row : row + 1, mask[row]], use_cache=True).past_key_values
            expected = model(ids[row : row + 1, :3], past_key_values=own).logits
            assert_close(following[row : row + 1], expected, atol=1e-4)


def test_packed_documents_are_read_like_separate_ones():
    model, lengths = hybrid(), [3, 1, 7, 3]
    documents = [random_ids(1, length, seed=length) for length in lengths]
    starts = torch.zeros(1, TIME, dtype=torch.bool)
    starts[0, [0, 3, 4, 11]] = True
    packed = logits_of(model, torch.cat(documents, 1), document_starts=starts)
    separate = torch.cat([logits_of(model, document) for document in documents], 1)
    assert_close(packed, separate, atol=1e-4)


@pytest.mark.parametrize("cell", ["minlstm", "rglru", "mlstm"])
def test_gradients_through_chunks_are_those_of_one_pass(cell):
    """Of all parameters, fp64, with documents and recomputation."""
    fields = {} if cell == "mlstm" else {"output_norm": True}
    model = hybrid(6, cell=cell, dtype=torch.float64, **fields).train()
    inputs = {"input_ids": random_ids(2, TIME), "shift_labels": random_ids(2, TIME, seed=1)}
    inputs["document_starts"] = torch.rand(2, TIME, generator=generator(3)) < 0.1
    expected = assert_gradients_through_chunks(model, inputs, 4, ("none", "selective", "full"))
    assert expected["model.layers.1.mixer.in_proj.weight"].any()


def test_blocks_of_any_length_give_the_same(monkeypatch):
    q = torch.randn(2, 50, 32, generator=generator(0), dtype=torch.float64)
    tokens = torch.randn(2, 56, 65, generator=generator(1), dtype=torch.float64)
    tokens[..., -1] = (torch.arange(56) >= torch.tensor([[4], [0]])).double()
    results = []
    for block in (1, 16, 25, 64):
        monkeypatch.setattr(attention_module, "BLOCK", block)
        results.append(window_attention(q, tokens, None, 7, 2))
    for result in results[1:]:
        assert_close(result, results[0], atol=1e-12)


def test_bf16_autocast():
    model, ids = hybrid(), random_ids(2, TIME)
    exact = logits_of(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(logits_of(model, ids).float(), exact, atol=0.05)


def test_an_empty_sequence():
    model = hybrid()
    y, (recurrent, tail) = mixer_of(model)(torch.zeros(2, 0, 16), (None, None), NO_BOUNDARIES)
    assert y.shape == (2, 0, 16)
    assert recurrent is None
    assert tail.shape == (2, 3, 33)
    assert not tail.any()


def test_which_blocks_attend():
    mixers = mixer_classes(MinRNNConfig(num_hidden_layers=7, attention_every=3))
    assert [mixer is WindowAttention for mixer in mixers] == [False, False, True, False, False, True, False]
    shapes = MinRNNConfig(attention_every=2, attention_window=8, num_hidden_layers=2).state_shapes(5)
    assert shapes == [((5, 384), (5, 3, 256)), (None, (5, 7, 513))]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_every": 1}, r"attention_every: must be from 2 to num_hidden_layers \(4\), or null"),
        ({"attention_every": 5}, r"attention_every: must be from 2 to num_hidden_layers \(4\), or null"),
        ({"attention_every": 2, "attention_window": 1}, "attention_window: must be at least 2 tokens, not 1"),
        ({"attention_window": 64}, "attention_window: is for models with attention: set attention_every"),
    ],
)
def test_values_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        MinRNNConfig(**fields)


def test_a_state_of_another_window_is_refused():
    short, long = hybrid(4), hybrid(5)
    state = short(random_ids(2, TIME), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"conv of layer 1 is \(2, 3, 33\), but should be \(2, 4, 33\)"):
        long(random_ids(2, 2), past_key_values=state)
    assert state.has_previous_state()
    restored = type(state)(2).load_state_dict(state.state_dict())
    following = random_ids(2, 3, seed=5)
    assert torch.equal(
        short(following, past_key_values=restored).logits, short(following, past_key_values=state).logits
    )


def test_generation_and_an_export(tmp_path):
    model, ids = hybrid(), random_ids(1, 5)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = MinRNNForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
