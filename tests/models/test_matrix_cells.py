"""What is particular to the cells with a state matrix: heads, keys, the stabilizer, the size of the state."""

import math

import pytest
import torch
from helpers import assert_close, generator, logits_of, new_model, random_ids
from naive_cells import NAIVE
from torch import Tensor

from minrnn.models import MinRNNConfig
from minrnn.models.boundaries import NO_BOUNDARIES
from minrnn.models.matrix_cells import HGRN2, MatrixMixer, nearest_divisor
from minrnn.models.registry import CELLS

NAMES = [name for name, cell in CELLS.items() if issubclass(cell, MatrixMixer)]
cells = pytest.mark.parametrize("name", NAMES)


def make(name: str, dtype: torch.dtype = torch.float64, **fields) -> tuple[MatrixMixer, Tensor]:
    """The mixer of a first layer without an output gate, and random projections."""
    model = new_model(dtype=dtype, cell=name, output_gate=False, **fields)
    mixer = model.model.layers[0].get_submodule("mixer")
    assert isinstance(mixer, MatrixMixer)
    return mixer, torch.randn(2, 70, sum(mixer.widths), generator=generator(1)).to(dtype)


def bounds(mixer: MatrixMixer) -> tuple[Tensor, ...]:
    """The lower bounds that `recur` takes, if the cell has any."""
    is_bounded = isinstance(mixer, HGRN2)
    return (torch.zeros(mixer.gate_bias.shape[1], dtype=torch.float64),) if is_bounded else ()


@cells
@pytest.mark.parametrize(("head_dim", "keys"), [(24, 5), (4, 7), (1, 1), (6, None)])
def test_heads_and_keys_of_any_size(name, head_dim, keys):
    """More than one chunk of the scan, K unlike V, one head, one channel a head."""
    mixer, projected = make(name, head_dim=head_dim, state_expansion=keys)
    y, last = mixer.recur(projected, None, NO_BOUNDARIES, *bounds(mixer))
    expected, _ = NAIVE[name](mixer, projected.split(mixer.widths, -1), None, *bounds(mixer))
    assert y.shape == (2, 70, 24)
    assert_close(y, expected, atol=1e-10, name="y")
    own = {"linear_attention": head_dim, "hgrn2": head_dim, "mlstm": head_dim, "gla": max(head_dim // 2, 1)}
    num_keys = keys or own[name]
    columns = head_dim + (name in ("linear_attention", "mlstm"))
    assert last.shape[1] == 24 // head_dim * (num_keys * columns + (name == "mlstm"))


@cells
def test_the_configuration_knows_the_size_of_the_state(name):
    config = MinRNNConfig(cell=name, hidden_size=32, num_hidden_layers=1, state_expansion=3)
    model = new_model(cell=name, hidden_size=32, num_hidden_layers=1, state_expansion=3, head_dim=None)
    state = model(random_ids(2, 5), use_cache=True).past_key_values
    assert state is not None
    assert state.layers[0].recurrent.shape == (2, config.state_size)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_mlstm_is_finite_for_gates_of_any_size(size, sign):
    """Also where exp(i) overflows or vanishes; outputs and gradients are those of gates that are limited."""
    mixer, projected = make("mlstm", torch.float32)
    *others, i, f = projected.split(mixer.widths, -1)
    gates = torch.cat([*others, sign * size * i, size * f], -1).requires_grad_()
    y, last = mixer.recur(gates, None, NO_BOUNDARIES)
    y.square().sum().backward()
    assert gates.grad is not None
    assert all(x.isfinite().all() for x in (y, last, gates.grad))
    assert y.abs().amax() > 0.1


@pytest.mark.parametrize("shift", [-40.0, 0.0, 40.0])
def test_mlstm_does_not_depend_on_its_stabilizer(shift):
    """The state S | m and exp(-shift) S | m + shift are the same."""
    mixer, projected = make("mlstm")
    _, state = mixer.recur(projected[:, :30], None, NO_BOUNDARIES)
    s, m = state.split([mixer.matrix_size, mixer.num_heads], -1)
    expected, _ = mixer.recur(projected[:, 30:], state, NO_BOUNDARIES)
    shifted = torch.cat([s * math.exp(-shift), m + shift], -1)
    actual, _ = mixer.recur(projected[:, 30:], shifted, NO_BOUNDARIES)
    assert_close(actual, expected, atol=1e-12)


@cells
def test_rows_of_padding_have_finite_gradients(name):
    model, ids = new_model(cell=name), random_ids(3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0], mask[1, :6] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@cells
def test_scan_backends_agree(name):
    """`numba` has no kernel for matrices, and stands for the fastest that there is."""
    ids = random_ids(2, 20)
    expected = logits_of(new_model(cell=name, dtype=torch.float64, scan_backend="reference"), ids)
    for backend in (None, "torch", "numba"):
        actual = logits_of(new_model(cell=name, dtype=torch.float64, scan_backend=backend), ids)
        assert_close(actual, expected, atol=1e-12, name=str(backend))


@pytest.mark.parametrize(
    ("number", "target", "nearest"), [(384, 64, 64), (288, 64, 72), (24, 64, 24), (383, 64, 383), (90, 7, 6)]
)
def test_nearest_divisor(number, target, nearest):
    assert nearest_divisor(number, target) == nearest


@cells
def test_a_head_size_that_does_not_divide_the_width_is_refused(name):
    message = (
        "head_dim: must divide expansion_factor \\* hidden_size = 288, and 64 does not; "
        "the nearest that does is 72"
    )
    with pytest.raises(ValueError, match=message):
        MinRNNConfig(cell=name, hidden_size=192, head_dim=64)
    message = (
        "head_dim: expansion_factor \\* hidden_size = 383 has no divisor near 64, and heads of 383 would"
    )
    with pytest.raises(ValueError, match=message):
        MinRNNConfig(cell=name, hidden_size=383, expansion_factor=1)
    with pytest.raises(ValueError, match="head_dim: must be at least 1, not 0"):
        MinRNNConfig(cell=name, hidden_size=192, head_dim=0)
