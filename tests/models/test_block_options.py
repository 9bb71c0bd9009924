"""Options of the block: norm of the output, residual scales, zero projections, bounded logits."""

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
from minrnn.models.boundaries import NO_BOUNDARIES
from minrnn.models.loss import linear_cross_entropy
from minrnn.models.registry import CELLS

TIME = 12
ALL: dict[str, Any] = {"output_norm": True, "residual_scales": True, "logit_softcap": 2.0}
NORMED = [cell for cell, mixer in CELLS.items() if mixer.takes_output_norm]
normed = pytest.mark.parametrize("cell", NORMED)
starts_in = st.lists(st.booleans(), min_size=TIME, max_size=TIME)


def mixer_of(model: MinRNNForCausalLM) -> Any:
    return cast(Any, model.model.layers)[0].mixer


def test_which_cells_take_the_norm():
    assert [cell for cell in CELLS if cell not in NORMED] == ["gilr_lstm", "hgrn2", "mlstm", "gla"]


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in NORMED])
def test_the_other_cells_refuse_it(cell):
    with pytest.raises(ValueError, match=f"output_norm: is for mingru, .*; {cell} has a norm or a gate of"):
        MinRNNConfig(cell=cell, output_norm=True)


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), float("nan")])
def test_a_bound_of_logits_must_be_a_positive_number(bound):
    with pytest.raises(ValueError, match=r"logit_softcap: must be (positive|finite)"):
        MinRNNConfig(logit_softcap=bound)


@normed
@pytest.mark.parametrize("output_gate", [True, False])
def test_the_norm_is_that_of_each_group_of_the_ungated_output(cell, output_gate):
    """Against the mixer without norm and gate, with the same weights."""
    sizes: dict[str, Any] = {"cell": cell, "hidden_size": 64, "expansion_factor": 2, "num_hidden_layers": 1}
    mixer = mixer_of(new_model(**sizes, output_norm=True, output_gate=output_gate))
    plain = mixer_of(new_model(**sizes, output_gate=False))
    width = plain.in_proj.weight.shape[0]
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(
                mixer.get_parameter(name)[:width] if "in_proj" in name else mixer.get_parameter(name)
            )
        plain.out_proj, out_proj = torch.nn.Identity(), mixer.out_proj
        mixer.out_proj = torch.nn.Identity()
        x = torch.randn(2, TIME, 64, generator=generator(0))
        bound = (torch.zeros(128),) if CELLS[cell].lower_bound_size(new_model(**sizes).config) else ()
        h, _ = plain(x, (None, None), NO_BOUNDARIES, *bound)
        actual, _ = mixer(x, (None, None), NO_BOUNDARIES, *bound)
        conv, _ = mixer.convolve(x, None, NO_BOUNDARIES)
        gate = mixer.in_proj(conv)[..., width:]
    assert out_proj.weight.shape == (64, 128)
    groups = h.view(2, TIME, 2, 64)
    expected = groups / (groups.square().mean(-1, keepdim=True) + mixer.output_norm.eps).sqrt()
    expected = (expected * mixer.output_norm.weight).view(2, TIME, 128)
    assert_close(actual, expected * mixer.gate(gate) if output_gate else expected, atol=1e-5)


@normed
@given(starts=starts_in, cuts=st.sets(st.integers(1, TIME - 1), max_size=4))
@settings(max_examples=3)
def test_whole_cut_and_token_by_token_are_the_same(cell, starts, cuts):
    """With all options, documents, and padding on the left."""
    model, ids = new_model(cell=cell, **ALL), random_ids(1, TIME)
    starts = torch.tensor([starts])
    whole = logits_of(model, ids, document_starts=starts)
    assert whole.abs().max() <= 2
    for edges in (sorted(cuts), list(range(1, TIME))):
        pieces, _ = chunked_logits(model, ids, edges, document_starts=starts)
        assert_close(pieces, whole, atol=1e-4)
    padded, mask = F.pad(ids, (3, 0)), F.pad(torch.ones_like(ids), (3, 0))
    assert_close(
        logits_of(model, padded, attention_mask=mask, document_starts=F.pad(starts, (3, 0)))[:, 3:],
        whole,
        atol=1e-4,
    )


@pytest.mark.parametrize("cell", ["mingru", "hgrn", "rglru", "lru"])
@pytest.mark.parametrize("learn_h0", [True, False])
def test_gradients_through_chunks_are_those_of_one_pass(cell, learn_h0):
    """Of all parameters, fp64, with documents and recomputation."""
    model = new_model(cell=cell, dtype=torch.float64, learn_h0=learn_h0, **ALL).train()
    inputs = {"input_ids": random_ids(2, TIME), "shift_labels": random_ids(2, TIME, seed=1)}
    inputs["document_starts"] = torch.rand(2, TIME, generator=generator(3)) < 0.2
    expected = assert_gradients_through_chunks(model, inputs, 5, ("none", "selective", "full"))
    assert {"model.layers.1.residual_scales", "model.layers.1.mixer.output_norm.weight"} <= expected.keys()


