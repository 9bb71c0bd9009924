"""Models of transformers in our pipeline: the adapter's loss, what is measured of them, decoding."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import TRANSFORMERS, VOCAB, tiny_model
from torch import Tensor

from minrnn.common.errors import UserError
from minrnn.models.loss import IGNORE_INDEX, next_token_loss
from minrnn.pipeline.families.adapter import FamilyModel
from minrnn.pipeline.families.build import adapt, build_causal_lm, training_config
from minrnn.pipeline.families.decoding import FamilyDecoder, has_exact_cache
from minrnn.pipeline.families.limits import (
    NO_DOCUMENTS,
    NO_PADDING,
    NO_ROUTER_LOSS,
    NO_STATE,
    positions_in_documents,
)
from minrnn.pipeline.families.registry import config_of
from minrnn.pipeline.optim import decaying_parameters

CPU = torch.device("cpu")
TIME = 24
SEPARATING = ("llama", "gpt2")
SOFT_CAP = ("recurrent_gemma", "xlstm")


def ids_of(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_loss_is_that_of_the_logits(name: str):
    """With the scale that the loop passes, with all gradients, under the model's own parameter names."""
    inner = tiny_model(name, dtype=torch.float64 if name in SEPARATING else torch.float32)
    names = [key for key, _ in inner.named_parameters()]
    ids, targets = ids_of(2, TIME), ids_of(2, TIME, seed=1)
    targets[0, :5] = IGNORE_INDEX
    next_token_loss(inner(input_ids=ids, use_cache=False).logits, targets, 7.0).backward()
    expected = [parameter.grad.clone() for parameter in inner.parameters() if parameter.grad is not None]
    loss = next_token_loss(inner(input_ids=ids, use_cache=False).logits, targets, 7.0)
    model = adapt(name, inner, CPU)
    assert [key for key, _ in model.named_parameters()] == names
    assert model.abilities.has_plain_head == (name not in SOFT_CAP)
    for skip_logits in (True, False):
        model.zero_grad()
        output = model(ids, shift_labels=targets, skip_logits=skip_logits, num_items_in_batch=7.0)
        torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-6)
        output.loss.backward()
        actual = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for value, gradient in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, gradient, rtol=1e-4, atol=1e-6)
    columns = torch.tensor([3, 17])
    some = model(ids, logits_to_keep=columns).logits
    torch.testing.assert_close(some, model(ids).logits[:, columns])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_limits_are_measured(name: str):
    model = adapt(name, tiny_model(name), CPU)
    dropout = ["trains with dropout: resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1"] * (name == "gpt2")
    documents = [NO_DOCUMENTS] * (name not in SEPARATING)
    padding = [NO_PADDING] * (name in ("xlstm", "recurrent_gemma"))
    assert model.limits == [NO_STATE, *documents, *padding, *dropout]
    assert model.abilities.is_causal


