"""The published equations of the cells with a state matrix, token by token; see naive_cells.py."""

from typing import Any

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]


def heads(cell: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (cell.num_heads, -1))


def matrices(cell: Any, state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """The state [batch, heads, K, V] of q, k, v in heads."""
    if state is None:
        return k.new_zeros(len(k), cell.num_heads, k.shape[-1], v.shape[-1])
    return state.unflatten(1, (cell.num_heads, k.shape[-1], v.shape[-1]))


def read_out(q: Tensor, k: Tensor, v: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t, in einsum."""
    outputs = []
    for t in range(q.shape[1]):
        state = a[:, t].unsqueeze(-1) * state + torch.einsum("bnk,bnv->bnkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bnkv,bnk->bnv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def normed(cell: Any, y: Tensor) -> Tensor:
    scale = (y.square().mean(-1, keepdim=True) + cell.head_norm.eps).rsqrt()
    return (y * scale * cell.head_norm.weight).flatten(-2)


def linear_attention(cell: Any, parts: Parts, state: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = (heads(cell, part) for part in parts)
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    one = torch.ones_like(v[..., :1])
    s = matrices(cell, state, k, torch.cat([v, one], -1))
    sums, last = read_out(q, k, v, torch.ones_like(k), s[..., :-1])
    weights, last_k = read_out(q, k, one, torch.ones_like(k), s[..., -1:])
    return (sums / (weights + cell.smallest)).flatten(-2), torch.cat([last, last_k], -1).flatten(1)


def hgrn2(cell: Any, parts: Parts, state: Tensor | None, bound: Tensor) -> tuple[Tensor, Tensor]:
    q, f, v = parts
    a = heads(cell, bound + (1 - bound) * torch.sigmoid(f + cell.gate_bias[0]))
    q, v = heads(cell, q * torch.sigmoid(q)), heads(cell, v)
    y, last = read_out(q, 1 - a, v, a, matrices(cell, state, a, v))
    return normed(cell, y), last.flatten(1)


def gla(cell: Any, parts: Parts, state: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = (heads(cell, part) for part in parts[:3])
    a = torch.sigmoid(parts[3] @ cell.decay_proj.weight.T + cell.gate_bias[0]) ** (1 / 16)
    y, last = read_out(q, k, v, heads(cell, a), matrices(cell, state, k, v))
    return normed(cell, y / q.shape[-1] ** 0.5), last.flatten(1)


def mlstm(cell: Any, parts: Parts, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without a stabilizer; returns the state itself, not divided by exp(m)."""
    q, k, v = (heads(cell, part) for part in parts[:3])
    i, f = (part + bias for part, bias in zip(parts[3:], cell.gate_bias, strict=True))
    k = i.exp().unsqueeze(-1) * k / k.shape[-1] ** 0.5
    a, one = torch.sigmoid(f).unsqueeze(-1), torch.ones_like(v[..., :1])
    s = matrices(cell, None if state is None else unscaled_mlstm(cell, state), k, torch.cat([v, one], -1))
    y, last = read_out(q, k, v, a, s[..., :-1])
    z, last_z = read_out(q, k, one, a, s[..., -1:])
    return normed(cell, y / z.abs().clamp(min=1)), torch.cat([last, last_z], -1).flatten(1)


def unscaled_mlstm(cell: Any, state: Tensor) -> Tensor:
    """The state of the equations from that of the cell, S | m."""
    s, m = state.split([cell.matrix_size, cell.num_heads], -1)
    return (heads(cell, s) * m.exp().unsqueeze(-1)).flatten(1)
