"""The learnt initial state: at the start of every document, however a text is cut, packed or padded."""

import itertools
from typing import Any

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
from naive_cells import GATES, NAIVE, Parts, Result, leaky
from torch import Tensor

from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.models.boundaries import Boundaries
from minrnn.models.context_parallel import ContextGroup
from minrnn.models.minimal_coefficients import MINIMAL_CELLS
from minrnn.models.mixer import MinRNNMixer
from minrnn.models.registry import CELLS

WITH_H0 = [cell for cell, mixer in CELLS.items() if mixer.learns_h0]
WITHOUT_H0 = [cell for cell in CELLS if cell not in WITH_H0]
learning = pytest.mark.parametrize("cell", WITH_H0)
TIME = 12
starts_in = st.lists(st.booleans(), min_size=TIME, max_size=TIME)


def learnt(cell: str, dtype: torch.dtype = torch.float32, **fields: Any) -> MinRNNForCausalLM:
    """A model whose initial states are not 0."""
    return new_model(cell=cell, dtype=dtype, learn_h0=True, **fields)


def test_which_cells_have_one():
    assert WITHOUT_H0 == ["rwkv4", "s4d", "linear_attention", "hgrn2", "mlstm", "gla"]


@pytest.mark.parametrize("cell", WITHOUT_H0)
def test_other_cells_refuse_it(cell):
    message = f"learn_h0: is for cells with a state per channel .*mingru.*, and not for {cell}: leave it out"
    with pytest.raises(ValueError, match=message):
        MinRNNConfig(cell=cell, learn_h0=True)


# The naive twins: documents one by one, tokens one by one.


def minimal(cell: Any, parts: Parts, h0: Tensor) -> Result:
    """minGRU and minLSTM without a candidate activation."""
    gates = [torch.sigmoid(part + bias) for part, bias in zip(parts, cell.gate_bias, strict=False)]
    a = 1 - gates[0] if len(gates) == 1 else gates[0] / (gates[0] + gates[1])
    decay = 2 * a - 1 if cell.spec.cell.endswith("signed") else a
    scale = (1 - a**2).sqrt() if cell.spec.cell.endswith("normalized") else 1 - a
    return leaky(decay, scale * parts[len(gates)], h0)


def rglru(cell: Any, parts: Parts, h0: Tensor) -> Result:
    """At the first token, b has no factor sqrt(1 - a^2)."""
    r, i = (torch.sigmoid(x + bias) for x, bias in zip(parts[:2], cell.gate_bias, strict=True))
    a = torch.sigmoid(-cell.decay) ** (8 * r)
    scale = torch.cat([torch.ones_like(a[:, :1]), (1 - a**2).sqrt()[:, 1:]], 1)
    return leaky(a, scale * i * parts[2], h0)


def naive_initial(cell: str, h0: Tensor) -> Tensor:
    """The state that the parameter stands for: averages of tanh stay in (-1, 1)."""
    if cell in ("gilr", "qrnn"):
        return torch.tanh(h0)
    width = len(h0) // 2
    return torch.cat([torch.tanh(h0[:width]), h0[width:]]) if cell == "gilr_lstm" else h0


def naive(cell: str, mixer: Any, projected: Tensor, starts: Tensor, bound: tuple[Tensor, ...]) -> Tensor:
    """Outputs and last state of one row [1, T, P], as one tensor."""
    step = {**NAIVE, **dict.fromkeys(MINIMAL_CELLS, minimal)}
    step |= {"rglru": rglru}
    edges = [0, *(t for t in range(1, TIME) if starts[t]), TIME]
    outputs, last = [], torch.empty(0)
    for low, high in itertools.pairwise(edges):
        parts = projected[:, low:high].split(mixer.widths, -1)
        h0 = naive_initial(cell, mixer.h0).unsqueeze(0)
        h, last = step[cell](mixer, parts[:-1] if mixer.gate else parts, h0, *bound)
        outputs.append(h * GATES.get(cell, F.silu)(parts[-1]) if mixer.gate else h)
    return torch.cat([torch.cat(outputs, 1).flatten(), last.flatten()])


@learning
@given(starts=starts_in)
@settings(max_examples=3)
def test_outputs_and_gradients_are_those_of_the_equations(cell, starts):
    """fp64, all parameters of the cell, h0 among them."""
    model = learnt(cell, torch.float64)
    mixer: Any = model.model.layers[1].mixer
    assert isinstance(mixer, MinRNNMixer)
    projected = torch.randn(1, TIME, sum(mixer.widths), generator=generator(1), dtype=torch.float64)
    size = mixer.lower_bound_size(model.config)
    bound = (torch.rand(size, generator=generator(2), dtype=torch.float64),) if size else ()
    mask = torch.tensor(starts)
    boundaries = Boundaries.of(mask.unsqueeze(0) if mask.any() else None, None, mixer.kernel)
    leaves = [projected.requires_grad_(), mixer.h0]
    leaves += [p for n, p in mixer.named_parameters() if n not in ("h0", "conv_weight") and "_proj" not in n]
    y, last = mixer.recur(projected, None, boundaries, *bound)
    actual, expected = torch.cat([y.flatten(), last.flatten()]), naive(cell, mixer, projected, mask, bound)
    assert_close(actual, expected, atol=1e-12)
    weights = torch.randn(actual.shape, generator=generator(3), dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((x * weights).sum(), leaves) for x in (actual, expected)), strict=True)
    for i, (gradient, wanted) in enumerate(pairs):
        assert wanted.abs().max() > 0
        assert_close(gradient, wanted, atol=1e-10, name=f"gradient {i}")


# The model.


