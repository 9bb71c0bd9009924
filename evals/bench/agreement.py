"""Checks that a backend computes the recurrence: forward pass and all gradients against fp64 in plain torch,
on the device.

    error of a tensor = max |x - exact| / max |exact|

exact: the result for the same (rounded) operands in fp64, with the torch backend.

The scan and the fused cell are checked over odd shapes, dtypes, initial states and gradients from h_last; the
cell also with document starts and padding; twice, for equal bits; and once beyond 2^31 elements, where 32-bit
offsets would overflow.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...models.boundaries import Boundaries
from ...models.cell_scan import cell_scan
from ...models.cell_spec import FUSED_CELLS, CellSpec
from ...models.minimal_coefficients import CANDIDATE_ACTIVATIONS, MINIMAL_CELLS
from ...models.scan import default_backend, linear_scan
from ..memory import release_memory
from .measure import failure_reason

# Relative to the largest element: some units in the last place.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SHAPES = (
    (1, 1, 1),
    (2, 7, 5),
    (3, 100, 33),
    (2, 1000, 130),
    (1, 5000, 64),
    (4, 257, 512),
    (1, 40_000, 96),
    (70, 130, 257),
)
TINY_SHAPES = ((1, 1, 1), (2, 9, 5))
Shape = tuple[int, int, int]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The error that the module defines; 1e30 if there are NaNs or infinities (JSON has no infinity)."""
    distance = (actual.double() - exact.double()).abs().amax() / exact.double().abs().amax().clamp_min(1e-30)
    return distance.item() if torch.isfinite(distance) else 1e30


