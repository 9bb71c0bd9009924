"""The matrix scan against its definition: values, gradients, cuts, boundaries, strong decays, memory."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_scan_cases import Case, plain_scan, random_case, results, weights_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import minrnn.models.matrix_scan_torch as torch_backend
from minrnn.models.boundaries import Boundaries
from minrnn.models.matrix_scan import matrix_scan, matrix_scan_summary

backends = pytest.mark.parametrize("backend", ["reference", "torch"])
decays = pytest.mark.parametrize("decay", ["none", "head", "channel"])
PRECISION = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6}  # of the largest value
ROUNDING = {torch.float64: 0.0, torch.float32: 2**-23, torch.bfloat16: 2**-7}  # of each value


def scan_of(backend: str | None):
    def scan(case: Case) -> tuple[Tensor, Tensor]:
        inputs = case.q, case.k, case.v, case.log_decay, case.state
        return matrix_scan(*inputs, boundaries=case.boundaries, backend=backend)

    return scan


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    dtype = case.v.dtype
    assert actual["y"].dtype == dtype
    assert actual["last"].dtype == torch.promote_types(dtype, torch.float32)
    for name, tensor in case.tensors.items():
        assert actual[f"d{name}"].dtype == tensor.dtype
    for name, value in actual.items():
        assert_close(value, expected[name], atol=PRECISION[dtype], rtol=ROUNDING[value.dtype], name=name)


@pytest.fixture(params=[4, 64])
def chunk(request, monkeypatch):
    """The chunk's length: a short one has many chunks, and the shipped one many levels of halves."""
    monkeypatch.setattr(torch_backend, "CHUNK", request.param)
    return request.param


shapes = st.tuples(
    st.integers(0, 2),
    st.integers(0, 20) | st.just(70),
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(1, 4),
)


