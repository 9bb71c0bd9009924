"""The matrix scan on flash-linear-attention's kernels, by a stand-in of the package that runs on the CPU.

The stand-in has the kernels' signatures and semantics: sequences in one row of tokens, one dtype for q, k and
v, fp32 states. It is a loop over sequences and tokens, and refuses what the kernels refuse.
"""

import ast
import importlib.util
import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_close
from matrix_scan_cases import plain_scan, random_case, results, weights_of
from torch import Tensor

import minrnn.models.matrix_scan as matrix_scan_module
import minrnn.models.matrix_scan_fla as fla
from minrnn.models.matrix_scan import default_matrix_backend, matrix_scan

CPU = torch.device("cpu")


def sequences_one_by_one(q, k, v, log_decay, scale, initial_state, cu_seqlens):
    """What both kernels compute; log_decay [batch, time, heads, K]."""
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] % 16 == v.shape[-1] % 16 == 0
    assert log_decay.isfinite().all()
    edges = None if cu_seqlens is None else cu_seqlens.tolist()
    rows = range(len(v)) if edges is None else [0] * (len(edges) - 1)
    outputs, states = [], []
    for n, row in enumerate(rows):
        low, high = (0, v.shape[1]) if edges is None else edges[n : n + 2]
        state = initial_state[n]
        for t in range(low, high):
            new = k[row, t].unsqueeze(-1).float() * v[row, t].unsqueeze(-2).float()
            state = log_decay[row, t].exp().unsqueeze(-1) * state + new
            outputs.append((scale * q[row, t].float().unsqueeze(-1) * state).sum(-2))
        states.append(state)
    return torch.stack(outputs).view(v.shape).to(v.dtype), torch.stack(states)


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
):
    assert q.shape == k.shape == g.shape
    assert output_final_state
    assert not state_v_first
    assert initial_state is not None
    assert initial_state.dtype == torch.float32
    if cu_seqlens is not None:
        assert q.shape[0] == 1
        assert len(initial_state) == len(cu_seqlens) - 1
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return sequences_one_by_one(q, k, v, g, scale, initial_state, cu_seqlens)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs,
):
    assert g is not None
    assert g.shape == q.shape[:3]
    assert g_gamma is None
    assert not kwargs
    log_decay = g.unsqueeze(-1).expand_as(q)
    return chunk_gla(
        q,
        k,
        v,
        log_decay,
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        cu_seqlens,
        cu_seqlens_cpu,
    )


def wrong_decay(*inputs, **options):
    """A kernel that takes log a for log2 a."""
    q, k, v, log_decay = inputs
    return chunk_gla(q, k, v, log_decay * 0.69, **options)


def rounded_decay(*inputs, **options):
    """A kernel that rounds the decay itself to bf16."""
    q, k, v, log_decay = inputs
    return chunk_gla(q, k, v, log_decay + (log_decay.exp().bfloat16().log() - log_decay).detach(), **options)


def overflowing(*inputs, **options):
    """A kernel that divides by the product of 16 decays."""
    q, k, v, log_decay = inputs
    return chunk_gla(q, k * (0 * (-16 * log_decay).exp() + 1), v, log_decay, **options)


def wrong_gradient(*inputs, **options):
    """A kernel whose values are right and whose gradients are not."""
    y, last = chunk_gla(*inputs, **options)
    return 2 * y - y.detach(), last


def failing(*inputs, **options):
    """A kernel that does not compile."""
    raise RuntimeError("out of resource: shared memory\nmore lines")


@pytest.fixture
def install(monkeypatch):
    """Install a package `fla` with these kernels, and make the module forget what it knew of the other."""

    def install(**kernels) -> None:
        kernels = {"chunk_gla": chunk_gla, "chunk_simple_gla": chunk_simple_gla, **kernels}
        for name, kernel in (("gla", "chunk_gla"), ("simple_gla", "chunk_simple_gla")):
            module = ModuleType(f"fla.ops.{name}")
            setattr(module, kernel, kernels[kernel])
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for name in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        forget()

    def forget() -> None:
        fla._kernels.cache_clear()
        fla._failure.cache_clear()

    yield install
    forget()


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_values_and_gradients(install, monkeypatch, decay, dtype, with_starts, with_lengths):
    install()
    monkeypatch.setattr(matrix_scan_module, "fla_problem", lambda *_: None)
    case = random_case(
        4,
        (3, 20, 2, 3, 4),
        decay=decay,
        dtype=dtype,
        with_starts=with_starts,
        with_lengths=with_lengths,
    )

    def scan(case):
        inputs = case.q, case.k, case.v, case.log_decay, case.state
        return matrix_scan(*inputs, boundaries=case.boundaries, backend="fla")

    weights = weights_of(case)
    actual, expected = results(scan, case, weights), results(plain_scan, case.map(Tensor.double), weights)
    rounding = 2**-7 if dtype == torch.bfloat16 else 0.0
    for name, value in actual.items():
        assert_close(value, expected[name], atol=1e-5, rtol=rounding, name=name)


def test_q_and_k_are_converted_to_the_dtype_of_v(install, monkeypatch):
    install()
    monkeypatch.setattr(matrix_scan_module, "fla_problem", lambda *_: None)
    case = random_case(4, (2, 9, 2, 3, 4), dtype=torch.float32)
    case = replace(case, v=case.v.bfloat16())
    y, last = matrix_scan(*case.tensors.values(), backend="fla")
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)


