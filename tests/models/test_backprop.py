"""Gradients through several chunks, one chunk in memory: those of one pass over the whole text."""

import contextlib
import itertools
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, assert_close, generator, new_model, random_ids
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minrnn.models import (
    MinRNNCache,
    MinRNNForCausalLM,
    TorchRNNConfig,
    TorchRNNForCausalLM,
    backprop_through_chunks,
)
from minrnn.models.backprop import backpropagate, model_inputs
from minrnn.models.recompute import RECOMPUTE, checkpointing_options
from minrnn.models.registry import CELLS

Results = dict[str, Tensor]


def text(batch: int, time: int, documents: bool = True) -> dict[str, Tensor]:
    """Arguments for the loss of a text; a tenth of the targets is not scored."""
    labels = random_ids(batch, time, seed=1)
    labels[torch.rand(batch, time, generator=generator(2)) < 0.1] = -100
    inputs = {"input_ids": random_ids(batch, time), "shift_labels": labels}
    starts = torch.rand(batch, time, generator=generator(3)) < 0.05
    return {**inputs, "document_starts": starts} if documents else inputs


def cut(inputs: dict[str, Tensor], edges: list[int]) -> list[dict[str, Tensor]]:
    return [
        {name: tensor[:, low:high] for name, tensor in inputs.items()}
        for low, high in itertools.pairwise(edges)
    ]