def _random(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def _results(
    function: Callable[..., tuple[Tensor, Tensor]], leaves: Sequence[Tensor], mask: Tensor | None, seed: int
) -> list[Tensor]:
    """Outputs, and the gradients of all leaves for random gradients of both outputs; `mask` removes undefined
    outputs.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y, h_last = function(*leaves)
    if mask is not None:
        y = y * mask.unsqueeze(-1)
    grads = [
        _random(*x.shape, seed=seed + i, dtype=torch.float32, device=x.device).bfloat16().to(x.dtype)
        for i, x in enumerate((y, h_last))
    ]
    return [y.detach(), h_last.detach(), *torch.autograd.grad((y, h_last), leaves, grads)]


def _row(
    kind: str,
    names: Sequence[str],
    actual: list[Tensor],
    exact: list[Tensor],
    repeated: list[Tensor],
    tolerance: float,
) -> dict[str, Any]:
    errors = {name: relative_error(x, y) for name, x, y in zip(names, actual, exact, strict=True)}
    same = all(torch.equal(x, y) for x, y in zip(actual, repeated, strict=True))
    passed = same and max(errors.values()) <= tolerance
    return {"kind": kind, "errors": errors, "tolerance": tolerance, "same_bits_twice": same, "passed": passed}


def check_scan(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str) -> dict[str, Any]:
    """Check `linear_scan` at one shape, with an initial state."""
    batch, _, width = shape
    a = torch.sigmoid(_random(*shape, seed=1, dtype=torch.float32, device=device) + 2).to(dtype)
    b = _random(*shape, seed=2, dtype=dtype, device=device)
    h0 = _random(batch, width, seed=3, dtype=torch.float32, device=device)

    def run(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda a, b, h0: linear_scan(a, b, h0, backend=backend)

    actual, repeated = (_results(run(backend), (a, b, h0), None, 4) for _ in range(2))
    exact = _results(run("torch"), (a.double(), b.double(), h0.double()), None, 4)
    names = ("h", "h_last", "da", "db", "dh0")
    return {
        **_row("scan", names, actual, exact, repeated, TOLERANCES[dtype]),
        "shape": list(shape),
        "dtype": str(dtype),
    }


def check_cell(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    cell: str,
    activation: str,
    gate: bool,
) -> dict[str, Any]:
    """Check `cell_scan` at one shape, with document starts and padding."""
    (batch, time, width), num_gates = shape, MINIMAL_CELLS[cell].num_gates
    projected = _random(batch, time, (num_gates + 1 + gate) * width, seed=1, dtype=dtype, device=device)
    bias = _random(num_gates, width, seed=2, dtype=torch.float32, device=device)
    h0 = _random(batch, width, seed=3, dtype=torch.float32, device=device)
    positions = torch.arange(time, device=device)
    starts = (positions % 37 == 11).expand(batch, time).contiguous()
    lengths = time - torch.arange(batch, device=device) % max(time // 2, 1)
    mask = positions < lengths.unsqueeze(1)
    spec, boundaries = CellSpec(cell, activation, gate), Boundaries(starts, lengths)

    def run(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return functools.partial(cell_scan, spec=spec, boundaries=boundaries, backend=backend)

    actual, repeated = (_results(run(backend), (projected, bias, h0), mask, 4) for _ in range(2))
    exact = _results(run("torch"), (projected.double(), bias.double(), h0.double()), mask, 4)
    names = ("y", "h_last", "d_projected", "d_gate_bias", "dh0")
    settings = {
        "shape": list(shape),
        "dtype": str(dtype),
        "cell": cell,
        "activation": activation,
        "output_gate": gate,
    }
    return {**_row("cell", names, actual, exact, repeated, TOLERANCES[dtype]), **settings}


def check_large(device: torch.device, backend: str) -> dict[str, Any]:
    """Check a scan of more than 2^31 elements: its last tokens against a scan of these alone."""
    shape, tail = (1, 2**21 + 3, 1024), 64
    a = torch.full(shape, 0.99, dtype=torch.bfloat16, device=device)
    b = torch.ones(shape, dtype=torch.bfloat16, device=device)
    b[:, -tail:] = _random(1, tail, shape[2], seed=1, dtype=torch.bfloat16, device=device)
    _, before = linear_scan(a[:, :-tail], b[:, :-tail], backend=backend)
    h, h_last = linear_scan(a, b, backend=backend)
    exact, exact_last = linear_scan(
        a[:, -tail:].double(), b[:, -tail:].double(), before.double(), backend="torch"
    )
    errors = {"h": relative_error(h[:, -tail:], exact), "h_last": relative_error(h_last, exact_last)}
    return {
        "kind": "scan past 2^31 elements",
        "shape": list(shape),
        "errors": errors,
        "passed": max(errors.values()) <= 2e-2,
    }


def make_checks(device: torch.device, backend: str, tiny: bool) -> list[Callable[[], dict[str, Any]]]:
    """All checks.

    Each form of the cell compiles a kernel, so only some forms are checked at all shapes; these come first.
    """
    shapes, dtypes = (TINY_SHAPES, (torch.float32,)) if tiny else (SHAPES, tuple(TOLERANCES))
    forms = [
        ("mingru", "none", True),
        ("minlstm", "none", True),
        ("mingru", "g", False),
        ("minlstm", "g", False),
    ]
    others = [
        form
        for form in itertools.product(FUSED_CELLS["triton"], CANDIDATE_ACTIVATIONS, (False, True))
        if form not in forms
    ]
    checks: list[Callable[[], dict[str, Any]]] = [
        partial(check_scan, *case, device, backend) for case in itertools.product(shapes, dtypes)
    ]
    checks += [
        partial(check_cell, *case, device, backend, *form)
        for form in forms
        for case in itertools.product(shapes, dtypes[:2])
    ]
    if not tiny:
        checks.insert(0, partial(check_large, device, backend))
        checks += [
            partial(check_cell, *case, device, backend, *form)
            for form in others
            for case in itertools.product(SHAPES[3:5], dtypes[:2])
        ]
    return checks


def run_checks(device: torch.device, tiny: bool, report: Callable[[list[dict[str, Any]]], None]) -> None:
    """Run every check with the device's default backend; `report` gets all rows so far, regularly."""
    backend = default_backend(device, torch.bfloat16)
    rows: list[dict[str, Any]] = []
    try:
        for number, check in enumerate(make_checks(device, backend, tiny)):
            try:
                rows.append({**check(), "backend": backend})
            except Exception as error:
                rows.append(
                    {
                        "kind": f"case {number}",
                        "backend": backend,
                        "reason": failure_reason(error),
                        "passed": False,
                    }
                )
            release_memory(device)
            if number % 20 == 0:
                report(rows)
    finally:
        report(rows)
