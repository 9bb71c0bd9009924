"""The published equations of the cells, token by token, in complex numbers where they are complex.

Each function takes the cell (a mixer), its projections [batch, time, width], and the state before the first
token [batch, state_size] (None at the beginning of a text), and returns the outputs [batch, time, width] and
the last state. Nothing here uses the scans, a stabilizer or a rotating frame.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from naive_matrix_cells import gla, hgrn2, linear_attention, mlstm, unscaled_mlstm
from torch import Tensor

Parts = tuple[Tensor, ...]
Result = tuple[Tensor, Tensor]


def loop(step: Callable[..., Any], state: Any, *sequences: Tensor) -> tuple[list[Any], Any]:
    """Outputs of step(state, x_t, ...) -> (output, state) for each t, and the last state."""
    outputs = []
    for t in range(sequences[0].shape[1]):
        output, state = step(state, *(x[:, t] for x in sequences))
        outputs.append(output)
    return outputs, state


def leaky(a: Tensor, b: Tensor, h0: Tensor | None) -> Result:
    """h_t = a_t h_{t-1} + b_t."""
    h0 = torch.zeros_like(b[:, 0]) if h0 is None else h0
    outputs, last = loop(lambda h, at, bt: (at * h + bt,) * 2, h0, a, b)
    return torch.stack(outputs, 1), last


def gilr(cell: Any, parts: Parts, h0: Tensor | None) -> Result:
    z = torch.sigmoid(parts[0] + cell.gate_bias[0])
    return leaky(1 - z, z * torch.tanh(parts[1]), h0)


def gilr_lstm(cell: Any, parts: Parts, state: Tensor | None) -> Result:
    k, u, *own = parts
    width = k.shape[2]
    state = k.new_zeros(len(k), 2 * width) if state is None else state
    weights = cell.hidden_in_proj.weight.split(width)

    def step(carried: Parts, kt: Tensor, ut: Tensor, *others: Tensor) -> tuple[Tensor, Parts]:
        g, c = carried
        f, i, z, *o = (x + g @ w.T for x, w in zip(others, weights, strict=True))
        keep = torch.sigmoid(kt + cell.gate_bias[0])
        c = torch.sigmoid(f + cell.gate_bias[1]) * c + torch.sigmoid(i + cell.gate_bias[2]) * torch.tanh(z)
        h = torch.sigmoid(o[0]) * c if o else c
        return h, (keep * g + (1 - keep) * torch.tanh(ut), c)

    outputs, last = loop(step, state.split(width, -1), k, u, *own)
    return torch.stack(outputs, 1), torch.cat(last, -1)


def hgrn(cell: Any, parts: Parts, h0: Tensor | None, bound: Tensor) -> Result:
    a = bound + (1 - bound) * torch.sigmoid(parts[0] + cell.gate_bias[0])
    return leaky(a, (1 - a) * F.silu(parts[1]), h0)


def qrnn(cell: Any, parts: Parts, h0: Tensor | None) -> Result:
    f = torch.sigmoid(parts[0] + cell.gate_bias[0])
    return leaky(f, (1 - f) * torch.tanh(parts[1]), h0)


def rglru(cell: Any, parts: Parts, h0: Tensor | None) -> Result:
    r, i = (torch.sigmoid(x + bias) for x, bias in zip(parts[:2], cell.gate_bias, strict=True))
    a = torch.sigmoid(-cell.decay) ** (8 * r)  # exp(-softplus(x)) = sigmoid(-x)
    scale = (1 - a**2).sqrt()
    if h0 is None:
        scale = torch.cat([torch.ones_like(scale[:, :1]), scale[:, 1:]], 1)
    return leaky(a, scale * i * parts[2], h0)


def rwkv4(cell: Any, parts: Parts, state: Tensor | None) -> Result:
    k, v = parts
    w, u = cell.decay.exp(), cell.bonus
    zeros = torch.zeros_like(k[:, 0])
    sums = (zeros, zeros) if state is None else unscaled_rwkv4(cell, state).chunk(2, -1)

    def step(carried: Parts, kt: Tensor, vt: Tensor) -> tuple[Tensor, Parts]:
        numerator, denominator = carried
        now = torch.exp(u + kt)
        output = (numerator + now * vt) / (denominator + now)
        return output, (
            torch.exp(-w) * numerator + torch.exp(kt) * vt,
            torch.exp(-w) * denominator + torch.exp(kt),
        )

    outputs, last = loop(step, sums, k, v)
    return torch.stack(outputs, 1), torch.cat(last, -1)


def unscaled_rwkv4(cell: Any, state: Tensor) -> Tensor:
    """The sums of the equations from the state of the cell, numerator | denominator | m."""
    numerator, denominator, m = state.chunk(3, -1)
    return torch.cat([numerator * m.exp(), denominator * m.exp()], -1)


def from_pairs(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2, -1))


def to_pairs(x: Tensor) -> Tensor:
    return torch.cat([x.real, x.imag], -1)


def lru(cell: Any, parts: Parts, state: Tensor | None) -> Result:
    decay = torch.exp(torch.complex(-cell.nu.exp(), cell.theta.exp()))
    b = from_pairs(parts[0]) * cell.gamma.exp()
    h, last = leaky(decay.expand_as(b), b, None if state is None else from_pairs(state))
    return to_pairs(h), to_pairs(last)


def s4d(cell: Any, parts: Parts, state: Tensor | None) -> Result:
    u, n = parts[0], cell.num_states
    a = torch.complex(-cell.log_real.exp(), cell.imaginary).view(-1, n)
    dt = cell.log_dt.exp().unsqueeze(1)
    decay, c = torch.exp(dt * a), from_pairs(cell.readout).view(-1, n)
    b = u.unsqueeze(-1) * torch.ones_like(decay)
    h0 = None if state is None else from_pairs(state).unflatten(1, (-1, n))
    h, last = leaky(decay.expand_as(b), b, h0)
    y = 2 * (h * (decay - 1) / a * c).sum(-1).real + cell.skip * u
    return y, to_pairs(last.flatten(1))


NAIVE: dict[str, Callable[..., Result]] = {
    "gilr": gilr,
    "gilr_lstm": gilr_lstm,
    "hgrn": hgrn,
    "qrnn": qrnn,
    "rglru": rglru,
    "rwkv4": rwkv4,
    "lru": lru,
    "s4d": s4d,
    "linear_attention": linear_attention,
    "hgrn2": hgrn2,
    "mlstm": mlstm,
    "gla": gla,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "qrnn": torch.sigmoid,
    "rwkv4": torch.sigmoid,
    "mlstm": torch.sigmoid,
    "rglru": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
}
"""Output gates; silu where none is listed. gilr_lstm applies its own."""

UNSCALED: dict[str, Callable[[Any, Tensor], Tensor]] = {"rwkv4": unscaled_rwkv4, "mlstm": unscaled_mlstm}
"""The state of the equations from that of a cell that keeps it divided by exp(m)."""
