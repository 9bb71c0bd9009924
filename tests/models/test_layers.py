"""Norm and gated activation as CPU kernels against plain torch in fp64; layouts and threads of all three."""

from collections.abc import Callable

import pytest
import torch
from helpers import assert_close, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import (
    DTYPES,
    FP32,
    HALF_UNIT,
    assert_results,
    assert_same_bits,
    conv_of,
    doubled,
    draw,
    dtypes,
    norm_dtypes,
    norm_of,
    outputs_and_gradients,
    plain_norm,
    random_conv_inputs,
    row_counts,
    widths,
)
from torch import Tensor

from minrnn.models.boundaries import reach_within_document
from minrnn.models.layers import RMSNorm, swiglu
from minrnn.models.numba_support import serves


@norm_dtypes
@settings(max_examples=15)
@given(rows=row_counts, width=widths, scale=st.sampled_from([1e-3, 1.0, 1e4]), seed=st.integers(0, 2**20))
def test_norm(kind, rows, width, scale, seed):
    dtype, out = DTYPES[kind]
    x, weight = (scale * draw(seed, rows, width)).to(dtype), draw(seed + 1, width)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != out):
        actual = outputs_and_gradients(norm_of(), x=x, weight=weight)
    expected = outputs_and_gradients(plain_norm, **doubled(x=x, weight=weight))
    inverse = x.double().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    sizes = {
        "y": expected["y"].abs(),
        "d_x": 4 * weight.abs().max() * inverse,
        "d_weight": 2 * (x.abs() * inverse).sum(0),
    }
    assert_results(actual, expected, {"y": out, "d_x": dtype, "d_weight": torch.float32}, **sizes)


@norm_dtypes
def test_norm_weights_in_their_own_dtype(kind):
    """A model cast to bf16 has bf16 gains, and gets bf16 gradients for them."""
    dtype, out = DTYPES[kind]
    x, weight = draw(1, 70, 17, dtype=dtype), draw(2, 17, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != out):
        actual, wide = (outputs_and_gradients(norm_of(), x=x, weight=w) for w in (weight, weight.float()))
    assert actual["d_weight"].dtype == torch.bfloat16
    assert torch.equal(actual["d_weight"], wide["d_weight"].bfloat16())
    assert_same_bits(
        {name: actual[name] for name in ("y", "d_x")}, {name: wide[name] for name in ("y", "d_x")}
    )


def test_norm_of_zeros_and_large_values():
    """A row of zeros stays one, with finite gradients; a large row does not overflow."""
    x = torch.zeros(3, 5)
    x[1], x[2, 3] = 1e15, 1e-30
    actual = outputs_and_gradients(norm_of(), x=x, weight=torch.ones(5))
    assert torch.equal(actual["y"][:2], torch.tensor([[0.0], [1.0]]).expand(2, 5))
    assert all(value.isfinite().all() for value in actual.values())


