"""Coefficients (a, b) of h_t = a_t * h_{t-1} + b_t for minGRU, minLSTM and their signed forms.

A cell turns a few projections of the input x into decay a and input b. No gate depends on h_{t-1}, so the
recurrence is linear and the whole sequence is one scan.

    minGRU    a = 1 - z,      b = z * c(u)            z = sigmoid(k)
    minLSTM   a = f / (f+i),  b = i / (f+i) * c(u)    f = sigmoid(p), i = sigmoid(q)

with pre-activations k, p, q, u = W x and c the candidate activation. Source: Feng et al., arXiv 2410.01201,
sections 3.1 and 3.2; minGRU with c = tanh is GILR of Martin & Cundy (ICLR 2018).

`NAME_normalized` has sqrt(1 - a^2) in place of 1 - a before the candidate, as the RG-LRU has (De et al.,
arXiv 2402.19427): the state of independent candidates then has their variance for every memory length. With
1 - a, a channel with a memory of 256 tokens puts out about 0.04 of what it takes in.

Each cell has a variant with decays in (-1, 1), `NAME_signed`: 2 a - 1 in place of a, the same b. A state that
can change its sign at every token can count modulo 2, which decays in (0, 1) cannot (Grazzi et al.,
"Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", arXiv 2411.12537).

Numerics: a is computed in fp32 whatever the dtype of the projections. bfloat16 has no number between 0.996
and 1, so it cannot represent a memory longer than 256 tokens. Each factor is a sigmoid of its own, a =
sigmoid(-k) and z = sigmoid(k): the difference 1 - z would lose the digits of the smaller one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import at_least_fp32

CANDIDATE_ACTIVATIONS = ("g", "none", "tanh", "silu")


def candidate(u: Tensor, activation: str) -> Tensor:
    """c(u), elementwise. `g` is the paper's positive candidate: u + 0.5 where u >= 0, sigmoid(u) below."""
    if activation == "none":
        return u
    if activation == "g":
        return torch.where(u >= 0, u + 0.5, torch.sigmoid(u))
    return torch.tanh(u) if activation == "tanh" else F.silu(u)


def mingru(k: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Coefficients of the minGRU: k, u [batch, time, width] -> a (at least fp32), b (dtype of u)."""
    k = at_least_fp32(k)
    return torch.sigmoid(-k), (torch.sigmoid(k) * candidate(at_least_fp32(u), activation)).to(u.dtype)


def minlstm(p: Tensor, q: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Coefficients of the minLSTM.

    p (forget), q (input), u [batch, time, width] -> a (at least fp32), b (dtype of u).

    a = f / (f + i) = sigmoid(-d) with d = log(i / f), which neither overflows nor divides.
    """
    return mingru(_log_input_over_forget(p, q), u, activation)


def _log_input_over_forget(p: Tensor, q: Tensor) -> Tensor:
    """log(i / f) = softplus(-p) - softplus(-q) of a minLSTM, in at least fp32."""
    return F.softplus(-at_least_fp32(p)) - F.softplus(-at_least_fp32(q))


def mingru_normalized(k: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`mingru` with b = sqrt(1 - a^2) c(u).

    1 - a^2 = z (1 + a) with z = 1 - a = sigmoid(k). The root is an exponential of logarithms, whose gradient
    is finite where z underflows.
    """
    k = at_least_fp32(k)
    a = torch.sigmoid(-k)
    scale = torch.exp((F.logsigmoid(k) + torch.log1p(a)) / 2)
    return a, (scale * candidate(at_least_fp32(u), activation)).to(u.dtype)


def minlstm_normalized(p: Tensor, q: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`minlstm` with b = sqrt(1 - a^2) c(u)."""
    return mingru_normalized(_log_input_over_forget(p, q), u, activation)


@dataclass(frozen=True)
class MinimalCell:
    """An entry of `MINIMAL_CELLS` or of `gated_coefficients.GATED_CELLS`."""

    num_gates: int
    """Number of gate projections; the candidate's projection follows them."""
    coefficients: Callable[..., tuple[Tensor, Tensor]]
    """(gate, ..., constant, ..., candidate pre-activation, activation name) -> (a, b); with `reads_starts`,
    `CellInputs.starts()` is the last argument."""
    gate_bias: Callable[[Tensor], Tensor]
    """Memory lengths [width] -> gate biases, and constants below them, [num_gates + num_constants, width]: at
    zero input, 1 / (1 - a) is the length."""
    num_constants: int = 0
    """Numbers of each channel beside the gates' biases."""
    reads_starts: bool = False
    """b depends on whether a state precedes the token."""
    output_gate: str = "silu"
    """Activation of the output gate."""


def _mingru_bias(memory: Tensor) -> Tensor:
    return -torch.log(memory - 1).unsqueeze(0)


def _minlstm_bias(memory: Tensor) -> Tensor:
    log_ratio = torch.log(memory - 1)  # sigmoid(x) / sigmoid(-x) = exp(x)
    return torch.stack([log_ratio, -log_ratio])


def _signed(cell: MinimalCell) -> MinimalCell:
    """The cell with decays 2 a - 1. Where 1 / (1 - a) is 2 m, 1 / (1 - (2 a - 1)) is m."""

    def coefficients(*pre_activations: Any) -> tuple[Tensor, Tensor]:
        a, b = cell.coefficients(*pre_activations)
        return 2 * a - 1, b

    return MinimalCell(cell.num_gates, coefficients, lambda memory: cell.gate_bias(2 * memory))


MINIMAL_CELLS = {
    "mingru": MinimalCell(num_gates=1, coefficients=mingru, gate_bias=_mingru_bias),
    "minlstm": MinimalCell(num_gates=2, coefficients=minlstm, gate_bias=_minlstm_bias),
}
MINIMAL_CELLS |= {f"{name}_signed": _signed(cell) for name, cell in MINIMAL_CELLS.items()} | {
    "mingru_normalized": MinimalCell(num_gates=1, coefficients=mingru_normalized, gate_bias=_mingru_bias),
    "minlstm_normalized": MinimalCell(num_gates=2, coefficients=minlstm_normalized, gate_bias=_minlstm_bias),
}
