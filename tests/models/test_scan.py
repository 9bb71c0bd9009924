"""Every backend of the scan against a plain loop: values, gradients, dtypes, shapes and cuts."""

import itertools

import pytest
import torch
from helpers import assert_close, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minrnn.models.scan import linear_scan, linear_scan_with_decay

backends = pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
Results = dict[str, Tensor]

# dtypes of (a, b, h0); the last column is what the carried state must be
DTYPES = {
    "fp64": (torch.float64, torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp32-bf16": (torch.float32, torch.bfloat16, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32, torch.bfloat16),
    "fp32-fp16": (torch.float32, torch.float16, torch.float32),
    "fp64-bf16": (torch.float64, torch.bfloat16, torch.float32),
    "fp32-fp64": (torch.float32, torch.float64, torch.float32),
}
PRECISION = {torch.float64: 1e-13, torch.float32: 2e-6}  # of the arithmetic, relative to the largest
ROUNDING = {
    torch.float64: 0.0,
    torch.float32: 2**-23,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}  # one unit in the last place


def plain_scan(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, differentiated by autograd alone."""
    h, states = h0, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return (torch.stack(states, dim=1) if states else torch.zeros_like(b)), h


def random_inputs(
    seed: int, batch: int, time: int, width: int, dtypes=DTYPES["fp64"], kind: str = "signed"
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, h0) in their dtypes; a in [-1, 1], with zeros and ones among them, or close to 1, or both."""
    random = generator(seed)
    a = torch.rand(batch, time, width, generator=random, dtype=torch.float64)
    if kind == "signed":
        a = 2 * a - 1
    elif kind == "long":
        a = 1 - 0.01 * a
    special = torch.rand(a.shape, generator=random)
    a = torch.where(special < 0.05, 0.0, torch.where(special > 0.9, 1.0, a))
    b, h0 = (
        torch.randn(a.shape, generator=random, dtype=torch.float64),
        torch.randn(batch, width, generator=random, dtype=torch.float64),
    )
    return a.to(dtypes[0]), b.to(dtypes[1]), h0.to(dtypes[2])


def outputs_and_gradients(
    scan, a: Tensor, b: Tensor, h0: Tensor | None, weights: tuple[Tensor, Tensor], use: str = "both"
) -> Results:
    """h, h_last and the gradients of their weighted sum; with `use` of only one of them."""
    leaves = {"a": a, "b": b} | ({} if h0 is None else {"h0": h0})
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    h, h_last = scan(leaves["a"], leaves["b"], leaves.get("h0"))
    loss = sum(
        (0 * leaf.double()).sum() for leaf in leaves.values()
    )  # so that every leaf is used, also by the loop over no time
    if use in ("both", "h"):
        loss = loss + (h.double() * weights[0]).sum()
    if use in ("both", "h_last"):
        loss = loss + (h_last.double() * weights[1]).sum()
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"h": h.detach(), "h_last": h_last.detach()} | {
        f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def random_weights(seed: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """For h and h_last; representable in every dtype, so that the incoming gradient is not rounded."""
    random = generator(seed + 1)
    return (torch.randint(-8, 9, b.shape, generator=random) / 4).double(), torch.randn(
        b.shape[0], b.shape[2], generator=random
    ).double()


def plain_results(
    a: Tensor, b: Tensor, h0: Tensor | None, weights: tuple[Tensor, Tensor], use: str = "both"
) -> Results:
    """`outputs_and_gradients` of the plain loop in fp64 on the same numbers."""
    start = torch.zeros(b.shape[0], b.shape[2], dtype=torch.float64)

    def scan(a, b, h0):
        return plain_scan(a, b, start if h0 is None else h0)

    return outputs_and_gradients(
        scan, a.double(), b.double(), None if h0 is None else h0.double(), weights, use
    )


def assert_results(actual: Results, expected: Results, a: Tensor, b: Tensor, h0: Tensor | None) -> None:
    accumulated = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    dtypes = {"h": b.dtype, "h_last": accumulated, "da": a.dtype, "db": b.dtype} | (
        {} if h0 is None else {"dh0": h0.dtype}
    )
    assert {name: value.dtype for name, value in actual.items()} == dtypes
    for name, value in actual.items():
        # da is the product of a gradient with an h that was saved in b's dtype
        rounding = ROUNDING[dtypes[name]] + (ROUNDING[b.dtype] if name == "da" else 0)
        assert_close(value, expected[name], atol=PRECISION[accumulated], rtol=rounding, name=name)


narrow = st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(1, 70))
wide = st.tuples(
    st.integers(1, 3), st.integers(1, 7), st.sampled_from([511, 513, 1100])
)  # more than one stripe
kinds = st.sampled_from(["signed", "long", "positive"])


@backends
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@settings(max_examples=8)
@given(
    shape=narrow | wide,
    kind=kinds,
    with_h0=st.booleans(),
    use=st.sampled_from(["both", "both", "h", "h_last"]),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients(backend, dtypes, shape, kind, with_h0, use, seed):
    a, b, start = random_inputs(seed, *shape, dtypes=dtypes, kind=kind)
    h0 = start if with_h0 else None
    weights = random_weights(seed, b)
    actual = outputs_and_gradients(
        lambda a, b, h0: linear_scan(a, b, h0, backend=backend), a, b, h0, weights, use
    )
    assert_results(actual, plain_results(a, b, h0, weights, use), a, b, h0)


@backends
@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 64, 65, 67])
def test_edges_of_blocks(backend, time):
    a, b, h0 = random_inputs(time, 2, time, 3)
    weights = random_weights(time, b)
    actual = outputs_and_gradients(lambda a, b, h0: linear_scan(a, b, h0, backend=backend), a, b, h0, weights)
    assert_results(actual, plain_results(a, b, h0, weights), a, b, h0)


@backends
@settings(max_examples=10)
@given(
    time=st.integers(0, 60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    dtypes=st.sampled_from(["fp64", "fp32", "bf16"]),
)
def test_cut_anywhere(backend, time, cuts, dtypes):
    a, b, h0 = random_inputs(time, 2, time, 33, DTYPES[dtypes], "long")
    weights = random_weights(time, b)

    def cut_scan(a, b, h0):
        edges, pieces = [0, *sorted(min(cut, time) for cut in cuts), time], []
        for low, high in itertools.pairwise(edges):
            h, h0 = linear_scan(a[:, low:high], b[:, low:high], h0, backend=backend)
            pieces.append(h)
        return torch.cat(pieces, dim=1), h0

    assert_results(
        outputs_and_gradients(cut_scan, a, b, h0, weights), plain_results(a, b, h0, weights), a, b, h0
    )


@backends
@pytest.mark.parametrize("dtypes", ["fp64", "fp32", "bf16"])
def test_token_by_token(backend, dtypes):
    a, b, h0 = random_inputs(5, 3, 37, 19, DTYPES[dtypes], "long")
    h, h_last = linear_scan(a, b, h0, backend=backend)
    state, steps = h0, []
    for t in range(b.shape[1]):
        step, state = linear_scan(a[:, t : t + 1], b[:, t : t + 1], state, backend=backend)
        steps.append(step)
    precision = PRECISION[state.dtype]
    assert_close(torch.cat(steps, dim=1), h, atol=precision, rtol=ROUNDING[b.dtype], name="h")
    assert_close(state, h_last, atol=precision, name="h_last")


@backends
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@settings(max_examples=5)
@given(shape=narrow, with_h0=st.booleans(), seed=st.integers(0, 2**20))
def test_decay_is_the_product(backend, dtypes, shape, with_h0, seed):
    """The product of all decays, 1 for no tokens. It does not change the outputs and has no gradient."""
    a, b, start = random_inputs(seed, *shape, dtypes=dtypes, kind="long")
    h0 = start if with_h0 else None
    h, h_last, decay = linear_scan_with_decay(a.requires_grad_(), b, h0, backend=backend)
    assert decay.dtype == h_last.dtype
    assert not decay.requires_grad
    assert_close(decay, a.detach().double().prod(1), atol=0, rtol=(shape[1] + 1) * 2**-24, name="decay")
    for value, other in zip((h, h_last), linear_scan(a, b, h0, backend=backend), strict=True):
        assert torch.equal(value, other)
    if h0 is not None:
        assert_close(
            decay * h0 + linear_scan(a, b, None, backend=backend)[1], h_last, atol=1e-5, name="h_last"
        )


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in another layout, or (expanded) the same row for the whole batch."""
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    return tensor[:1].expand_as(tensor)


@backends
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("dtypes", ["fp64", "bf16"])
@pytest.mark.parametrize("time", [0, 1, 23])
def test_any_layout(backend, how, dtypes, time):
    a, b, h0 = (strided(tensor, how) for tensor in random_inputs(9, 3, time, 17, DTYPES[dtypes]))
    weights = random_weights(9, b)
    weights = strided(weights[0], how), strided(weights[1], how)
    actual = outputs_and_gradients(lambda a, b, h0: linear_scan(a, b, h0, backend=backend), a, b, h0, weights)
    assert_results(actual, plain_results(a, b, h0, weights), a, b, h0)


@backends
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["a", "b", "h0"])
def test_nan_stays_in_its_row(backend, poison, where):
    sound = dict(zip(("a", "b", "h0"), random_inputs(3, 3, 29, 530), strict=True))
    broken = {name: tensor.clone() for name, tensor in sound.items()}
    broken[where][1] = poison
    weights = random_weights(3, sound["b"])

    def scan(a, b, h0):
        return linear_scan(a, b, h0, backend=backend)

    actual, expected = (
        outputs_and_gradients(scan, *inputs.values(), weights=weights) for inputs in (broken, sound)
    )
    assert not actual["h"][1].isfinite().all()
    for name, value in actual.items():
        assert torch.equal(value[[0, 2]], expected[name][[0, 2]]), name


@backends
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 2])  # 7 threads for one row: each takes a stripe of it
def test_threads_change_no_bit(backend, dtypes, batch):
    a, b, h0 = random_inputs(4, batch, 31, 1100, DTYPES[dtypes])
    weights, results = random_weights(4, b), []
    for num_threads in (1, 2, 3, 7):
        torch.set_num_threads(num_threads)
        results.append(
            outputs_and_gradients(lambda a, b, h0: linear_scan(a, b, h0, backend=backend), a, b, h0, weights)
        )
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


# The sequential backends round once per token. The torch backend multiplies decays first, and (1 - x) (1 - y)
# loses x * y, always in the same direction.
@pytest.mark.parametrize(("backend", "bound"), [("reference", 3e-5), ("numba", 3e-5), ("torch", 1e-4)])
def test_long_memory_over_a_long_sequence(backend, bound):
    """Memories of 100 to 100,000 tokens over 8,192 tokens: far below the worst case T / 2**24 = 5e-4."""
    random = generator(11)
    decay = 10 ** -(2 + 3 * torch.rand(1, 1, 48, generator=random))
    a = (1 - decay * torch.rand(2, 8192, 48, generator=random)).float()
    b, h0 = torch.randn(a.shape, generator=random) * decay, torch.randn(2, 48, generator=random)
    weights = random_weights(11, b)
    actual = outputs_and_gradients(lambda a, b, h0: linear_scan(a, b, h0, backend=backend), a, b, h0, weights)
    exact = outputs_and_gradients(
        lambda a, b, h0: linear_scan(a, b, h0, backend="reference"),
        a.double(),
        b.double(),
        h0.double(),
        weights,
    )
    for name, value in actual.items():
        assert_close(value, exact[name], atol=bound, name=name)


@pytest.mark.slow
def test_more_elements_than_an_int32_counts():
    """2^31 and some: an int32 offset would wrap around, and write the last rows over the first."""
    time, width = 2**16 + 1, 2**15
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024
    if available < 11e9:
        pytest.skip(f"two tensors of 2^31 bf16 elements take 8.6 GB, and {available / 1e9:.1f} GB are free")
    a = torch.full((1, time, width), 0.5, dtype=torch.bfloat16)
    a[0, -1] = 0.25
    a[0, 0] = 2.0
    h, h_last = linear_scan(a, a, torch.ones(1, width), backend="numba")  # b is a: h_t = a_t (h_{t-1} + 1)
    assert torch.equal(h[0, 0], torch.full((width,), 4.0, dtype=torch.bfloat16))
    assert torch.equal(h[0, 1], torch.full((width,), 2.5, dtype=torch.bfloat16))
    assert torch.equal(h[0, -2], torch.ones(width, dtype=torch.bfloat16))
    assert torch.equal(h_last, torch.full((1, width), 0.5))
