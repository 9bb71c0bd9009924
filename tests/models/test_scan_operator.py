"""The scan as a torch operator: opcheck, torch.compile, autocast, its name, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_close, generator, run_and_differentiate
from torch import Tensor

import minrnn.models.scan as scan_module
from minrnn.models import linear_scan as exported_linear_scan
from minrnn.models.operators import define, namespace
from minrnn.models.scan import linear_scan

backends = pytest.mark.parametrize("backend", ["reference", "torch", "numba"])


def operator(name: str):
    return getattr(getattr(torch.ops, namespace(scan_module.__file__)), name).default


def inputs(
    layout: str, time: int, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, h0) in a layout; time first in memory is what a transposed batch has."""
    random = generator(1)
    a, b = (
        torch.rand(2, time, 5, generator=random).to(dtypes[0]),
        torch.randn(2, time, 5, generator=random).to(dtypes[1]),
    )
    h0 = torch.randn(2, 5, generator=random)
    if layout == "transposed":
        a, b, h0 = (tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in (a, b, h0))
    return a, b, h0


@backends
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("time", [0, 6])
@pytest.mark.parametrize("b_dtype", [torch.float32, torch.bfloat16])
def test_opcheck_forward(backend, layout, time, b_dtype):
    arguments = tuple(tensor.requires_grad_() for tensor in inputs(layout, time, (torch.float32, b_dtype)))
    tolerance = 1e-2 if b_dtype == torch.bfloat16 else 1e-6
    torch.library.opcheck(
        operator(f"linear_scan_{backend}"), (*arguments, time > 0), atol=tolerance, rtol=tolerance
    )


@backends
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("time", [0, 6])
def test_opcheck_backward(backend, layout, time):
    a, h, h0 = inputs(layout, time)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        operator(f"linear_scan_backward_{backend}"),
        (a, h, h0, torch.randn_like(h), torch.randn_like(h0)),
        test_utils=checks,
    )


