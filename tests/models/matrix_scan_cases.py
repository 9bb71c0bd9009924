"""Inputs of the matrix scan, and its definition in a loop over rows and tokens, for the tests of it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import generator
from torch import Tensor

from minrnn.models.boundaries import NO_BOUNDARIES, Boundaries

NAMES = ("q", "k", "v", "log_decay", "state")


@dataclass(frozen=True)
class Case:
    """Tensor arguments of `matrix_scan`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Any  # tensor or None, and so is the state
    state: Any
    boundaries: Boundaries = NO_BOUNDARIES

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The differentiable arguments that are given."""
        tensors = {name: getattr(self, name) for name in NAMES}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def map(self, function) -> "Case":
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors.items()})

    def slice(self, low: int, high: int) -> "Case":
        """Tokens low to high - 1, with their document starts; without lengths."""
        tokens = {name: tensor[:, low:high] for name, tensor in self.tensors.items() if name != "state"}
        starts = self.boundaries.document_starts
        return replace(self, **tokens, boundaries=Boundaries(None if starts is None else starts[:, low:high]))


def random_case(
    seed: int,
    shape: tuple[int, int, int, int, int],
    *,
    decay: str = "channel",
    kind: str = "mixed",
    dtype: torch.dtype = torch.float64,
    with_state: bool = True,
    with_starts: bool = False,
    with_lengths: bool = False,
) -> Case:
    """A case of shape (batch, time, heads, K, V).

    decay: "none", "head" or "channel". kind: "long" memories, "strong" decays (log a = -50), or "mixed", with
    a = 0 and a = 1 among them. q, k and v are of `dtype`, log_decay and state at least fp32.
    """
    random, (batch, time, heads, num_keys, num_values) = generator(seed), shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64)

    q, k = normal(batch, time, heads, num_keys), normal(batch, time, heads, num_keys)
    v, state = normal(batch, time, heads, num_values), normal(batch, heads, num_keys, num_values)
    log_decay = -torch.rand(
        batch, time, heads, num_keys if decay == "channel" else 1, generator=random, dtype=torch.float64
    )
    if kind == "long":
        log_decay *= 0.01
    elif kind == "strong":
        log_decay = torch.full_like(log_decay, -50)
    else:
        special = torch.rand(log_decay.shape, generator=random)
        log_decay[special < 0.05], log_decay[special > 0.9] = -torch.inf, 0
        log_decay[(special > 0.5) & (special < 0.55)] = -50
    starts = torch.rand(batch, time, generator=random) < 0.1 if with_starts else None
    lengths = torch.randint(0, time + 1, (batch,), generator=random) if with_lengths else None
    state_dtype = torch.promote_types(dtype, torch.float32)
    return Case(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        None if decay == "none" else log_decay.to(state_dtype),
        state.to(state_dtype) if with_state else None,
        Boundaries(starts, lengths),
    )


def plain_scan(case: Case) -> tuple[Tensor, Tensor]:
    """The definition, row by row and token by token, differentiated by autograd. y is 0 at padding."""
    q, k, v, boundaries = case.q, case.k, case.v, case.boundaries
    (batch, time, heads, num_values), outputs, states = v.shape, [], []
    for row in range(batch):
        state = v.new_zeros(heads, k.shape[-1], num_values) if case.state is None else case.state[row]
        length = time if boundaries.lengths is None else int(boundaries.lengths[row])
        y = []
        for t in range(length):
            if boundaries.document_starts is not None and boundaries.document_starts[row, t]:
                state = torch.zeros_like(state)
            if case.log_decay is not None:
                state = case.log_decay[row, t].exp().unsqueeze(-1) * state
            state = state + torch.einsum("hk,hv->hkv", k[row, t], v[row, t])
            y.append(torch.einsum("hk,hkv->hv", q[row, t], state))
        padding = v.new_zeros(time - length, heads, num_values)
        outputs.append(torch.cat([torch.stack(y), padding]) if y else padding)
        states.append(state)
    if not batch:
        return torch.zeros_like(v), v.new_zeros(0, heads, k.shape[-1], num_values)
    return torch.stack(outputs), torch.stack(states)


def weights_of(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients that reach y (0 at padding) and the last state; exact in every dtype."""
    random, (batch, time, heads, num_values) = generator(seed + 1), case.v.shape
    for_y = (torch.randint(-8, 9, (batch, time, heads, num_values), generator=random) / 4).double()
    if case.boundaries.lengths is not None:
        is_pad = torch.arange(time) >= case.boundaries.lengths.unsqueeze(1)
        for_y = for_y.masked_fill(is_pad[..., None, None], 0)
    shape = (batch, heads, case.k.shape[-1], num_values)
    return for_y, (torch.randint(-8, 9, shape, generator=random) / 4).double()


def results(scan: Any, case: Case, weights: tuple[Tensor, Tensor], use: str = "both") -> dict[str, Tensor]:
    """y (0 at padding), the last state and the gradients of their weighted sum; with `use` of only one."""
    leaves = case.map(lambda tensor: tensor.detach().requires_grad_())
    y, last = scan(leaves)
    loss = torch.zeros((), dtype=torch.float64)
    for leaf in leaves.tensors.values():  # so that each is used
        loss = loss + (0 * leaf.nan_to_num(neginf=0)).double().sum()
    if use in ("both", "y"):
        loss = loss + (y.double() * weights[0]).sum()
    if use in ("both", "last"):
        loss = loss + (last.double() * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.tensors.values()))
    if case.boundaries.lengths is not None:
        is_pad = torch.arange(y.shape[1]) >= case.boundaries.lengths.unsqueeze(1)
        y = y.masked_fill(is_pad[..., None, None], 0)
    named = {f"d{name}": grad for name, grad in zip(leaves.tensors, gradients, strict=True)}
    return {"y": y.detach(), "last": last.detach()} | named