def even_edges(time: int, num_chunks: int) -> list[int]:
    return [time * k // num_chunks for k in range(num_chunks + 1)]


def carried_state(model: Any, batch: int) -> MinRNNCache:
    """The state after some text, as leaves that require gradients."""
    with torch.no_grad():
        state = model(random_ids(batch, 5, seed=4), use_cache=True).past_key_values
    return state.mapped(lambda tensor: tensor.requires_grad_())


def results(model: Any, loss: Tensor, state: MinRNNCache, start: MinRNNCache | None) -> Results:
    """The loss, the end state and all gradients, which are then cleared."""
    leaves = dict(model.named_parameters())
    leaves |= {f"start {i}": tensor for i, tensor in enumerate(start.tensors() if start else [])}
    found = {"loss": loss.detach()}
    found |= {f"end {i}": tensor.detach() for i, tensor in enumerate(state.tensors())}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        found[f"d {name}"], leaf.grad = leaf.grad, None
    return found


def one_pass(model: Any, inputs: dict[str, Tensor], start: MinRNNCache | None = None) -> Results:
    state = None if start is None else start.mapped(lambda tensor: tensor)
    output = model(**inputs, past_key_values=state, use_cache=True, skip_logits=True)
    output.loss.backward()
    return results(model, output.loss, output.past_key_values, start)


def in_chunks(
    model: Any, inputs: dict[str, Tensor], edges: list[int], start: MinRNNCache | None = None
) -> Results:
    loss, state = backprop_through_chunks(model, cut(inputs, edges), start)
    return results(model, loss, state, start)


def assert_same(actual: Results, expected: Results, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, atol=atol, name=name)


def distance(actual: Results, expected: Results) -> float:
    """Of all gradients together, relative."""
    a, b = (
        torch.cat([tensors[name].double().flatten() for name in expected if name.startswith("d ")])
        for tensors in (actual, expected)
    )
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("cell", CELLS)
@example(time=9, num_chunks=9, carried=True, documents=True)
@given(
    time=st.integers(8, 40),
    num_chunks=st.integers(1, 6),
    carried=st.booleans(),
    documents=st.booleans(),
)
@settings(max_examples=2)
def test_chunks_equal_one_pass(cell, time, num_chunks, carried, documents):
    """Loss, end state and all gradients in fp64, also of the state before the first chunk."""
    model = new_model(cell=cell, dtype=torch.float64).train()
    start = carried_state(model, 2) if carried else None
    inputs = text(2, time, documents)
    if documents:
        inputs["document_starts"][0, time // num_chunks - 1] = True  # at and before an edge
        inputs["document_starts"][1, time // num_chunks % time] = True
    expected = one_pass(model, inputs, start)
    assert_same(in_chunks(model, inputs, even_edges(time, num_chunks), start), expected, atol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_chunks_equal_one_pass_in_fp32(cell):
    """The kernels of the CPU; chunks of different lengths, one of a single token."""
    model, inputs = new_model(cell=cell).train(), text(2, 48)
    expected = one_pass(model, inputs)
    actual = in_chunks(model, inputs, [0, 7, 8, 30, 48])
    assert_close(actual["loss"], expected["loss"], atol=1e-6)
    assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_rnns_of_torch(cell):
    config = TorchRNNConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, cell=cell)
    model, inputs = TorchRNNForCausalLM(config).double().train(), text(2, 24)
    start = carried_state(model, 2)
    expected = one_pass(model, inputs, start)
    assert_same(in_chunks(model, inputs, [0, 5, 6, 15, 24], start), expected, atol=1e-10)


@pytest.mark.parametrize("cell", ["mingru", "rwkv4", "mlstm"])
def test_one_chunk_is_one_pass_to_the_bit(cell):
    model, inputs = new_model(cell=cell, dropout=0.2).train(), text(2, 24)
    torch.manual_seed(7)
    torch.manual_seed(int(torch.randint(2**62, ())))
    expected = one_pass(model, inputs)
    torch.manual_seed(7)
    assert_same(in_chunks(model, inputs, [0, 24]), expected, atol=0.0)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("cell", ["mingru", "s4d"])
def test_recomputed_blocks(cell, recompute):
    """Checkpointed blocks draw their dropout again; in fp32 the same bits as without checkpoints."""
    inputs, edges, found = text(2, 24), even_edges(24, 3), []
    for options in (None, checkpointing_options(recompute)):
        model = new_model(cell=cell, dropout=0.3).train()
        if options is not None:
            model.activation_checkpointing_enable(options)
        torch.manual_seed(5)
        found.append(in_chunks(model, inputs, edges))
    assert_same(found[1], found[0], atol=0.0)


def chunks_with_a_graph(model: Any, chunks: list[dict[str, Tensor]], seed: int) -> tuple[Tensor, MinRNNCache]:
    """The naive way: each chunk goes on from the state of the last, and the graph of all of them is kept."""
    count = sum(int((chunk["shift_labels"] != -100).sum()) for chunk in chunks)
    state, losses = None, []
    for index, chunk in enumerate(chunks):
        torch.manual_seed(seed + index)
        output = model(**model_inputs(chunk, count, True), past_key_values=state, use_cache=True)
        state = output.past_key_values
        losses.append(output.loss)
    loss = torch.stack(losses).sum()
    loss.backward()
    assert state is not None
    return loss, state


@pytest.mark.parametrize("cell", ["mingru", "mlstm"])
def test_dropout_draws_the_same_masks_again(cell):
    """And other masks for other chunks. The global generator goes on as if one number had been drawn."""
    model, chunks = (
        new_model(cell=cell, dropout=0.3, dtype=torch.float64).train(),
        cut(text(2, 24), [0, 8, 16, 24]),
    )
    torch.manual_seed(3)
    seed, following = int(torch.randint(2**62, ())), torch.rand(3)
    loss, state = chunks_with_a_graph(model, chunks, seed)
    expected = results(model, loss, state, None)
    torch.manual_seed(3)
    loss, state = backprop_through_chunks(model, chunks)
    assert torch.equal(torch.rand(3), following)
    assert_same(results(model, loss, state, None), expected, atol=1e-12)


@pytest.mark.parametrize("outer", [True, False])
def test_bf16_is_as_close_to_fp32_as_one_pass(outer):
    """Autocast around the whole call, and around each forward pass, as in training."""
    model, inputs = new_model().train(), text(2, 48)
    exact = one_pass(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = distance(one_pass(model, inputs), exact)
    context = torch.autocast("cpu", torch.bfloat16) if outer else contextlib.nullcontext()
    if not outer:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with context:
        actual = distance(in_chunks(model, inputs, even_edges(48, 4)), exact)
    assert 0 < actual <= 1.5 * expected


def test_gradients_are_added_and_the_given_state_is_not_changed():
    model, inputs = new_model(dtype=torch.float64).train(), text(2, 24)
    start = carried_state(model, 2)
    before = [tensor.detach().clone() for tensor in start.tensors()]
    once = in_chunks(model, inputs, [0, 12, 24], start)
    chunks = cut(inputs, [0, 12, 24])
    backprop_through_chunks(model, chunks, start)
    loss, state = backprop_through_chunks(model, chunks, start)
    twice = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert start.get_seq_length() == 5
    assert state.get_seq_length() == 29
    assert not any(tensor.requires_grad for tensor in (loss, *state.tensors()))
    assert all(torch.equal(a, b) for a, b in zip(start.tensors(), before, strict=True))
    for name, gradient in twice.items():
        assert gradient is not None
        assert_close(gradient, 2 * once[f"d {name}"], atol=1e-12, name=name)


@pytest.mark.parametrize("num_chunks", [3, 16])
def test_repeated_runs_give_the_same_bits(num_chunks):
    """The kernels read and write memory that tensors own: none of it may be freed before its last use."""
    inputs, edges = text(2, 8 * num_chunks), even_edges(8 * num_chunks, num_chunks)
    for cell in ("mingru", "s4d"):
        model = new_model(cell=cell, hidden_size=32).train()
        first = in_chunks(model, inputs, edges)
        for _ in range(3):
            assert_same(in_chunks(model, inputs, edges), first, atol=0.0)


class Saved:
    """A tensor that autograd keeps, counted while it is kept."""

    def __init__(self, tensor: Tensor, counter: "SavedBytes"):
        self.tensor = tensor
        size = tensor.numel() * tensor.element_size()
        counter.add(size)
        weakref.finalize(self, counter.add, -size)


class SavedBytes:
    """Bytes of the tensors that autograd keeps at once."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: Saved(tensor, self), lambda saved: saved.tensor
        ):
            yield


def peak_of(model: MinRNNForCausalLM, num_chunks: int, chunk: int) -> int:
    saved, inputs = SavedBytes(), text(2, num_chunks * chunk)
    with saved.counted():
        in_chunks(model, inputs, even_edges(num_chunks * chunk, num_chunks))
    assert saved.now == 0
    return saved.peak


@pytest.mark.parametrize("cell", ["mingru", "lru", "gla"])
def test_activations_of_one_chunk_are_kept(cell):
    """At most 1.1 times those of one chunk, and a state for each chunk; one pass keeps 8 times as much."""
    model = new_model(cell=cell).train()
    one, eight = peak_of(model, 1, 64), peak_of(model, 8, 64)
    state = carried_state(model, 2).tensors()
    states = 8 * sum(tensor.numel() * tensor.element_size() for tensor in state)
    assert eight <= 1.1 * one + states
    whole = SavedBytes()
    with whole.counted():
        one_pass(model, text(2, 512))
    assert whole.peak > 5 * one


def test_states_are_freed_on_the_way_back():
    """Before chunk k are k states, those of the chunk itself, and the last; after the call only the last."""
    model, inputs, alive = new_model().train(), text(1, 40), weakref.WeakSet()

    def forward(index: int, state: MinRNNCache | None, needs_loss: bool) -> Any:
        chunk = cut(inputs, even_edges(40, 10))[index]
        output = model(**model_inputs(chunk, 40, needs_loss), past_key_values=state, use_cache=True)
        alive.add(output.past_key_values)
        if needs_loss:
            counts.append(len(alive))
            assert len(alive) <= index + 3
        return output

    counts: list[int] = []
    losses, state = backpropagate(forward, 10, None)
    assert len(losses) == len(counts) == 10
    assert list(alive) == [state]


def test_what_is_refused():
    model, inputs = new_model().train(), text(2, 8)
    with pytest.raises(ValueError, match="at least one chunk"):
        backprop_through_chunks(model, [])
    with pytest.raises(ValueError, match=r"Each chunk needs shift_labels, .*its last token would have none"):
        backprop_through_chunks(model, [{"input_ids": inputs["input_ids"], "labels": inputs["input_ids"]}])
    with pytest.raises(ValueError, match="past_key_values is the state of 1 rows, but the batch has 2"):
        backprop_through_chunks(model, [inputs, inputs], carried_state(model, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("cell", ["mingru", "minlstm", "lru"])
def test_a_document_of_65536_tokens(cell, dtype, atol):
    """64 chunks of 1,024 tokens equal one pass over all of them."""
    model, inputs = new_model(cell=cell, dtype=dtype).train(), text(1, 2**16, documents=False)
    expected = one_pass(model, inputs)
    assert_same(in_chunks(model, inputs, even_edges(2**16, 64)), expected, atol)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_blocks(dropout):
    """Compiled code draws the same masks with and without gradients."""
    torch._dynamo.reset()
    model, chunks = new_model(dropout=dropout).train(), cut(text(2, 32), [0, 8, 16, 24, 32])
    for block in model.model.layers:
        block.compile()
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    loss, state = chunks_with_a_graph(model, chunks, seed)
    expected = results(model, loss, state, None)
    torch.manual_seed(3)
    loss, state = backprop_through_chunks(model, chunks)
    assert_same(results(model, loss, state, None), expected, atol=1e-5)


def test_the_example_of_the_docs_runs():
    """docs/long-context.md: two steps on a long text, and the state after it."""
    page = Path(__file__).parents[2] / "docs" / "long-context.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block.replace("MinRNNConfig(", "MinRNNConfig(hidden_size=16, num_hidden_layers=1, "), names)
    assert names["loss"].isfinite()
    assert names["state"].get_seq_length() == names["text"].shape[1] - 1