PER_CHANNEL, PER_HEAD = (20, 33, 20), (20, 33, 1)


@pytest.mark.parametrize(
    ("kernel", "sizes", "problem"),
    [
        (
            wrong_decay,
            PER_CHANNEL,
            "^ArithmeticError: with decays of all sizes, 20 in each head of K = 20 and V = 33, y differs "
            "from the torch backend's by ",
        ),
        (wrong_gradient, PER_CHANNEL, "and V = 33, the gradient of q differs"),
        (rounded_decay, PER_CHANNEL, "with decays near 1, "),
        (overflowing, PER_CHANNEL, "with decays near 0, .* by nan of"),
        (chunk_gla, PER_CHANNEL, None),
        (chunk_gla, (16, 16, 16), None),
        (failing, PER_HEAD, "^RuntimeError: out of resource: shared memory$"),
        (chunk_simple_gla, PER_HEAD, None),
        (chunk_simple_gla, (3, 1, 1), None),
    ],
)
def test_kernels_that_disagree_are_not_used(install, kernel, sizes, problem):
    install(**{"chunk_simple_gla" if sizes[2] == 1 else "chunk_gla": kernel})
    reason = fla._failure(CPU, torch.float32, sizes)
    if problem is None:
        assert reason is None
    else:
        assert re.search(problem, str(reason))
        assert "\n" not in str(reason)


def test_the_tolerance_is_that_of_the_dtype(install):
    """A difference of 1 % is rounding in bf16, and an error in fp32 (TF32)."""
    install(chunk_gla=lambda *inputs, **options: tuple(1.01 * x for x in chunk_gla(*inputs, **options)))
    assert fla._failure(CPU, torch.bfloat16, PER_CHANNEL) is None
    assert fla._failure(CPU, torch.float32, PER_CHANNEL) is not None


def test_kernels_are_compared_once(install, monkeypatch):
    compared: list[Any] = []
    monkeypatch.setattr(fla, "_compare", lambda *arguments: compared.append(arguments))
    install()
    for _ in range(2):
        for sizes in (PER_CHANNEL, PER_HEAD):
            assert fla._failure(CPU, torch.float32, sizes) is None
    assert compared == [(CPU, torch.float32, PER_CHANNEL), (CPU, torch.float32, PER_HEAD)]


@pytest.fixture
def gpu(monkeypatch):
    """The choice of a backend on a GPU, whose kernels are compared on the CPU; returns the warnings."""
    warnings: list[str] = []
    compare = fla._compare
    monkeypatch.setattr(fla, "_compare", lambda device, dtype, sizes: compare(CPU, dtype, sizes))
    monkeypatch.setattr(matrix_scan_module.logger, "warning_once", warnings.append)
    return SimpleNamespace(device=torch.device("cuda:0"), warnings=warnings)


def test_default_backend(install, gpu, monkeypatch):
    install()
    for precision, expected in (("highest", "torch"), ("high", "fla")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert default_matrix_backend(gpu.device, torch.bfloat16, PER_CHANNEL) == "fla"
        assert default_matrix_backend(gpu.device, torch.float32, PER_CHANNEL) == expected
        assert default_matrix_backend(gpu.device, torch.float64, PER_CHANNEL) == "torch"
        assert default_matrix_backend(CPU, torch.bfloat16, PER_CHANNEL) == "torch"
    assert not gpu.warnings


def test_a_disagreement_is_one_line_and_the_torch_backend(install, gpu):
    install(chunk_gla=wrong_decay)
    assert default_matrix_backend(gpu.device, torch.bfloat16, PER_CHANNEL) == "torch"
    assert default_matrix_backend(gpu.device, torch.bfloat16, PER_HEAD) == "fla"
    (warning,) = gpu.warnings
    assert warning.startswith(
        "warning: the kernels of flash-linear-attention cannot run on cuda:0: "
        "ArithmeticError: with decays of all sizes, 20 in each head of K = 20 and V = 33, y differs"
    )
    assert warning.endswith(
        "the torch backend takes their place, with the same results and more memory traffic"
    )
    assert "\n" not in warning


def test_a_named_backend_that_cannot_run_is_refused(install):
    install()
    case = random_case(4, (2, 9, 2, 3, 4), dtype=torch.bfloat16)
    message = (
        "The kernels of flash-linear-attention cannot run here: "
        "they run on a GPU, and the tensors are on cpu; use another backend"
    )
    with pytest.raises(ValueError, match=message):
        matrix_scan(*case.tensors.values(), backend="fla")


def test_a_missing_package_is_named(install, monkeypatch):
    install()
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    fla._kernels.cache_clear()
    reason = fla.fla_problem(torch.device("cuda:0"), torch.bfloat16, PER_CHANNEL)
    assert reason == "the package flash-linear-attention is missing, or older than 0.6"


@pytest.mark.parametrize(("folder", "stand_in"), [("gla", chunk_gla), ("simple_gla", chunk_simple_gla)])
def test_the_stand_in_has_the_signature_of_the_package(folder, stand_in):
    """Read from the source, because importing the package takes seconds and wants a GPU."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("flash-linear-attention is not installed")
    source = Path(spec.submodule_search_locations[0], "ops", folder, "chunk.py").read_text()
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == stand_in.__name__
    )
    names = [argument.arg for argument in function.args.args]
    expected = [name for name in inspect.signature(stand_in).parameters if name != "kwargs"]
    assert names[: len(expected)] == expected