@learning
def test_it_starts_as_the_model_without_it(cell):
    """Logits at step 0 are the same to rounding, with documents too; one parameter per layer is new."""
    plain = new_model(cell=cell)
    model = learnt(cell)
    names = {f"model.layers.{i}.mixer.h0" for i in range(2)}
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == names
    assert not unexpected
    fresh = MinRNNForCausalLM(model.config)
    for name in names:
        assert not fresh.get_parameter(name).any()
        torch.nn.init.zeros_(model.get_parameter(name))
    ids = random_ids(2, TIME)
    starts = torch.rand(2, TIME, generator=generator(1)) < 0.3
    for options in ({}, {"document_starts": starts}):
        assert_close(logits_of(model, ids, **options), logits_of(plain, ids, **options), atol=1e-5)


@learning
@given(starts=starts_in, cuts=st.sets(st.integers(1, TIME - 1), max_size=4))
@settings(max_examples=3)
def test_whole_cut_packed_and_separate_are_the_same(cell, starts, cuts):
    """Also token by token, in a padded batch, and from `position_ids` of a packed batch; fp32."""
    model, ids = learnt(cell), random_ids(1, TIME)
    starts = torch.tensor([starts])
    whole = logits_of(model, ids, document_starts=starts)
    for edges in (sorted(cuts), list(range(1, TIME))):
        pieces, _ = chunked_logits(model, ids, edges, document_starts=starts)
        assert_close(pieces, whole, atol=1e-4)
    edges = [0, *(t for t in range(1, TIME) if starts[0, t]), TIME]
    documents = [ids[0, low:high] for low, high in itertools.pairwise(edges)]
    for side in ("left", "right"):
        batch, mask = padded(documents, side)
        logits = logits_of(model, batch, attention_mask=mask)
        assert_close(logits[mask.bool()].unsqueeze(0), whole, atol=1e-4)
    positions = torch.cat([torch.arange(len(document)) for document in documents]).unsqueeze(0)
    assert_close(logits_of(model, ids, position_ids=positions), whole, atol=1e-4)
    assert (logits_of(new_model(cell=cell), ids)[:, 0] - whole[:, 0]).abs().max() > 1e-3  # it has an effect


def padded(documents: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, documents))
    shapes = [((longest - len(d), 0) if side == "left" else (0, longest - len(d))) for d in documents]
    pairs = list(zip(documents, shapes, strict=True))
    ids = torch.stack([F.pad(document, shape) for document, shape in pairs])
    return ids, torch.stack([F.pad(torch.ones_like(document), shape) for document, shape in pairs])


@learning
def test_padding_only_is_no_beginning(cell):
    """A row that holds only padding in the first piece begins its text in the next."""
    model, ids = learnt(cell), random_ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :4] = 0
    pieces, _ = chunked_logits(model, ids, [4], attention_mask=mask)
    assert_close(pieces[1:, 4:], logits_of(model, ids[1:, 4:]), atol=1e-5)


@pytest.mark.parametrize("cell", ["minlstm_signed", "gilr_lstm", "rglru", "lru"])
def test_generation_with_and_without_the_state(cell):
    model, ids = learnt(cell), random_ids(1, 5)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


@learning
def test_every_step_has_a_gradient_of_it(cell):
    """DDP needs one of each parameter, also where no text begins; it is 0 there."""
    model, ids = learnt(cell).train(), random_ids(1, 6)
    states: list[Any] = [layer.get_parameter("mixer.h0") for layer in model.model.layers]
    state = model(ids, use_cache=True).past_key_values.detach_()
    model(ids, labels=ids, past_key_values=state, use_cache=True).loss.backward()
    assert not any(h0.grad.any() for h0 in states)
    model(ids, labels=ids).loss.backward()
    assert all(h0.grad.any() for h0 in states)


@learning
def test_gradients_through_chunks_are_those_of_one_pass(cell):
    """`backprop_through_chunks` and recomputation, fp64, with documents."""
    model = learnt(cell, torch.float64).train()
    inputs = {"input_ids": random_ids(2, TIME), "shift_labels": random_ids(2, TIME, seed=1)}
    inputs["document_starts"] = torch.rand(2, TIME, generator=generator(3)) < 0.2
    assert_gradients_through_chunks(model, inputs, 5, ("none", "selective"))


def test_an_export_keeps_it(tmp_path):
    model, ids = learnt("mingru"), random_ids(1, TIME)
    model.save_pretrained(tmp_path)
    loaded = MinRNNForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


@pytest.mark.parametrize("cell", ["mingru", "gilr_lstm", "rglru", "lru"])
def test_bf16_autocast(cell):
    """The same logits as in fp32, up to the rounding of bf16."""
    model, ids = learnt(cell), random_ids(2, TIME)
    starts = torch.rand(2, TIME, generator=generator(1)) < 0.3
    exact = logits_of(model, ids, document_starts=starts)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits_of(model, ids, document_starts=starts)
    assert_close(rounded.float(), exact, atol=0.05)


@pytest.mark.parametrize("cell", ["mingru", "lru"])
def test_of_a_group_only_the_first_process_counts_the_state_before_the_sequence(cell):
    """All hold the total gradient of that state, and gradients of parameters are summed over them."""
    mixer: Any = learnt(cell).model.layers[0].mixer
    projected = torch.zeros(2, 3, sum(mixer.widths))
    for rank in (0, 1):
        mixer.context_group = ContextGroup(None, rank, 2)  # pyright: ignore[reportArgumentType]
        (gradient,) = torch.autograd.grad(mixer.entering(None, projected).sum(), mixer.h0)
        assert torch.equal(gradient, torch.full_like(gradient, 2.0 * (rank == 0)))


def test_an_old_configuration_has_none():
    config = MinRNNConfig().to_dict()
    del config["learn_h0"]
    assert MinRNNConfig.from_dict(config).learn_h0 is False
