"""Muon for matrices, AdamW for all other parameters, as one optimizer.

    m <- momentum m + (1 - momentum) g,     u = (1 - momentum) g + momentum m
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(A, B)) orthogonal(u)              u [A, B]

orthogonal(u) is U V^T of the singular value decomposition u = U S V^T, up to singular values between about
0.7 and 1.2: five steps of a polynomial in u u^T. Formulas and numbers are those of torch.optim.Muon
(2.13) with adjust_lr_fn="match_rms_adamw"; the factor gives an update the root mean square of AdamW's, about
0.2 lr. Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al.,
"Muon is Scalable for LLM Training", arXiv 2502.16982.

torch's class is not used, for four reasons. A matrix of this model may hold several projections, and each is
orthogonalised by itself. Projections of one shape are multiplied together, so a step has as many products as
shapes instead of one for each projection. The products run in the precision of the run: torch always takes
bf16, for which many CPUs have no units. And under ZeRO a parameter is a flat shard (zero_shards.py).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw import AdamW, cautious_decay, is_cautious
from .matrices import Widths
from .zero_shards import Shard

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
SMALLEST = 1e-7  # norm that a matrix is divided by
RMS = 0.2  # of AdamW's updates, in units of the learning rate
BATCH_ELEMENTS = 2**26  # of matrices that are multiplied together, which bounds the memory


class Muon(AdamW):
    """Muon for the groups with `is_muon`, AdamW for the others.

    The state of a matrix is `momentum_buffer`, in its shape.

    Args:
        groups: of parameters, as for torch's optimizers, each with the key `is_muon`.
        widths: projections of each matrix.
        momentum: of Muon.
        dtype: of the products.
        adamw: options of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        widths: Mapping[Tensor, Widths],
        momentum: float,
        dtype: torch.dtype,
        **adamw: Any,
    ):
        super().__init__(groups, **adamw)
        self.momentum, self.dtype = momentum, dtype
        self.widths = dict(widths)
        self.shards: dict[Tensor, Shard] = {}
        """Under ZeRO 1 to 3: what each flat shard consists of. The engine sets it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's completes the state of old versions of torch, and expects `step` of every parameter.
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step from the gradients. Collective if there are `shards`."""
        assert closure is None
        groups = self.param_groups
        self._step_matrices([group for group in groups if group["is_muon"]])
        self.param_groups = [group for group in groups if not group["is_muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, groups: list[dict[str, Any]]) -> None:
        pairs = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
        parameters = [parameter for parameter, _ in pairs]
        if self.shards:
            # One after the other, since each gathers its matrices.
            updates = (self._sharded_update(shard) for shard in parameters)
        else:
            directions = [self._direction(matrix) for matrix in parameters]
            updates = orthogonal_updates(directions, [self.widths[matrix] for matrix in parameters])
        for (parameter, group), update in zip(pairs, updates, strict=True):
            if is_cautious(group):
                parameter.sub_(cautious_decay(parameter, update.to(parameter.dtype), group))
            else:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])

    def _direction(self, parameter: Tensor) -> Tensor:
        """Advance the momentum; returns what is orthogonalised, in the dtype of the products."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum).to(self.dtype)

    def _sharded_update(self, parameter: Tensor) -> Tensor:
        """The update of a flat shard, [elements of the shard]."""
        shard = self.shards[parameter]
        matrices = shard.gather(self._direction(parameter))
        updates = orthogonal_updates(list(matrices.values()), [shard.widths[name] for name in matrices])
        return shard.flatten(dict(zip(matrices, updates, strict=True)), like=parameter)


def orthogonal_updates(matrices: Sequence[Tensor], widths: Sequence[Widths]) -> list[Tensor]:
    """The orthogonalised projections of each matrix [A, B], scaled as AdamW's updates."""
    parts = [part for matrix, rows in zip(matrices, widths, strict=True) for part in matrix.split(rows)]
    updates = iter(_orthogonalized(parts))
    return [torch.cat([next(updates) for _ in rows]) for rows in widths]


def _orthogonalized(parts: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix [A, B] made orthogonal and scaled. Those of one shape, or its transpose, are one batch."""
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, part in enumerate(parts):
        by_shape[min(part.shape), max(part.shape)].append(index)
    updates = list(parts)
    for (height, width), indices in by_shape.items():
        scale = RMS * math.sqrt(width)
        size = max(1, BATCH_ELEMENTS // (height * width))
        for batch in (indices[start : start + size] for start in range(0, len(indices), size)):
            stacked = torch.stack([_wide(parts[index]) for index in batch])
            for index, update in zip(batch, orthogonalize(stacked).mul_(scale), strict=True):
                updates[index] = update if len(parts[index]) == height else update.mT
    return updates


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def orthogonalize(matrices: Tensor) -> Tensor:
    """[N, A, B] with A <= B -> matrices of the same shape whose singular values are near 1; zeros stay zeros.

    Five Newton-Schulz steps, each of which maps a singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5.
    """
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = matrices / norm.clamp(min=SMALLEST)
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def flops_per_step(shapes: Iterable[tuple[int, int]]) -> int:
    """FLOPs of orthogonalising matrices of these shapes: three products in each of the five steps."""
    sides = [(min(shape), max(shape)) for shape in shapes]
    return sum(STEPS * 2 * (2 * small * small * large + small**3) for small, large in sides)