@backends
def test_compiles_without_a_graph_break(backend):
    def function(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        h, h_last = linear_scan(torch.sigmoid(a), b.tanh(), h0, backend=backend)
        return (h * b).sum() + (h_last**2).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for layout in ("contiguous", "transposed"):
        arguments = inputs(layout, 7)
        for actual, expected in zip(
            run_and_differentiate(compiled, *arguments),
            run_and_differentiate(function, *arguments),
            strict=True,
        ):
            assert_close(actual, expected, atol=1e-6)


def test_compiles_for_any_length():
    compiled = torch.compile(
        lambda a, b: linear_scan(a, b)[0], fullgraph=True, backend="aot_eager", dynamic=True
    )
    for time in (3, 8, 21):
        a, b, _ = inputs("contiguous", time)
        assert torch.equal(compiled(a, b), linear_scan(a, b)[0])


@backends
def test_autocast_has_no_effect(backend):
    a, b, h0 = inputs("contiguous", 9)
    expected = linear_scan(a, b, h0, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_scan(a, b, h0, backend=backend)
    for value, other in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, other)


@backends
def test_inputs_stay_and_outputs_are_new(backend):
    for time in (0, 1, 5):
        arguments = inputs("contiguous", time)
        before = [tensor.clone() for tensor in arguments]
        h, h_last = linear_scan(*arguments, backend=backend)
        h.fill_(7)
        h_last.fill_(7)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_backend_is_the_one_of_the_device(dtype, monkeypatch):
    monkeypatch.setattr(scan_module, "triton_problem", lambda device, dtype: None)
    assert scan_module.default_backend(torch.device("cuda"), dtype) == "triton"
    assert scan_module.default_backend(torch.device("cpu"), dtype) == "numba"
    assert scan_module.default_backend(torch.device("meta"), dtype) == "torch"
    assert exported_linear_scan is linear_scan


def test_namespace_is_a_hash_of_the_source(tmp_path):
    """Of the files that the operators are made of, and of no other file of the folder."""

    def copy(name: str, **changed: str) -> str:
        folder = tmp_path / name
        shutil.copytree(
            Path(scan_module.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__")
        )
        for module, text in changed.items():
            with (folder / f"{module}.py").open("a") as file:
                file.write(text)
        return namespace(str(folder / "scan.py"))

    actual = copy("one")
    assert actual == copy("same")
    assert actual == copy("something-else", layers_numba="\n#", note="\n#")
    for module in (
        "scan",
        "scan_numba",
        "numba_support",
        "scan_torch",
        "scan_triton",
        "tiles_triton",
        "operators",
    ):
        assert actual != copy(module, **{module: "\n#"}), module


def test_an_operator_is_registered_once():
    def one_more(a: Tensor) -> Tensor:
        return a + 1

    first = define("one_more", one_more, torch.empty_like)
    second = define("one_more", lambda a: a + 2, torch.empty_like)
    assert first(torch.ones(1)) == second(torch.ones(1)) == 2


@pytest.mark.parametrize(
    ("a", "b", "h0", "message"),
    [
        ((2, 3, 4), (2, 3, 5), None, r"\(2, 3, 4\) and \(2, 3, 5\)"),
        ((3, 4), (3, 4), None, r"\[batch, time, width\]"),
        ((1, 3, 4), (2, 3, 4), None, r"\(1, 3, 4\) and \(2, 3, 4\)"),
        ((2, 3, 4), (2, 3, 4), (4,), r"\(2, 4\), but got \(4,\)"),
        ((2, 3, 4), (2, 3, 4), (2, 1, 4), r"\(2, 4\), but got \(2, 1, 4\)"),
        ((2, 3, 4), (2, 3, 4), (1, 4), r"\(2, 4\), but got \(1, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(a, b, h0, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(torch.ones(a), torch.ones(b), None if h0 is None else torch.ones(h0))


@pytest.mark.parametrize("name", ["a", "b", "h0"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_do_not_fit_are_refused(name, dtype):
    arguments = dict(zip(("a", "b", "h0"), inputs("contiguous", 3), strict=True))
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(ValueError, match=f"{name} is torch.{str(dtype).removeprefix('torch.')}"):
        linear_scan(**arguments)


def test_unknown_backends_and_devices_are_refused():
    a, b, h0 = inputs("contiguous", 3)
    with pytest.raises(ValueError, match="'cuda_graph'; choose one of reference, torch, numba, triton"):
        linear_scan(a, b, h0, backend="cuda_graph")
    with pytest.raises(ValueError, match="on one device, but a is on meta and the others on cpu"):
        linear_scan(a.to("meta"), b, h0)


@pytest.mark.parametrize(("device", "kernels"), [("cpu", "numba"), ("cuda:1", "triton")])
def test_unavailable_kernels_are_replaced_with_a_warning_or_refused(device, kernels, monkeypatch):
    """A warning names the reason and the cost. If the backend was named, it is an error with the reason."""
    warnings: list[str] = []
    monkeypatch.setattr(scan_module, "numba_problem", lambda: "the reason")
    monkeypatch.setattr(scan_module, "triton_problem", lambda device, dtype: "the reason")
    monkeypatch.setattr(scan_module.logger, "warning_once", warnings.append)
    assert scan_module.default_backend(torch.device(device), torch.bfloat16) == "torch"
    assert len(warnings) == 1
    message = (
        f"warning: the {kernels} kernels cannot run on {device} in bfloat16: the reason; "
        "the torch backend takes their place"
    )
    assert warnings[0].startswith(message)
    assert "\n" not in warnings[0]
    with pytest.raises(
        ValueError, match=f"The {kernels} kernels cannot run here: the reason; use another backend"
    ):
        scan_module.check_backend(kernels, torch.device(device), torch.bfloat16)


def test_triton_without_a_gpu_is_refused():
    with pytest.raises(
        ValueError, match=r"they run on a GPU .*, and the tensors are on cpu; use another backend"
    ):
        linear_scan(*inputs("contiguous", 3), backend="triton")
    with pytest.raises(
        ValueError, match="they run on the CPU, and the tensors are on cuda:0; use another backend"
    ):
        scan_module.check_backend("numba", torch.device("cuda:0"), torch.float32)
