"""A cell's input b_t + lambda b_{t-1}: against a naive twin, and cut anywhere."""

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
from minrnn.models.boundaries import Boundaries
from minrnn.models.minimal_coefficients import MINIMAL_CELLS
from minrnn.models.registry import CELLS

TIME = 12
TAPPED = [cell for cell, mixer in CELLS.items() if mixer.takes_two_taps]
tapped = pytest.mark.parametrize("cell", TAPPED)
starts_in = st.lists(st.booleans(), min_size=TIME, max_size=TIME)


def two_tap(**fields: Any) -> MinRNNForCausalLM:
    return new_model(two_tap_input=True, conv_kernel=0, **fields)


def mixer_of(model: MinRNNForCausalLM) -> Any:
    return cast(Any, model.model.layers)[0].mixer


def test_which_cells_take_it():
    assert set(MINIMAL_CELLS) | {"gilr", "hgrn"} == set(TAPPED)
    for cell in set(CELLS) - set(TAPPED):
        with pytest.raises(ValueError, match=f"two_tap_input: is for mingru, .*, and not for {cell}"):
            MinRNNConfig(cell=cell, two_tap_input=True, conv_kernel=0)
    with pytest.raises(
        ValueError, match="two_tap_input: takes the place of the convolution: set conv_kernel"
    ):
        MinRNNConfig(two_tap_input=True)


@tapped
@given(starts=starts_in)
@settings(max_examples=3)
def test_it_equals_the_naive_twin(cell, starts):
    mixer = mixer_of(two_tap(cell=cell, dtype=torch.float64, output_gate=False))
    x = torch.randn(1, TIME, 16, generator=generator(0), dtype=torch.float64)
    bound = (torch.zeros(24, dtype=torch.float64),) if cell == "hgrn" else ()
    actual, _ = mixer(x, (None, None), Boundaries.of(torch.tensor([starts]), None, 2), *bound)
    parts = mixer.in_proj(x).split(24, dim=-1)
    a, b = mixer.spec.coefficients(parts, mixer.channel_rows(*bound))
    assert mixer.input_tap.abs().min() > 0
    h, before, states = torch.zeros(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64), []
    for t in range(TIME):
        h, before = (0 * h, 0 * before) if starts[t] else (h, before)
        h = a[0, t] * h + b[0, t] + mixer.input_tap * before
        before = b[0, t]
        states.append(h)
    assert_close(actual[0], mixer.out_proj(torch.stack(states)), atol=1e-12)


@tapped
@given(starts=starts_in, cuts=st.sets(st.integers(1, TIME - 1), max_size=4))
@settings(max_examples=3)
def test_whole_cut_and_token_by_token_are_the_same(cell, starts, cuts):
    """With documents, an output norm, and padding on the left."""
    model, ids, starts = two_tap(cell=cell, output_norm=True), random_ids(1, TIME), torch.tensor([starts])
    whole = logits_of(model, ids, document_starts=starts)
    for edges in (sorted(cuts), list(range(1, TIME))):
        pieces, state = chunked_logits(model, ids, edges, document_starts=starts)
        assert_close(pieces, whole, atol=1e-4)
        assert [tensor.shape for tensor in state.tensors()] == [(1, 24), (1, 1, 24)] * 2
    padded, mask = F.pad(ids, (3, 0)), F.pad(torch.ones_like(ids), (3, 0))
    inputs = {"attention_mask": mask, "document_starts": F.pad(starts, (3, 0))}
    assert_close(logits_of(model, padded, **inputs)[:, 3:], whole, atol=1e-4)


@pytest.mark.parametrize("cell", ["mingru", "minlstm_normalized", "hgrn"])
@pytest.mark.parametrize("learn_h0", [True, False])
def test_gradients_through_chunks_are_those_of_one_pass(cell, learn_h0):
    """Of all parameters, fp64, with documents and recomputation."""
    model = two_tap(cell=cell, dtype=torch.float64, learn_h0=learn_h0).train()
    inputs = {"input_ids": random_ids(2, TIME), "shift_labels": random_ids(2, TIME, seed=1)}
    inputs["document_starts"] = torch.rand(2, TIME, generator=generator(3)) < 0.2
    expected = assert_gradients_through_chunks(model, inputs, 5, ("none", "selective", "full"))
    assert "model.layers.1.mixer.input_tap" in expected


def test_it_begins_as_one_tap():
    config = MinRNNConfig(hidden_size=16, conv_kernel=0, two_tap_input=True)
    model = MinRNNForCausalLM(config).eval()
    plain = MinRNNForCausalLM(MinRNNConfig(hidden_size=16, conv_kernel=0)).eval()
    _, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == [f"model.layers.{i}.mixer.input_tap" for i in range(4)]
    ids = random_ids(2, TIME)
    assert_close(logits_of(model, ids), logits_of(plain, ids), atol=1e-5)


def test_generation_an_export_and_bf16(tmp_path):
    model, ids = two_tap(), random_ids(1, 5)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))
    exact = logits_of(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(logits_of(model, ids).float(), exact, atol=0.05)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(MinRNNForCausalLM.from_pretrained(tmp_path), ids), exact)