@settings(max_examples=5)
@given(left=st.integers(1, 6), right=st.integers(0, 6), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_padding_is_skipped_or_said_to_be_read(name: str, left: int, right: int, seed: int):
    """Behind a text it changes nothing; before a text, only where the limits say so."""
    model, ids = PADDED[name], ids_of(1, 11, seed)
    expected = model.inner(input_ids=ids, use_cache=False).logits[0]
    for padding in ((0, right), (left, right)):
        mask = torch.nn.functional.pad(torch.ones_like(ids), padding)
        padded = torch.nn.functional.pad(ids, padding, value=256)
        inputs = {
            "input_ids": padded,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        actual = model.inner(**inputs, use_cache=False).logits[mask.bool()]
        is_same = torch.allclose(actual, expected, rtol=1e-3, atol=1e-4)
        assert is_same == (padding[0] == 0 or NO_PADDING not in model.limits)


def test_dropout_is_mentioned_where_it_is_active():
    """And only there: the loss of a chunk depends on the random state."""
    ids = ids_of(2, 9)
    for more, is_random in (
        ({}, True),
        (dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), False),
    ):
        model = adapt("gpt2", tiny_model("gpt2", **more), CPU).train()
        one, other = (model(ids, shift_labels=ids, skip_logits=True).loss.item() for _ in range(2))
        assert (one != other) == is_random
        assert any("dropout" in limit for limit in model.limits) == is_random


PADDED = {name: adapt(name, tiny_model(name), CPU).eval() for name in TRANSFORMERS}
MODELS = {name: adapt(name, tiny_model(name, torch.float64), CPU) for name in SEPARATING}


@settings(max_examples=25)
@given(
    name=st.sampled_from(SEPARATING), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 99)
)
def test_packed_documents_equal_separate_ones(name: str, density: float, seed: int):
    model, ids = MODELS[name], ids_of(2, TIME, seed)
    starts = torch.rand(2, TIME, generator=torch.Generator().manual_seed(seed)) < density
    with torch.no_grad():
        packed = model(ids, document_starts=starts).logits
        for row in range(2):
            edges = [0, *(t for t in range(1, TIME) if starts[row, t]), TIME]
            parts = [ids[row, a:b][None] for a, b in itertools.pairwise(edges)]
            alone = torch.cat([model.inner(input_ids=part, use_cache=False).logits[0] for part in parts])
            torch.testing.assert_close(packed[row], alone, rtol=1e-5, atol=1e-6)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_positions_restart_at_documents(starts: list[bool]):
    positions = positions_in_documents(torch.tensor([starts]))[0].tolist()
    expected = 0
    for position, is_start in zip(positions, starts, strict=True):
        expected = 0 if is_start else expected
        assert position == expected
        expected += 1


def test_a_model_that_reads_ahead_is_refused():
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
    torch.manual_seed(0)
    with pytest.raises(
        UserError, match=r"bert reads the tokens that it should predict; set family_config {is_d"
    ):
        adapt("bert", build_causal_lm("bert", config_of("bert", fields)), CPU)
    adapt("bert", build_causal_lm("bert", config_of("bert", {**fields, "is_decoder": True})), CPU)


def test_a_model_that_cannot_run_here_is_refused(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(UserError, match=r"model.family: llama cannot run on cpu: ZeroDivisionError"):
        adapt("llama", model, CPU)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"model.family_config: llama cannot be built: "):
        build_causal_lm("llama", config_of("llama", {"num_attention_heads": 32, "num_key_value_heads": 0}))
    with pytest.raises(UserError, match=r"model.tie_word_embeddings: xlstm cannot tie its head"):
        tiny_model("xlstm", tie_word_embeddings=True)


def test_routers_are_mentioned():
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {**sizes, "num_key_value_heads": 2, "vocab_size": VOCAB}
    model = adapt("mixtral", build_causal_lm("mixtral", config_of("mixtral", fields)), CPU)
    assert NO_ROUTER_LOSS in model.limits


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_token_after_another_equals_reading_all(name: str):
    """Also of a family whose cache gives other logits, or that returns none."""
    model, ids = tiny_model(name), ids_of(2, 9)
    assert has_exact_cache(model) == (name != "recurrent_gemma")
    step = FamilyDecoder(model, ids)
    logits = step.logits
    for _ in range(4):
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-4)
        ids = torch.cat([ids, whole.argmax(-1, keepdim=True)], 1)
        logits = step(whole.argmax(-1))


def test_what_training_adds_to_a_configuration_is_not_exported():
    config = config_of("mamba", {"hidden_size": 32})
    pytest.importorskip("mambapy")
    assert training_config("mamba", config).use_mambapy
    assert not config.use_mambapy


@pytest.mark.parametrize("name", ["llama", "mamba", "gpt2"])
def test_weight_decay_is_for_matrices_that_are_no_embeddings(name: str):
    model = adapt(name, tiny_model(name), CPU)
    decaying = decaying_parameters(model)
    assert decaying
    for key, parameter in model.named_parameters():
        is_exempt = (
            parameter.ndim < 2
            or "embed" in key
            or "wte" in key
            or "wpe" in key
            or "A_log" in key
            or "norm" in key
        )
        assert (key in decaying) == (not is_exempt), key


def test_the_adapter_refuses_a_state():
    model = MODELS["llama"]
    assert isinstance(model, FamilyModel)
    with pytest.raises(AssertionError, match="carries no state"):
        model(ids_of(1, 3), use_cache=True)
