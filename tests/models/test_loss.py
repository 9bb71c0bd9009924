"""The loss without logits is the loss from logits."""

from typing import Any, cast

import pytest
import torch
from helpers import assert_close, new_model, random_ids
from hypothesis import given
from hypothesis import strategies as st

from minrnn.models.loss import (
    LMHead,
    linear_cross_entropy,
    loss_of_module_head,
    next_token_loss,
    softcapped,
    without_padding,
)


def problem(num_tokens: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 7, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 7, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return hidden, weight, targets.masked_fill(torch.rand(num_tokens, generator=generator) < 0.3, -100)


@given(
    num_tokens=st.integers(1, 20),
    vocab=st.integers(1, 11),
    block=st.integers(1, 25),
    num_items=st.sampled_from([None, 3, 2.5]),
)
def test_any_block_gives_loss_and_gradients_of_the_whole(num_tokens, vocab, block, num_items):
    hidden, weight, targets = problem(num_tokens, vocab)
    targets[0] = 0  # at least one is scored
    actual = linear_cross_entropy(hidden, weight, targets, num_items, block)
    plain = next_token_loss(hidden @ weight.t(), targets, num_items)
    assert_close(actual, plain, atol=1e-12)
    for grad, other in zip(
        torch.autograd.grad(actual * 3, (hidden, weight)),
        torch.autograd.grad(plain * 3, (hidden, weight)),
        strict=True,
    ):
        assert_close(grad, other, atol=1e-12)


@given(
    z_loss=st.floats(1e-4, 0.5),
    block=st.integers(1, 25),
    softcap=st.sampled_from([None, 3.0]),
    num_items=st.sampled_from([None, 3]),
)
def test_the_square_of_log_z_is_added_to_the_loss(z_loss, block, softcap, num_items):
    """Also by the loss from logits, and by that of any head; padding of the vocabulary has no part in Z."""
    hidden, weight, targets = problem(20, 9)
    targets = targets.clamp(max=6)
    targets[0] = 0
    logits = (hidden @ weight.t())[:, :7]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    scored = targets != -100
    count = num_items or scored.sum()
    log_z = logits[scored].exp().sum(1).log()
    expected = (log_z - logits[scored, targets[scored]] + z_loss * log_z.square()).sum() / count

    def head(rows: torch.Tensor) -> torch.Tensor:
        return without_padding(softcapped(rows @ weight.t(), softcap), 7)

    losses = [
        linear_cross_entropy(hidden, weight, targets, num_items, block, 7, softcap, z_loss),
        next_token_loss(head(hidden), targets, num_items, z_loss),
        loss_of_module_head(head, hidden, targets, num_items, block, z_loss),
    ]
    gradients = torch.autograd.grad(expected, (hidden, weight), retain_graph=True)
    for loss in losses:
        assert_close(loss, expected, atol=1e-10)
        for actual, gradient in zip(torch.autograd.grad(loss, (hidden, weight)), gradients, strict=True):
            assert_close(actual, gradient, atol=1e-10)


@pytest.mark.parametrize("z_loss", [-1e-4, float("nan"), float("inf")])
def test_a_weight_of_log_z_must_be_a_number(z_loss):
    hidden, weight, targets = problem(3, 5)
    for loss in (
        lambda: linear_cross_entropy(hidden, weight, targets, z_loss=z_loss),
        lambda: next_token_loss(hidden @ weight.t(), targets, z_loss=z_loss),
    ):
        with pytest.raises(ValueError, match="z_loss must be at least 0 and finite"):
            loss()


def test_bf16_products_are_summed_in_fp32():
    """Under autocast the loss keeps fp32's digits, and gradients those of bf16 products."""
    hidden, weight, targets = problem(4000, 50, dtype=torch.float32)
    exact = next_token_loss(hidden.double() @ weight.double().t(), targets)
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_cross_entropy(hidden, weight, targets, block=64)
    assert actual.dtype == torch.float32
    assert abs(actual.item() / exact.item() - 1) < 1e-3  # rounding of 4000 rows of logits to 2^-9, averaged
    for grad, other in zip(torch.autograd.grad(actual, (hidden, weight)), exact_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - other).norm() / other.norm() < 6e-3


def test_ignored_tokens_have_no_effect():
    hidden, weight, targets = problem(9, 5)
    clean = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    broken = hidden.detach().masked_fill((targets == -100).unsqueeze(1), float("nan")).requires_grad_()
    assert (targets == -100).any()
    loss = linear_cross_entropy(broken, weight, targets, block=4)
    assert_close(loss, linear_cross_entropy(hidden, weight, targets), atol=1e-12)
    grad = torch.autograd.grad(loss, broken)[0]
    assert_close(grad[targets != -100], clean[0][targets != -100], atol=1e-12)


@pytest.mark.parametrize("num_items", [None, 100])
def test_the_model_needs_no_logits(num_items):
    model, ids = new_model(dtype=torch.float64), random_ids(2, 11)
    plain = model(ids, labels=ids, num_items_in_batch=num_items)
    skipped = model(ids, labels=ids, num_items_in_batch=num_items, skip_logits=True)
    assert skipped.logits is None
    assert_close(skipped.loss, plain.loss, atol=1e-12)
    with pytest.raises(ValueError, match="without labels or shift_labels"):
        model(ids, skip_logits=True)


def test_a_resized_vocabulary_keeps_its_loss():
    model, ids = new_model(dtype=torch.float64, tie_word_embeddings=False), random_ids(2, 11)
    before = model(ids, labels=ids).logits
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    assert isinstance(model.lm_head, LMHead)
    assert_close(model(ids).logits[..., :-8], before, atol=1e-12)
    assert_close(model(ids, labels=ids, skip_logits=True).loss, model(ids, labels=ids).loss, atol=1e-12)


@given(num_tokens=st.integers(1, 11), block=st.integers(1, 25))
def test_padding_of_the_vocabulary_has_no_part_in_the_loss(num_tokens, block):
    """Loss and gradients are those of a head without the padded rows; these get no gradient."""
    hidden, weight, targets = problem(12, 11)
    targets = targets.where(targets < num_tokens, -100)
    targets[0] = 0
    actual = linear_cross_entropy(hidden, weight, targets, block=block, num_tokens=num_tokens)
    plain = next_token_loss(hidden @ weight[:num_tokens].t(), targets)
    assert_close(actual, plain, atol=1e-12)
    grads = torch.autograd.grad(actual, (hidden, weight))
    expected = torch.autograd.grad(plain, (hidden, weight))
    for grad, other in zip(grads, expected, strict=True):
        assert_close(grad, other, atol=1e-12)
    assert (grads[1][num_tokens:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_padding_of_the_vocabulary_never_wins(dtype):
    """Not in logits, the loss, or generation, even if its rows would have the largest logits."""
    model: Any = new_model(dtype=dtype, num_tokens=11, tie_word_embeddings=False)
    ids = random_ids(2, 9) % 11
    with torch.no_grad():
        unmasked = new_model(dtype=dtype, tie_word_embeddings=False)
        unmasked.load_state_dict(model.state_dict())
        model.lm_head.weight[11:] = 100 * model.lm_head.weight[:1]
    logits = model(ids).logits
    assert_close(logits[..., :11], unmasked(ids).logits[..., :11], atol=1e-12)
    probabilities = logits.float().softmax(-1)
    assert (probabilities[..., 11:] == 0).all()
    assert torch.isfinite(logits).all()
    plain = model(ids, labels=ids).loss
    assert_close(model(ids, labels=ids, skip_logits=True).loss, plain, atol=1e-2)
    assert plain < 20
    new = cast(Any, model).generate(ids, max_new_tokens=8, do_sample=True, temperature=5.0, top_k=0)
    assert (new < 11).all()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("more", [0, 8])
def test_a_resized_vocabulary_has_no_padding(is_tied, more):
    """Also where the padded rows are enough for the new tokens."""
    model = new_model(num_tokens=11, tie_word_embeddings=is_tied)
    model.resize_token_embeddings(model.config.vocab_size + more, mean_resizing=False)
    assert model.config.num_tokens is None
    assert (model(random_ids(1, 3)).logits > -1e30).all()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("new", "expected"), [(50, 50), (None, 11)])
def test_rows_that_a_resize_adds_beyond_the_tokens_are_padding(is_tied, new, expected):
    model = new_model(num_tokens=11, tie_word_embeddings=is_tied)
    model.resize_token_embeddings(new, pad_to_multiple_of=64, mean_resizing=False)
    assert (model.config.vocab_size, model.config.num_tokens) == (64, expected)
    logits = model(random_ids(1, 3)).logits
    assert logits is not None
    assert (logits[..., :expected] > -1e30).all()
    assert (logits[..., expected:] < -1e30).all()
