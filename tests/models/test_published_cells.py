"""The cells of other papers equal their equations, with all gradients, for keys and phases of any size."""

import math

import pytest
import torch
from helpers import assert_close, assert_same_gradients, generator, gradients, new_model, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cells import GATES, NAIVE, UNSCALED, from_pairs, leaky, to_pairs
from torch import Tensor

from minrnn.models import MinRNNConfig
from minrnn.models.boundaries import NO_BOUNDARIES
from minrnn.models.max_plus import EMPTY, in_blocks, max_plus_scan
from minrnn.models.minimal_coefficients import MINIMAL_CELLS
from minrnn.models.mixer import MinRNNMixer
from minrnn.models.registry import CELLS
from minrnn.models.rotating_scan import rotating_scan

BATCH, TIME = 2, 13
published = pytest.mark.parametrize("name", NAIVE)


def test_every_cell_has_a_naive_twin():
    assert set(CELLS) == set(MINIMAL_CELLS) | set(NAIVE)


def make(name: str, **fields) -> tuple[MinRNNMixer, Tensor, tuple[Tensor, ...]]:
    """A mixer in fp64, random projections, and lower bounds if it has any."""
    model = new_model(dtype=torch.float64, cell=name, **fields)
    mixer = model.model.layers[1].get_submodule("mixer")
    assert isinstance(mixer, MinRNNMixer)
    projected = torch.randn(BATCH, TIME, sum(mixer.widths), generator=generator(1), dtype=torch.float64)
    size = mixer.lower_bound_size(model.config)
    return mixer, projected, (torch.rand(size, generator=generator(2), dtype=torch.float64),) if size else ()


def naive(name: str, mixer: MinRNNMixer, projected: Tensor, state: Tensor | None, bound: tuple[Tensor, ...]):
    parts = projected.split(mixer.widths, -1)
    if mixer.gate is None:
        return NAIVE[name](mixer, parts, state, *bound)
    h, last = NAIVE[name](mixer, parts[:-1], state, *bound)
    return h * GATES.get(name, torch.nn.functional.silu)(parts[-1]), last


def carried_state(name: str, mixer: MinRNNMixer, projected: Tensor, bound: tuple[Tensor, ...]) -> Tensor:
    """The state after other tokens."""
    with torch.no_grad():
        return mixer.recur(projected.flip(1), None, NO_BOUNDARIES, *bound)[1]


@published
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("output_gate", [False, True])
def test_outputs_and_gradients_are_those_of_the_equations(name, carried, output_gate):
    mixer, projected, bound = make(name, output_gate=output_gate)
    state = carried_state(name, mixer, projected, bound).requires_grad_() if carried else None
    own = [
        parameter
        for key, parameter in mixer.named_parameters()
        if key not in ("in_proj.weight", "out_proj.weight", "conv_weight")
    ]
    leaves = [projected.requires_grad_(), *(x.requires_grad_() for x in bound), *own]
    if state is not None and name not in UNSCALED:  # m has no gradient
        leaves.append(state)
    y, last = mixer.recur(projected, state, NO_BOUNDARIES, *bound)
    if name in UNSCALED:
        last = UNSCALED[name](mixer, last)
    expected_y, expected_last = naive(name, mixer, projected, state, bound)
    assert_close(y, expected_y, atol=1e-12, name="y")
    assert_close(last, expected_last, atol=1e-12, name="last")
    weights = torch.randn(y.shape, generator=generator(3), dtype=y.dtype)
    last_weights = torch.linspace(-1, 1, last.shape[1], dtype=y.dtype)
    grads = [
        torch.autograd.grad((a * weights).sum() + (b * last_weights).sum(), leaves)
        for a, b in ((y, last), (expected_y, expected_last))
    ]
    for i, (actual, expected) in enumerate(zip(*grads, strict=True)):
        assert_close(actual, expected, atol=1e-10, name=f"gradient {i}")


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_rwkv4_is_finite_for_keys_of_any_size(size):
    """The average stays inside the range of the values, also where exp(key) overflows or vanishes."""
    mixer, projected, _ = make("rwkv4", output_gate=False)
    mixer, projected = mixer.float(), projected.float()
    keys, values = projected.chunk(2, -1)
    y, last = mixer.recur(torch.cat([size * keys, values], -1).requires_grad_(), None, NO_BOUNDARIES)
    assert y.isfinite().all()
    assert last.isfinite().all()
    assert (y <= values.amax(1, keepdim=True) + 1e-5).all()
    assert (y >= values.amin(1, keepdim=True) - 1e-5).all()
    y.sum().backward()
    for name in ("decay", "bonus"):
        gradient = mixer.get_parameter(name).grad
        assert gradient is not None
        assert gradient.isfinite().all()