@normed
def test_the_fused_scan_equals_the_composed_one(cell):
    """fp32 on the default backend against fp64."""
    model, ids = new_model(cell=cell, **ALL), random_ids(2, TIME)
    exact = new_model(cell=cell, dtype=torch.float64, **ALL)
    exact.load_state_dict(model.state_dict())
    assert_close(logits_of(model, ids), logits_of(exact, ids), atol=1e-4)


def test_residual_scales_begin_as_the_model_without_them():
    plain = new_model()
    model = MinRNNForCausalLM(
        MinRNNConfig.from_dict({**plain.config.to_dict(), "residual_scales": True})
    ).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {f"model.layers.{i}.residual_scales" for i in range(2)}
    assert not unexpected
    ids = random_ids(2, TIME)
    assert torch.equal(logits_of(model, ids), logits_of(plain, ids))
    with torch.no_grad():
        model.get_parameter("model.layers.1.residual_scales").copy_(torch.tensor([0.0, 1.0]))
    only_last = logits_of(model, ids)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mixer.out_proj.weight").zero_()
    assert torch.equal(logits_of(model, ids), only_last)  # the last block reads the embedding alone


@pytest.mark.parametrize("sizes", [{}, {"num_hidden_layers": 1, "intermediate_size": 0}])
def test_zero_projections_make_every_block_the_identity(sizes):
    config = MinRNNConfig(vocab_size=40, hidden_size=16, zero_init_residual=True, **sizes)
    model = MinRNNForCausalLM(config).eval()
    ids = random_ids(2, TIME)
    x = model.model.norm(model.model.embed_tokens(ids))
    assert_close(logits_of(model, ids), model.logits(x), atol=1e-6)
    assert all(block.get_parameter("mixer.in_proj.weight").any() for block in model.model.layers)


@given(st.integers(1, 30), st.sampled_from([None, 30]), st.floats(0.5, 30), st.integers(1, 40))
@settings(max_examples=20)
def test_loss_and_gradients_of_bounded_logits(num_rows, num_tokens, softcap, block):
    hidden = (4 * torch.randn(num_rows, 8, generator=generator(0), dtype=torch.float64)).requires_grad_()
    weight = torch.randn(40, 8, generator=generator(1), dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 30, (num_rows,), generator=generator(2))
    targets[1::3] = -100
    loss = linear_cross_entropy(hidden, weight, targets, block=block, num_tokens=num_tokens, softcap=softcap)
    logits = softcap * torch.tanh(hidden @ weight.t() / softcap)
    expected = F.cross_entropy(logits[:, :num_tokens], targets)
    assert_close(loss, expected, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(own, (hidden, weight)) for own in (loss, expected)), strict=True)
    for actual, gradient in pairs:
        assert_close(actual, gradient, atol=1e-10)


def test_the_model_bounds_its_logits_with_and_without_targets():
    model, ids = new_model(logit_softcap=0.5, num_tokens=37), random_ids(2, TIME) % 37
    logits = logits_of(model, ids)
    assert logits[..., :37].abs().max() <= 0.5
    free = new_model(num_tokens=37)
    free.load_state_dict(model.state_dict())
    assert_close(logits[..., :37], 0.5 * torch.tanh(logits_of(free, ids)[..., :37] / 0.5), atol=1e-6)
    losses = [model(ids, labels=ids, skip_logits=skip).loss for skip in (True, False)]
    assert_close(losses[0], losses[1], atol=1e-6)
    model.resize_token_embeddings(60)
    assert logits_of(model, ids).abs().max() <= 0.5


def test_generation_and_an_export(tmp_path):
    model, ids = new_model(zero_init_residual=True, **ALL), random_ids(1, 5)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = MinRNNForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def test_bf16_autocast():
    model, ids = new_model(**ALL), random_ids(2, TIME)
    exact = logits_of(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits_of(model, ids)
    assert_close(rounded.float(), exact, atol=0.05)


def test_an_old_configuration_has_none_of_them():
    config = MinRNNConfig().to_dict()
    options = ("output_norm", "residual_scales", "zero_init_residual", "logit_softcap")
    for name in options:
        del config[name]
    assert not any(getattr(MinRNNConfig.from_dict(config), name) for name in options)