@pytest.mark.parametrize("backend", [None, "numba", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_norm_comes_out_in_the_dtype_of_the_matrix_product(backend, dtype, autocast):
    """As torch's own layers: autocast's dtype where it is on, but fp64 stays fp64. Inside, at least fp32."""
    x, norm = draw(1, 70, 17).to(dtype), RMSNorm(17, 1e-6, backend)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = norm(x)
        assert y.dtype == (
            torch.nn.functional.linear(x, torch.ones(1, 17, dtype=dtype)).dtype
            if dtype != torch.float64
            else dtype
        )
    half = {torch.float64: 1e-7, torch.float32: 1e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[
        y.dtype
    ]  # the gains are fp32
    assert_close(y, plain_norm(x.double(), torch.ones(17)), atol=1e-7, rtol=half * 1.001)


@dtypes
@settings(max_examples=15)
@given(rows=row_counts, width=widths, seed=st.integers(0, 2**20))
def test_swiglu(dtype, rows, width, seed):
    x = (3 * draw(seed, rows, 2 * width)).to(dtype)
    actual, expected = outputs_and_gradients(swiglu, x=x), outputs_and_gradients(swiglu, **doubled(x=x))
    size = expected["d_x"].abs() + 0.1  # 1 + g (1 - sigmoid(g)) passes through 0
    assert_results(actual, expected, {"y": dtype, "d_x": dtype}, y=expected["y"].abs(), d_x=size)


@dtypes
def test_swiglu_of_extremes(dtype):
    gate, up = torch.meshgrid(
        torch.tensor([0.0, 90.0, -90.0, 1e4, -1e4]), torch.tensor([1.0, -1e4, 0.0]), indexing="ij"
    )
    x = torch.cat([gate.flatten(), up.flatten()]).to(dtype).view(1, -1)
    actual, expected = outputs_and_gradients(swiglu, x=x), outputs_and_gradients(swiglu, **doubled(x=x))
    for name, value in actual.items():
        assert_close(value, expected[name], atol=1e-30, rtol=2 * HALF_UNIT[dtype] + FP32, name=name)


@norm_dtypes
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(kind, poison):
    dtype, out = DTYPES[kind]
    others = [row for row in range(70) if row != 65]
    for function, leaves in (
        (norm_of(), {"x": draw(5, 70, 18, dtype=dtype), "weight": draw(6, 18)}),
        (swiglu, {"x": draw(5, 70, 18, dtype=dtype)}),
    ):
        broken = leaves | {"x": leaves["x"].clone()}
        broken["x"][65, 3] = poison
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != out):
            actual, sound = (
                outputs_and_gradients(function, **broken),
                outputs_and_gradients(function, **leaves),
            )
        assert not actual["d_x"][65].isfinite().all()
        for name in ("y", "d_x"):
            assert torch.equal(actual[name][others], sound[name][others]), name


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[torch.dtype], dict[str, Tensor]]]] = {
    "norm": (norm_of(), lambda dtype: {"x": draw(7, 3, 1000, 37, dtype=dtype), "weight": draw(8, 37)}),
    "swiglu": (swiglu, lambda dtype: {"x": draw(7, 3, 100, 74, dtype=dtype)}),
    "conv": (conv_of(), lambda dtype: random_conv_inputs(7, dtype, 3, 1000, 37, 4)),
    "conv-reach": (
        conv_of(None, reach_within_document(torch.rand(3, 1000, generator=generator(9)) < 0.1, 4)),
        lambda dtype: random_conv_inputs(7, dtype, 3, 1000, 37, 4),
    ),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@functions
@dtypes
def test_threads_change_no_bit(name, dtype):
    """The sums over tokens are large enough for torch to use several threads."""
    function, make = FUNCTIONS[name]
    results = []
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        results.append(outputs_and_gradients(function, **make(dtype)))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@functions
@dtypes
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_any_layout(name, dtype, how):
    """Inputs, however they lie in memory."""

    def view(tensor: Tensor) -> Tensor:
        if how == "transposed":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        return (
            torch.stack([tensor, tensor - 7], dim=-1)[..., 0]
            if how == "sliced"
            else tensor[:1].expand_as(tensor)
        )

    function, make = FUNCTIONS[name]
    leaves = {name: view(leaf) for name, leaf in make(dtype).items()}
    expected = outputs_and_gradients(function, **{name: leaf.contiguous() for name, leaf in leaves.items()})
    assert_same_bits(outputs_and_gradients(function, **leaves), expected)


@functions
@dtypes
def test_gradients_in_any_layout(name, dtype):
    """A gradient may come in expanded (of a sum) or transposed."""
    function, make = FUNCTIONS[name]
    leaves = {name: leaf.requires_grad_() for name, leaf in make(dtype).items()}
    y, tensors = function(**leaves), list(leaves.values())
    expected = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    for gradient in (
        torch.ones((), dtype=dtype).expand_as(y),
        torch.ones_like(y).transpose(0, -1).contiguous().transpose(0, -1),
    ):
        actual = torch.autograd.grad(y, tensors, gradient, retain_graph=True)
        assert all(torch.equal(value, other) for value, other in zip(actual, expected, strict=True))


@functions
@dtypes
def test_default_dtype_has_no_effect(name, dtype):
    function, make = FUNCTIONS[name]
    leaves = make(dtype)
    expected = outputs_and_gradients(function, **leaves)
    torch.set_default_dtype(torch.float64)
    try:
        y = function(**{name: leaf.requires_grad_() for name, leaf in leaves.items()})
        weights = torch.randint(-8, 9, y.shape, generator=generator(99)) / 4
        gradients = torch.autograd.grad((y * weights.to(y.dtype)).double().sum(), list(leaves.values()))
    finally:
        torch.set_default_dtype(torch.float32)
    for value, other in zip((y, *gradients), expected.values(), strict=True):
        assert value.dtype == other.dtype
        assert torch.equal(value, other)


@pytest.mark.parametrize("name", ["norm", "swiglu"])
def test_dimensions_before_the_last_are_rows(name):
    """Any number of dimensions gives the results of the same rows in a list."""
    function, make = FUNCTIONS[name]
    leaves = make(torch.float32)
    rows = leaves["x"].flatten(0, -2)[:12]
    expected = function(**(leaves | {"x": rows}))
    for shape in ((12,), (3, 4), (2, 1, 3, 2), (1, 12)):
        assert torch.equal(function(**(leaves | {"x": rows.view(*shape, -1)})), expected.view(*shape, -1))
    assert torch.equal(function(**(leaves | {"x": rows[0]})), expected[0])
    assert function(**(leaves | {"x": rows.new_empty(0, 3, rows.shape[1])})).shape == (
        0,
        3,
        expected.shape[1],
    )


def test_one_token_of_inference_uses_torch():
    """There an operator call costs more than its work. Other inputs and a named backend use the kernels."""
    token, row = torch.ones(4, 1, 8), torch.ones(8)
    assert serves(token, None)
    with torch.no_grad():
        assert not serves(token, None)
        assert serves(token, "numba")
        assert serves(torch.ones(4, 2, 8), None)
        assert serves(row, None)
        assert not serves(torch.ones(4, 1, 3, 8), None)  # the heads of one token
        assert serves(torch.ones(4, 2, 1, 8), None)
    for backend in ("reference", "torch", "triton"):
        assert not serves(token, backend)
    assert not serves(token.double(), None)
    assert not serves(token.to("meta"), None)
