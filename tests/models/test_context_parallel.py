"""States and gradients folded from the slices' summaries, in one process."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cell_scan_cases import DEFAULT, HGRN, PAPER, RGLRU, random_inputs
from helpers import assert_close, generator, new_model, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minrnn.models import MinRNNForCausalLM, context_parallel, context_scan
from minrnn.models.boundaries import Boundaries, reach_within_document
from minrnn.models.cell_scan import cell_scan, scan_gradients, scan_without_graph, summarize
from minrnn.models.cell_spec import CellInputs, empty_rows
from minrnn.models.context_parallel import ContextGroup, use_context_parallel
from minrnn.models.context_scan import fold
from minrnn.models.conv import causal_conv, conv_gradients
from minrnn.models.recompute import checkpointing_options
from minrnn.models.registry import CELLS

BATCH, TIME, WIDTH = 2, 20, 5
edges_in = st.lists(st.integers(0, TIME), max_size=5).map(lambda cuts: [0, *sorted(cuts), TIME])
starts_in = st.none() | st.lists(st.tuples(st.integers(0, BATCH - 1), st.integers(0, TIME - 1)), max_size=4)


def mask_of(starts: list[tuple[int, int]] | None) -> Tensor | None:
    if starts is None:
        return None
    mask = torch.zeros(BATCH, TIME, dtype=torch.bool)
    for row, position in starts:
        mask[row, position] = True
    return mask


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("cell", "backend", "atol"),
    [
        ("mingru", "numba", 2e-6),
        ("minlstm", "numba", 2e-6),
        ("hgrn", "numba", 2e-6),
        ("rglru", "numba", 2e-6),
        ("minlstm", "torch", 1e-13),
        ("rglru", "torch", 1e-13),
    ],
)
@settings(max_examples=15)
@given(edges=edges_in, starts=starts_in)
def test_folded_summaries_equal_the_whole_scan(cell, backend, atol, edges, starts):
    dtype = torch.float32 if backend == "numba" else torch.float64
    where = mask_of(starts)
    spec = {"minlstm": PAPER, "mingru": DEFAULT, "hgrn": HGRN, "rglru": RGLRU}[cell]
    projected, gate_bias, _ = random_inputs(0, spec, dtype, (BATCH, TIME, WIDTH))
    gate_bias = gate_bias.to(dtype)
    h0, grad_y, grad_last = (
        normal(2, BATCH, WIDTH, dtype=dtype),
        normal(3, BATCH, TIME, WIDTH, dtype=dtype),
        normal(4, BATCH, WIDTH, dtype=dtype),
    )
    h0[0] = 0  # no state, which an RG-LRU asks of the first slice only
    leaves = projected.requires_grad_(), gate_bias.requires_grad_(), h0.requires_grad_()
    y, h_last = cell_scan(*leaves, spec=spec, boundaries=Boundaries(where), backend=backend)
    expected = torch.autograd.grad((y, h_last), leaves, (grad_y, grad_last))

    slices = [slice(low, high) for low, high in itertools.pairwise(edges) if low < high]
    inputs = [
        CellInputs(
            projected[:, tokens],
            gate_bias,
            h0,
            Boundaries(None if where is None else where[:, tokens]),
            None if tokens.start else empty_rows(h0, spec),
        )
        for tokens in slices
    ]
    decays, lasts = torch.stack([torch.stack(summarize(own, spec, backend)) for own in inputs]).unbind(1)
    states = fold(decays, lasts, h0.detach())
    scanned = [
        scan_without_graph(replace(own, h0=state), spec, backend)
        for own, state in zip(inputs, states, strict=False)
    ]
    assert_close(torch.cat([y for y, _ in scanned], dim=1), y, atol=atol, name="y")
    assert_close(states[-1], h_last, atol=atol, name="h_last")

    def gradients(c: int, entering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own, (_, h) = replace(inputs[c], h0=states[c]), scanned[c]
        return scan_gradients(own, spec, backend, h=h, grad_y=grad_y[:, slices[c]], grad_last=entering)

    through_outputs = torch.stack([gradients(c, torch.zeros_like(grad_last))[2] for c in range(len(slices))])
    entering = fold(decays.flip(0), through_outputs.flip(0), grad_last)[::-1]
    d_projected, d_bias, dh = zip(*[gradients(c, entering[c + 1]) for c in range(len(slices))], strict=True)
    actual = torch.cat(d_projected, dim=1), torch.stack(d_bias).sum(0), entering[0]
    for value, other, name in zip(actual, expected, ("d_projected", "d_gate_bias", "dh0"), strict=True):
        assert_close(value, other, atol=5 * atol, name=name)
    for c, gradient in enumerate(dh):
        assert_close(gradient, entering[c], atol=5 * atol, name=f"state before slice {c}")


@pytest.mark.parametrize(("backend", "dtype"), [("numba", torch.float32), ("torch", torch.float64)])
@settings(max_examples=15)
@given(kernel=st.integers(2, 5), starts=starts_in)
def test_convolution_gradients_without_a_graph(backend, dtype, kernel, starts):
    where = mask_of(starts)
    reach = None if where is None else reach_within_document(where, kernel)
    x, weight, state = (
        normal(0, BATCH, TIME, WIDTH, dtype=dtype),
        normal(1, WIDTH, kernel, dtype=dtype),
        normal(2, BATCH, kernel - 1, WIDTH, dtype=dtype),
    )
    leaves, grad_y = (
        (x.requires_grad_(), weight.requires_grad_(), state.requires_grad_()),
        normal(3, BATCH, TIME, WIDTH, dtype=dtype),
    )
    expected = torch.autograd.grad(causal_conv(*leaves, reach, backend), leaves, grad_y)
    for value, other in zip(conv_gradients(*leaves, reach, grad_y, backend), expected, strict=True):
        assert not value.requires_grad
        assert torch.equal(value, other)


def test_needs_processes_and_a_model_to_cut():
    group = ContextGroup(None, 0, 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"needs torch\.distributed: call init_process_group first"):
        use_context_parallel(new_model(), group)
    with pytest.raises(ValueError, match="Linear has no MinRNNMixer"):
        use_context_parallel(torch.nn.Linear(2, 2), None)


def model_of_slices(cell: str, group: ContextGroup | None) -> MinRNNForCausalLM:
    model = new_model(cell=cell).train()
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "context_group")]
    for module in modules:
        module.context_group = group
    return model


@pytest.fixture
def sent(monkeypatch) -> list[int]:
    """Bytes of each message of one process that holds the whole sequence as its only slice."""
    sizes: list[int] = []

    def all_gather_async(tensor: Tensor, _) -> Callable[[], Tensor]:
        sizes.append(tensor.nbytes)
        return lambda: tensor.unsqueeze(0)

    for module in (context_parallel, context_scan):
        monkeypatch.setattr(module, "all_gather_async", all_gather_async)
    return sizes


ALONE = ContextGroup(None, 0, 1)  # pyright: ignore[reportArgumentType]


def stated_messages(cell: str, width: int, heads: int, keys: int, values: int) -> tuple[list[int], list[int]]:
    """Numbers of each scan's messages, forward and backward, as docs/context-parallel.md states them."""
    matrix, with_normalizer = heads * keys * values, heads * keys * (values + 1)
    return {
        "gilr_lstm": ([2 * width] * 2, [width] * 2),
        "rwkv4": ([2 * width, 4 * width], [2 * width]),
        "s4d": ([32 * width], [16 * width]),
        "linear_attention": ([with_normalizer + heads * keys], [with_normalizer]),
        "hgrn2": ([matrix + heads * keys], [matrix]),
        "gla": ([matrix + heads * keys], [matrix]),
        "mlstm": ([2 * heads, with_normalizer + heads * keys], [with_normalizer]),
    }.get(cell, ([2 * width], [width]))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("time", [6, 60])
