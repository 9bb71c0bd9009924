"""Prompts in pieces and tokens by hand = the whole at once."""

import pytest
import torch
from helpers import assert_close, generate, new_model, random_ids
from torch import Tensor

from minrnn.models import MinRNNCache, generation
from minrnn.models.decoding import TokenStep, prefill
from minrnn.models.registry import CELLS

cells = pytest.mark.parametrize("cell", CELLS)


@cells
@pytest.mark.parametrize("piece", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prompt_in_pieces_then_tokens_equal_the_whole(cell, piece, dtype):
    model, ids = new_model(dtype=dtype, cell=cell).eval(), random_ids(3, 17)
    with torch.no_grad():
        whole = model(ids, use_cache=True)
    logits, cache = prefill(model, ids[:, :9], piece=piece)
    assert isinstance(whole.logits, Tensor)
    assert_close(logits, whole.logits[:, 8], atol=1e-5 if dtype == torch.float32 else 1e-12)
    step = TokenStep(model, cache)
    for t in range(9, 17):
        assert_close(step(ids[:, t]), whole.logits[:, t], atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert step.cache.get_seq_length() == 17
    actual, expected_state = step.cache.state_dict(), whole.past_key_values.state_dict()
    assert actual.keys() == expected_state.keys()
    for name, tensor in actual.items():
        assert_close(tensor, expected_state[name], atol=1e-5)
    assert cache.get_seq_length() == 9, "the prompt's own cache stays where it is"


@pytest.mark.parametrize(
    "fields", [{"conv_kernel": 0}, {"output_gate": False, "candidate_activation": "g"}, {"gated_mlp": False}]
)
def test_every_block_has_its_token_step(fields):
    model, ids = new_model(dtype=torch.float64, **fields).eval(), random_ids(2, 6)
    with torch.no_grad():
        whole = model(ids).logits
    _, cache = prefill(model, ids[:, :5])
    assert_close(TokenStep(model, cache)(ids[:, 5]), whole[:, 5], atol=1e-12)


def test_first_token_needs_no_state():
    model, ids = new_model(dtype=torch.float64).eval(), random_ids(2, 3)
    cache = MinRNNCache(2)
    with torch.no_grad():
        whole = model(ids).logits
        pieces = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(3)]
    assert_close(torch.cat(pieces, dim=1), whole, atol=1e-12)


def test_compiled_token_step_is_the_same():
    model, ids = new_model(dtype=torch.float32).eval(), random_ids(2, 8)
    _, cache = prefill(model, ids)
    expected = TokenStep(model, cache)(ids[:, 0])
    for block in model.model.layers:
        block.compile(fullgraph=True)
    assert_close(TokenStep(model, cache)(ids[:, 0]), expected, atol=1e-5)


def test_generate_reads_a_long_prompt_in_pieces(monkeypatch):
    monkeypatch.setattr(generation, "PREFILL", 10)
    model, ids, lengths = (
        new_model(dtype=torch.float64, tie_word_embeddings=False).eval(),
        random_ids(2, 37),
        [],
    )
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    mask = torch.ones_like(ids)
    mask[1, :15] = 0  # left padding, longer than a piece
    output = generate(model, ids, 5, attention_mask=mask, pad_token_id=0, eos_token_id=None)
    assert max(lengths) == 10
    monkeypatch.setattr(generation, "PREFILL", 1000)
    assert torch.equal(
        output, generate(model, ids, 5, attention_mask=mask, pad_token_id=0, eos_token_id=None)
    )


def test_invalid_arguments_are_refused():
    model = new_model().eval()
    with pytest.raises(ValueError, match=r"input_ids \[batch, time\].*got \(2, 0\), 8192"):
        prefill(model, torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="call prefill first"):
        TokenStep(model, MinRNNCache(2))
    _, cache = prefill(model, random_ids(1, 2))
    with pytest.raises(ValueError, match="needs a model on one GPU, but this one is on cpu"):
        TokenStep(model, cache, graph=True)