@pytest.mark.parametrize("scan", [max_plus_scan, in_blocks])
@settings(max_examples=25)
@given(time=st.integers(0, 40), starts=st.sets(st.integers(0, 39), max_size=5), seed=st.integers(0, 99))
def test_the_running_maximum_is_that_of_a_loop(scan, time, starts, seed):
    key = 20 * torch.randn(2, time, 3, generator=generator(seed))
    w = torch.rand(2, time, 3, generator=generator(seed + 1)) * 5
    for t in starts:
        w[:, t : t + 1] = -EMPTY
    m0 = torch.randn(2, 3, generator=generator(seed + 2))
    m, last = scan(w, key, m0)
    expected = m0
    for t in range(time):
        expected = torch.maximum(expected - w[:, t], key[:, t])
        assert_close(m[:, t], expected, atol=1e-6)
    assert_close(last, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
@pytest.mark.parametrize("time", [0, 1, 17])
def test_a_rotating_scan_is_the_complex_recurrence(backend, time):
    a = torch.rand(2, time, 3, dtype=torch.float64, generator=generator(0))
    theta = torch.tensor([0.0, 2.5, -9.0], dtype=torch.float64)
    b = torch.randn(2, time, 6, dtype=torch.float64, generator=generator(1))
    h0 = torch.randn(2, 6, dtype=torch.float64, generator=generator(2))
    leaves = [x.requires_grad_() for x in (a, theta, b, h0)]
    h, last = rotating_scan(a, theta, b, h0, backend)
    if time:
        expected, final = leaky(torch.polar(a, theta.expand_as(a)), from_pairs(b), from_pairs(h0))
        pair = to_pairs(expected), to_pairs(final)
    else:
        pair = b, h0
    weights = torch.randn(2, time + 1, 6, dtype=torch.float64, generator=generator(3))
    for actual, wanted in zip((h, last), pair, strict=True):
        assert_close(actual, wanted, atol=1e-12)
    total = [(x * weights[:, :time]).sum() + (y * weights[:, time]).sum() for x, y in ((h, last), pair)]
    grads = [torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in total]
    for actual, wanted in zip(*grads, strict=True):
        assert_close(actual, wanted, atol=1e-11)


def test_phases_do_not_lose_precision_with_the_length():
    """After a million tokens, a rotation in fp32 is as far off as its angle's own rounding."""
    theta = torch.tensor([2.0**-5, 1.0 + 2.0**-20, 3.0])
    time = 1_000_000
    h, _ = rotating_scan(
        torch.ones(1, time, 3), theta, torch.zeros(1, time, 6), torch.tensor([[1.0] * 3 + [0.0] * 3])
    )
    exact = (theta.double() * time).remainder(2 * math.pi)
    rounding = 2.0**-24 * time  # of the number of turns, one rounding of theta / (2 pi) for all tokens
    assert ((h[0, -1, :3].double() - exact.cos()).abs() < 2 * math.pi * rounding + 1e-5).all()
    step = rotating_scan(torch.ones(1, 1, 3), theta, torch.zeros(1, 1, 6), h[:, -2])[0]
    assert_close(step[0, 0], h[0, -1], atol=1e-6, name="from token to token")


@published
@pytest.mark.slow
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()  # of the blocks of other cells, which count towards the limit of recompilations
    model, ids = new_model(cell=name).train(), random_ids(2, 40)
    loss = model(ids, labels=ids).loss
    expected = gradients(model, loss)
    model.model.compile(fullgraph=True, backend="aot_eager")
    compiled_loss = model(ids, labels=ids).loss
    assert_close(compiled_loss, loss, atol=1e-6)
    assert_same_gradients(gradients(model, compiled_loss), expected, atol=1e-5)


@published
def test_bf16_is_near_fp64(name):
    model, ids = new_model(cell=name), random_ids(2, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(ids).logits
    with torch.no_grad():
        expected = torch.nn.Module.to(model, torch.float64)(ids).logits
    assert_close(actual, expected, atol=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"cell": "hgrn", "candidate_activation": "g"},
            "candidate_activation: is for mingru, minlstm, mingru_signed, minlstm_signed, mingru_normalized, "
            "minlstm_normalized, and not for hgrn: leave it out \\(preset paper sets it\\)",
        ),
        ({"cell": "gilr", "candidate_activation": "silu"}, "and not for gilr: leave it out$"),
        (
            {"cell": "rglru", "head_dim": 8, "state_expansion": 4},
            "head_dim: is for linear_attention, hgrn2, mlstm, gla, and not for rglru: leave it out; "
            "state_expansion: is for s4d, linear_attention, hgrn2, mlstm, gla, and not for rglru",
        ),
        ({"cell": "s4d", "head_dim": 8}, "head_dim: .* not for s4d"),
        (
            {"cell": "lru", "hidden_size": 5, "expansion_factor": 1},
            "must give an even number of channels",
        ),
        ({"cell": "s4d", "state_expansion": 0}, "state_expansion: must be at least 1"),
        ({"cell": "hgru"}, "cell: 'hgru' is none of mingru"),
    ],
)
def test_fields_that_do_not_fit_the_cell(fields, message):
    with pytest.raises(ValueError, match=message):
        MinRNNConfig(**fields)