def test_messages_are_as_stated_for_every_cell_and_length(cell, time, sent):
    model = model_of_slices(cell, ALONE)
    config = model.config
    forward, backward = stated_messages(cell, config.recurrent_size, 3, 4 if cell == "gla" else 8, 8)
    inputs = 4 * BATCH * (config.conv_kernel - 1) * config.hidden_size
    logits = model(random_ids(BATCH, time)).logits
    assert sent == config.num_hidden_layers * [inputs, *(4 * BATCH * n for n in forward)]
    sent.clear()
    logits.sum().backward()
    assert sent == config.num_hidden_layers * [*(4 * BATCH * n for n in backward), inputs]


def kept_bytes(cell: str, group: ContextGroup | None, time: int) -> int:
    """Bytes that "selective" keeps of a forward pass."""
    model = model_of_slices(cell, group)
    options = checkpointing_options("selective")
    assert options is not None
    forward, _ = options["context_fn"]()
    with forward:
        model.model(random_ids(2, time))
    kept = [getattr(value, "val", value) for value in tree_leaves(forward.storage)]
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("sent")
def test_selective_recomputation_keeps_nothing_of_the_summaries(cell):
    """Per token, a slice keeps what a whole sequence keeps."""
    whole, cut = (kept_bytes(cell, group, 128) - kept_bytes(cell, group, 64) for group in (None, ALONE))
    assert cut == whole > 0
