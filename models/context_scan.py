"""Scans of a sequence that is cut between processes.

Process c of C holds slice c of the tokens. A slice maps the state h to A_c h + s_c, where A_c is the product
of its decays and s_c its last state from zero. Every process computes its (A, s), and all processes exchange
them. Each process then folds the pairs of the earlier slices into the state h_c that enters its own slice,
and scans from there:

    h_{c+1} = A_c h_c + s_c        forward, from h_0, the state before the sequence
    g_c = A_c* g_{c+1} + d_c       backward, from g_C, the gradient of the state after the sequence

g_c is the total gradient of h_c. d_c is the part that comes through the outputs of slice c alone: a backward
pass with a zero gradient at the end of the slice gives d_c. After the exchange, a second backward pass from
g_{c+1} gives all other gradients. Forward and backward cost two scans each.

An `AffineScan` says what A h is: a product per channel, of complex pairs, or of the rows of a matrix state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .boundaries import Boundaries
from .cell_scan import checked_inputs, scan_gradients, scan_without_graph, summarize
from .cell_spec import CellInputs, CellSpec
from .context_parallel import ContextGroup, all_gather_async
from .matrix_scan import matrix_scan, matrix_scan_summary
from .max_plus import max_plus_scan
from .readout_scan import readout_scan
from .recompute import keep_nothing
from .rotating_scan import phases, rotate, rotating_scan
from .scan import default_backend, linear_scan, linear_scan_with_decay

Tensors = tuple[Tensor, ...]


class AffineScan:
    """A scan whose tokens map the state h to A h + s. Subclasses define the three methods that raise."""

    def scan(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and last state, with gradients."""
        raise NotImplementedError

    def summarize(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(A, s) of the tokens, without gradients; h0 gives shape and dtype of s."""
        raise NotImplementedError

    def apply(self, decay: Tensor, h: Tensor) -> Tensor:
        """A h."""
        return decay * h

    def apply_adjoint(self, decay: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of h from that of A h."""
        return self.apply(decay, gradient)

    def forward(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs, and what `gradients` needs of them, without a graph."""
        with torch.no_grad():
            y, _ = self.scan(h0, *tensors)
        return y, y.new_empty(0)

    def gradients(
        self, h0: Tensor, tensors: Tensors, saved: Tensor, grad_y: Tensor
    ) -> Callable[[Tensor], Tensors]:
        """Returns a function of the last state's gradient that gives those of h0 and of the tensors."""
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (h0, *tensors)]
            y, last = self.scan(*leaves)
        return lambda grad_last: torch.autograd.grad(
            (y, last), leaves, (grad_y, grad_last), retain_graph=True, materialize_grads=True
        )


@dataclass(frozen=True)
class LinearScan(AffineScan):
    """`linear_scan` of a, b."""

    backend: str

    def scan(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        a, b = tensors
        return linear_scan(a, b, h0, backend=self.backend)

    def summarize(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        a, b = tensors
        _, last, decay = linear_scan_with_decay(a, b, torch.zeros_like(h0), backend=self.backend)
        return decay, last


@dataclass(frozen=True)
class RotatingScan(AffineScan):
    """`rotating_scan` of a, theta, b."""

    backend: str

    def scan(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        a, theta, b = tensors
        return rotating_scan(a, theta, b, h0, self.backend)

    def summarize(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        a, theta, b = tensors
        _, last = rotating_scan(a, theta, b, torch.zeros_like(h0), self.backend)
        cos, sin = phases(theta.to(b.dtype), b.shape[1])
        size = a.prod(1)
        return torch.cat([size * cos[-1], size * sin[-1]], dim=-1), last

    def apply(self, decay: Tensor, h: Tensor) -> Tensor:
        return rotate(h, *decay.chunk(2, dim=-1))

    def apply_adjoint(self, decay: Tensor, gradient: Tensor) -> Tensor:
        cos, sin = decay.chunk(2, dim=-1)
        return rotate(gradient, cos, -sin)


@dataclass(frozen=True)
class ReadoutScan(AffineScan):
    """`readout_scan` of u, decay, weight; states are [batch, 2, N, width], real and imaginary parts."""

    boundaries: Boundaries

    def scan(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        u, decay, weight = tensors
        return readout_scan(u, decay, weight, h0, self.boundaries)

    def summarize(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        u, decay, weight = tensors
        zeros = torch.zeros_like(h0)
        ones = torch.stack([torch.ones_like(h0[:, 0]), zeros[:, 1]], dim=1)
        _, product = self.scan(ones, torch.zeros_like(u), decay, weight)
        return product, self.scan(zeros, *tensors)[1]

    def apply(self, decay: Tensor, h: Tensor) -> Tensor:
        return torch.view_as_real(_complex(decay) * _complex(h)).movedim(-1, 1)

    def apply_adjoint(self, decay: Tensor, gradient: Tensor) -> Tensor:
        return torch.view_as_real(_complex(decay).conj() * _complex(gradient)).movedim(-1, 1)


def _complex(pairs: Tensor) -> Tensor:
    return torch.complex(pairs[:, 0], pairs[:, 1])


@dataclass(frozen=True)
class MatrixScan(AffineScan):
    """`matrix_scan` of q, k, v, log_decay."""

    backend: str | None
    document_starts: Tensor | None

    def scan(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = tensors
        boundaries = Boundaries(self.document_starts)
        return matrix_scan(q, k, v, log_decay, h0, boundaries=boundaries, backend=self.backend)

    def summarize(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        _, k, v, log_decay = tensors
        decay, last = matrix_scan_summary(k, v, log_decay, boundaries=Boundaries(self.document_starts))
        return decay.unsqueeze(-1), last


@dataclass(frozen=True)
class FusedScan(AffineScan):
    """`cell_scan` of projected, gate_bias."""

    spec: CellSpec
    backend: str
    document_starts: Tensor | None
    is_empty: Tensor | None

    def _inputs(self, h0: Tensor, tensors: Tensors) -> CellInputs:
        projected, gate_bias = tensors
        return CellInputs(projected, gate_bias, h0, Boundaries(self.document_starts), self.is_empty)

    def summarize(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return summarize(self._inputs(h0, tensors), self.spec, self.backend)

    def forward(self, h0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return scan_without_graph(self._inputs(h0, tensors), self.spec, self.backend)

    def gradients(
        self, h0: Tensor, tensors: Tensors, saved: Tensor, grad_y: Tensor
    ) -> Callable[[Tensor], Tensors]:
        def from_last(grad_last: Tensor) -> Tensors:
            inputs = self._inputs(h0, tensors)
            d_projected, d_gate_bias, dh0 = scan_gradients(
                inputs, self.spec, self.backend, h=saved, grad_y=grad_y, grad_last=grad_last
            )
            return dh0, d_projected, d_gate_bias.to(tensors[1].dtype)

        return from_last


def fold(
    decays: Tensor, terms: Tensor, initial: Tensor, apply: Callable[[Tensor, Tensor], Tensor] = torch.mul
) -> list[Tensor]:
    """The recurrence over slices, x_0 = initial, x_{c+1} = A_c x_c + terms_c.

    decays, terms [size, *state] -> size + 1 tensors [*state].
    """
    states = [initial]
    for decay, term in zip(decays, terms, strict=True):
        states.append(term + apply(decay, states[-1]))
    return states


class _ContextScan(torch.autograd.Function):
    """An affine scan of this process's slice, from the state before the sequence to the state after it."""

    @staticmethod
    def forward(ctx, scan: AffineScan, group: ContextGroup, h0: Tensor, *tensors: Tensor):
        with keep_nothing():
            decay, last = scan.summarize(h0, *tensors)
        message = torch.cat([decay.flatten(), last.flatten()])
        decays, lasts = all_gather_async(message, group)().split([decay.numel(), last.numel()], dim=1)
        decays, lasts = decays.unflatten(1, decay.shape), lasts.unflatten(1, last.shape)
        states = fold(decays, lasts, h0, scan.apply)
        entering = states[group.rank].clone()
        y, saved = scan.forward(entering, *tensors)
        ctx.save_for_backward(decays, entering, saved, *tensors)
        ctx.scan, ctx.group = scan, group
        return y, states[-1].clone(), entering

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_y, grad_last, grad_entering = grads
        decays, entering, saved, *tensors = ctx.saved_tensors
        gradients = ctx.scan.gradients(entering, tuple(tensors), saved, grad_y)
        through_outputs = gradients(torch.zeros_like(grad_last))[0] + grad_entering
        gathered = all_gather_async(through_outputs, ctx.group)()
        totals = fold(decays.flip(0), gathered.flip(0), grad_last, ctx.scan.apply_adjoint)
        _, *d_tensors = gradients(totals[ctx.group.size - 1 - ctx.group.rank])
        return None, None, totals[-1], *d_tensors


_slice_scan: Any = torch.compiler.disable(_ContextScan.apply)  # no communication inside compiled code


def context_scan(
    scan: AffineScan, group: ContextGroup, h0: Tensor, *tensors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """An affine scan of a sequence that is cut between processes.

    Args:
        scan: what is computed.
        group: the processes that share the sequence.
        h0: state before the whole sequence, fp32 (fp64), the same on every process.
        tensors: of this process's slice, and parameters.

    Returns:
        y of this slice; the state after the whole sequence, the same on every process; and the state before
        this slice.
    """
    return _slice_scan(scan, group, h0, *tensors)


def context_cell_scan(
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    *,
    spec: CellSpec,
    boundaries: Boundaries,
    group: ContextGroup,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`cell_scan` of a sequence that is cut between processes.

    Args:
        projected: [batch, time, spec.num_projections * width], this process's slice.
        h0: state before the whole sequence, [batch, width], the same on every process; zeros if None.
        boundaries: document starts of this slice; without lengths.
        gate_bias, spec, backend: as in `cell_scan`.

    Returns:
        y [batch, time, width] of this slice, and the state after the whole sequence, [batch, width], the same
        on every process.
    """
    backend = backend or default_backend(projected.device, projected.dtype)
    inputs = checked_inputs(projected, gate_bias, h0, spec, boundaries, backend=backend)
    h0 = inputs.h0.to(torch.promote_types(projected.dtype, torch.float32))
    is_empty = inputs.is_empty if group.rank == 0 else None
    scan = FusedScan(spec, backend, boundaries.document_starts, is_empty)
    y, last, _ = context_scan(scan, group, h0, projected, gate_bias)
    return y, last


@torch.no_grad()
def _max_plus(w: Tensor, key: Tensor, m0: Tensor, group: ContextGroup) -> tuple[Tensor, Tensor, Tensor]:
    with keep_nothing():
        _, own = max_plus_scan(w, key, torch.full_like(m0, -torch.inf))
    falls, tops = all_gather_async(torch.stack([w.sum(1), own]), group)().unbind(1)
    states = [m0]
    for fall, top in zip(falls, tops, strict=True):
        states.append(torch.maximum(top, states[-1] - fall))
    m, _ = max_plus_scan(w, key, states[group.rank])
    return m, states[-1], states[group.rank]


_slice_max_plus: Any = torch.compiler.disable(_max_plus)


def context_max_plus(
    w: Tensor, key: Tensor, m0: Tensor, group: ContextGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """`max_plus_scan` of a sequence that is cut between processes; returns as `context_scan`."""
    return _slice_max_plus(w, key, m0, group)
