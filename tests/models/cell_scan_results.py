"""Runs the cell scan with its gradients, fused and as the composition in fp64, and compares the results."""

from collections.abc import Callable

import torch
from cell_scan_cases import real_tokens
from helpers import assert_close, generator
from torch import Tensor

from minrnn.models.boundaries import NO_BOUNDARIES, Boundaries
from minrnn.models.cell_scan import cell_scan
from minrnn.models.cell_spec import CellSpec

Results = dict[str, Tensor]

# Tolerances. A token in fp32 costs a few roundings of 2^-24, which add up over the length of the memory. In
# bf16 results are rounded once, to nearest, by half a unit in the last place, 2^-8. Gradients of gates also
# depend on the saved h, which is rounded in the same way. Nothing else is, the carried state included.
FP32 = 2e-6
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


def outputs_and_gradients(
    scan: Callable[..., tuple[Tensor, Tensor]],
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    use="both",
    real: Tensor | bool = True,
) -> Results:
    """y, h_last and the gradients of their weighted sum; the weights of y are bf16 numbers, 0 at padding."""
    leaves = {"d_projected": projected, "d_gate_bias": gate_bias} | ({} if h0 is None else {"dh0": h0})
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    y, h_last = scan(leaves["d_projected"], leaves["d_gate_bias"], leaves.get("dh0"))
    random = generator(2)
    weights = (
        torch.randint(-8, 9, y.shape, generator=random).double() / 4 * real,
        torch.randn(h_last.shape, generator=random, dtype=torch.float64),
    )
    loss = sum(
        (0 * leaf.double()).sum() for leaf in leaves.values()
    )  # so that every leaf is used, also by the loop over no time
    loss = (
        loss
        + (y.double() * weights[0]).sum() * (use != "h_last")
        + (h_last.double() * weights[1]).sum() * (use != "y")
    )
    assert isinstance(loss, Tensor)
    return {"y": y.detach(), "h_last": h_last.detach()} | dict(
        zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
    )


def run(
    spec: CellSpec,
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    boundaries: Boundaries = NO_BOUNDARIES,
    *,
    use="both",
    backend=None,
) -> Results:
    """`outputs_and_gradients` of cell_scan, on the CPU's default backend (numba), y masked at padding."""
    real = real_tokens(projected.shape[0], projected.shape[1], boundaries.lengths)

    def scan(projected, gate_bias, h0):
        return cell_scan(projected, gate_bias, h0, spec=spec, boundaries=boundaries, backend=backend)

    results = outputs_and_gradients(scan, projected, gate_bias, h0, use=use, real=real)
    return results | {"y": results["y"].where(real, 0)}


def exact(
    spec: CellSpec,
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    boundaries: Boundaries = NO_BOUNDARIES,
    *,
    use="both",
) -> Results:
    """The same of the composition over the plain loop, in fp64."""
    h0 = None if h0 is None else h0.double()
    projected, gate_bias = projected.double(), gate_bias.double()
    results = run(spec, projected, gate_bias, h0, boundaries, use=use, backend="reference")
    return results | {"d_gate_bias_terms": bias_terms(spec, projected, gate_bias, results["d_projected"])}


def bias_terms(spec: CellSpec, projected: Tensor, gate_bias: Tensor, d_projected: Tensor) -> Tensor:
    """The largest sum of the sizes of what is summed in d_gate_bias: [num_rows, 1].

    The gradient for a constant of one token is that for the first gate's sigmoid, but for a factor.
    """
    width, num_gates = gate_bias.shape[1], spec.num_gates
    gates = d_projected[..., : num_gates * width].unflatten(-1, (num_gates, width)).unbind(2)
    p, constant = projected[..., :width] + gate_bias[0], gate_bias[-1]
    factor = (1 - constant) * p.sigmoid() if spec.cell == "hgrn" else constant * (-p).sigmoid()
    terms = [*gates, *[gates[0] / factor] * spec.equation.num_constants]
    sums = [term.nan_to_num(0, 0, 0).abs().sum((0, 1)).amax() for term in terms]
    largest = torch.stack(sums[:num_gates]).amax()
    return torch.stack([*[largest] * num_gates, *sums[num_gates:]]).unsqueeze(1)


def assert_results(
    actual: Results, expected: Results, spec: CellSpec, dtype: torch.dtype, width: int
) -> None:
    half = HALF_UNIT[dtype]
    saved_h = half if dtype == torch.bfloat16 else 0.0
    assert_close(actual["y"], expected["y"], atol=FP32, rtol=half, name="y")
    assert_close(actual["h_last"], expected["h_last"], atol=FP32, name="h_last")
    for name, value in actual.items():
        assert value.dtype == (dtype if name in ("y", "d_projected") else torch.float32), name
    if "dh0" in actual:
        assert_close(actual["dh0"], expected["dh0"], atol=FP32, name="dh0")
    num_gates = spec.num_gates
    error = (actual["d_gate_bias"].double() - expected["d_gate_bias"]).abs()
    assert (error <= (FP32 + saved_h) * expected["d_gate_bias_terms"]).all(), "d_gate_bias"
    names = ["gate"] * num_gates + ["candidate"] + ["output gate"] * spec.output_gate
    for name, value, other in zip(
        names, actual["d_projected"].split(width, -1), expected["d_projected"].split(width, -1), strict=True
    ):
        rtol = 2 * half if name == "output gate" else half  # a product with h
        assert_close(value, other, atol=FP32 + (saved_h if name == "gate" else 0.0), rtol=rtol, name=name)


def assert_same_bits(actual: Results, expected: Results, but: tuple[str, ...] = ()) -> None:
    for name in expected.keys() - set(but):
        assert torch.equal(actual[name], expected[name]), name