@backends
@decays
@settings(max_examples=12)
@given(
    shape=shapes,
    kind=st.sampled_from(["long", "strong", "mixed"]),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    use=st.sampled_from(["both", "both", "y", "last"]),
    chunk=st.sampled_from([4, 64]),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients(backend, decay, shape, kind, dtype, flags, use, chunk, seed):
    with_state, with_starts, with_lengths = flags
    case = random_case(
        seed,
        shape,
        decay=decay,
        kind=kind,
        dtype=dtype,
        with_state=with_state,
        with_starts=with_starts,
        with_lengths=with_lengths,
    )
    weights = weights_of(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "CHUNK", chunk)
        actual = results(scan_of(backend), case, weights, use)
    assert_same(actual, results(plain_scan, case.map(Tensor.double), weights, use), case)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_gradcheck(decay, monkeypatch):
    monkeypatch.setattr(torch_backend, "CHUNK", 4)
    case = random_case(3, (1, 6, 2, 2, 3), decay=decay, kind="long")
    inputs = [tensor.requires_grad_() for tensor in case.tensors.values()]
    assert torch.autograd.gradcheck(lambda *inputs: matrix_scan(*inputs, backend="torch"), inputs)


@decays
@settings(max_examples=8)
@given(
    time=st.integers(1, 150),
    cuts=st.lists(st.integers(0, 150), max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**20),
)
def test_cut_anywhere(decay, time, cuts, dtype, seed):
    case = random_case(seed, (2, time, 2, 4, 3), decay=decay, dtype=dtype, with_starts=True)
    edges = [0, *sorted(min(cut, time) for cut in cuts), time]

    def cut_scan(case: Case) -> tuple[Tensor, Tensor]:
        state, outputs = case.state, []
        for low, high in itertools.pairwise(edges):
            y, state = scan_of("torch")(replace(case.slice(low, high), state=state))
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    weights = weights_of(case)
    assert_same(results(cut_scan, case, weights), results(scan_of("torch"), case, weights), case)


@decays
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_by_token(decay, dtype):
    """Decoding, where the default is plain operations, against one call."""
    case = random_case(5, (3, 90, 2, 5, 4), decay=decay, dtype=dtype, kind="long")
    y, last = scan_of("torch")(case)
    state, steps = case.state, []
    for t in range(y.shape[1]):
        step, state = scan_of(None)(replace(case.slice(t, t + 1), state=state))
        steps.append(step)
    assert_close(torch.cat(steps, dim=1), y, atol=PRECISION[dtype], rtol=ROUNDING[dtype], name="y")
    assert_close(state, last, atol=PRECISION[dtype], name="last")


@decays
@settings(max_examples=8)
@given(
    time=st.integers(0, 80),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    with_starts=st.booleans(),
    with_lengths=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_summary_maps_any_state(decay, time, dtype, with_starts, with_lengths, seed):
    case = random_case(
        seed,
        (2, time, 2, 3, 4),
        decay=decay,
        dtype=dtype,
        with_starts=with_starts,
        with_lengths=with_lengths,
    ).map(Tensor.requires_grad_)
    product, from_zero = matrix_scan_summary(case.k, case.v, case.log_decay, boundaries=case.boundaries)
    assert not product.requires_grad
    assert not from_zero.requires_grad
    assert product.dtype == from_zero.dtype == case.state.dtype
    _, last = scan_of("reference")(case)
    assert_close(product.unsqueeze(-1) * case.state + from_zero, last, atol=PRECISION[dtype], name="last")


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_strong_decays_keep_their_digits(decay, chunk):
    """After 60 tokens of log a = -50, decays near 1 are as exact as before: no sum of 3,000 is subtracted."""
    case = random_case(2, (1, 64, 2, 8, 8), decay=decay, kind="long", dtype=torch.float32)
    log_decay = case.log_decay.clone()
    log_decay[:, :60] = -50
    case = replace(case, log_decay=log_decay)
    weights = weights_of(case)
    actual = results(scan_of("torch"), case, weights)
    exact = results(plain_scan, case.map(Tensor.double), weights)
    for name in ("y", "dq", "dk", "dv", "dlog_decay"):
        tail = slice(60, None)
        assert_close(actual[name][:, tail], exact[name][:, tail], atol=1e-6, name=name)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_document_start_leaves_no_trace(decay, chunk):
    """What follows has the same bits for any earlier tokens and states, also for large ones."""
    first, second = (random_case(seed, (1, 100, 2, 4, 4), decay=decay, kind="long") for seed in (1, 2))
    starts = torch.zeros(1, 100, dtype=torch.bool)
    starts[:, 37] = True

    def joined(name: str, scale: float) -> Tensor:
        return torch.cat([getattr(second, name)[:, :37] * scale, getattr(first, name)[:, 37:]], dim=1)

    outputs = []
    for scale in (1.0, 1e6):
        q, k, v = (joined(name, scale) for name in ("q", "k", "v"))
        log_decay, state = joined("log_decay", 1.0), second.state * scale
        y, last = matrix_scan(q, k, v, log_decay, state, boundaries=Boundaries(starts), backend="torch")
        outputs.append((y[:, 37:], last))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_long_memory_over_a_long_sequence(decay):
    """Memories of 100 to 100,000 tokens over 4,096 tokens, in fp32 against fp64."""
    random = generator(11)
    case = random_case(11, (1, 4096, 1, 8, 8), decay=decay, dtype=torch.float32)
    memory = 10 ** (2 + 3 * torch.rand(1, 1, 1, case.log_decay.shape[-1], generator=random))
    log_decay = -torch.rand(case.log_decay.shape, generator=random) / memory
    case = replace(case, log_decay=log_decay)
    weights = weights_of(case)
    exact = results(scan_of("torch"), case.map(Tensor.double), weights)
    for name, value in results(scan_of("torch"), case, weights).items():
        assert_close(value, exact[name], atol=5e-5, name=name)


@backends
def test_what_is_in_the_padding_does_not_matter(backend):
    case = random_case(4, (3, 70, 2, 3, 4), with_starts=True, with_lengths=True)
    assert case.boundaries.lengths is not None
    is_pad = torch.arange(70) >= case.boundaries.lengths.unsqueeze(1)
    assert 0 < is_pad.sum() < is_pad.numel()
    nan = {
        name: getattr(case, name).masked_fill(is_pad[..., None, None], torch.nan)
        for name in ("q", "k", "v", "log_decay")
    }
    (y, last), (other_y, other_last) = scan_of(backend)(case), scan_of(backend)(replace(case, **nan))
    assert torch.equal(other_y[~is_pad], y[~is_pad])
    assert torch.equal(other_last, last)


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in another layout, or (expanded) the same row for the whole batch."""
    if how == "transposed":
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)
    if how == "sliced":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    return tensor[:1].expand_as(tensor)


@backends
@decays
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("heads", [1, 2])
def test_any_layout(backend, decay, how, heads):
    case = random_case(9, (2, 8, heads, 3, 4), decay=decay, with_starts=True)
    for_y, for_last = weights_of(case)
    weights = strided(for_y, how), strided(for_last, how)

    def in_layout(scan):
        return lambda case: scan(case.map(lambda tensor: strided(tensor, how)))

    actual = results(in_layout(scan_of(backend)), case, weights)
    assert_same(actual, results(in_layout(plain_scan), case, weights), case)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_no_tensor_is_larger_than_the_inputs(decay):
    """Per token and head, as many numbers as a chunk or a head has: not [time, time] and not [time, K, V]."""
    time, heads, width = 1024, 2, 32
    case = random_case(1, (1, time, heads, width, width), decay=decay, kind="long", dtype=torch.float32)
    q, k, v, log_decay, state = case.tensors.values()
    with LargestTensor() as mode:
        y, last = torch_backend.forward(q, k, v, log_decay, state)
        torch_backend.backward(q, k, v, log_decay, state, y, last)
    assert time * heads * width <= mode.largest <= time * heads * torch_backend.CHUNK
