"""The cells that `cell_scan` computes: minGRU, minLSTM, their signed and normalized forms, and GILR.

`minimal_coefficients.py` holds their equations, `cell_scan.py` computes cell, scan and output gate as one
operation.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .boundaries import Boundaries
from .cell_scan import cell_scan, one_token
from .cell_spec import CellInputs, CellSpec
from .context_scan import context_cell_scan
from .minimal_coefficients import MINIMAL_CELLS
from .mixer import MinRNNMixer, State

if TYPE_CHECKING:
    from .configuration_minrnn import MinRNNConfig


def has_fused_gate(config: "MinRNNConfig") -> bool:
    """Whether the cell scan applies the output gate; with a norm before the gate, the mixer does."""
    return config.output_gate and not config.output_norm


class MinimalMixer(MinRNNMixer):
    """minGRU and minLSTM (Feng et al., arXiv 2410.01201), their forms with decays in (-1, 1), and those
    with the input scaled by sqrt(1 - a^2)."""

    own_fields = ("candidate_activation",)
    learns_h0 = True
    takes_two_taps = True

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        self.spec = self.cell_spec(config)
        self.gate_bias = nn.Parameter(torch.empty(self.spec.num_gates, config.recurrent_size))
        self.input_tap = None
        if config.two_tap_input:
            self.input_tap, self.kernel = nn.Parameter(torch.empty(config.recurrent_size)), 2

    @classmethod
    def cell_spec(cls, config: "MinRNNConfig") -> CellSpec:
        """What the cell scan computes."""
        return CellSpec(config.cell, config.candidate_activation, has_fused_gate(config))

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        gates = [f"gate_{i}" for i in range(cls.cell_spec(config).num_gates)]
        return dict.fromkeys([*gates, "candidate"], config.recurrent_size)

    @classmethod
    def tail_shape(cls, config: "MinRNNConfig") -> tuple[int, int] | None:
        return (1, config.recurrent_size) if config.two_tap_input else super().tail_shape(config)

    @classmethod
    def recurrence_flops(cls, config: "MinRNNConfig") -> int:
        return (4 if config.two_tap_input else 2) * config.recurrent_size

    def init_parameters(self, memory: Tensor) -> None:
        init.copy_(self.gate_bias, MINIMAL_CELLS[self.spec.cell].gate_bias(memory))
        self.init_tap()

    def init_tap(self) -> None:
        """The second tap is 0 before training."""
        if self.input_tap is not None:
            init.zeros_(self.input_tap)

    def channel_rows(self, *lower_bound: Tensor) -> Tensor:
        """The gates' biases and the cell's constants, [spec.num_rows, R]."""
        return self.gate_bias

    def forward(
        self, x: Tensor, state: State, boundaries: Boundaries, lower_bound: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, H] -> [B, T, H], and the state after it."""
        if self.input_tap is None:
            return super().forward(x, state, boundaries, lower_bound)
        boundaries = self.on_device(boundaries, x)
        bounds = () if lower_bound is None else (lower_bound.to(x.device),)
        projected, (recurrent, before) = self.in_proj(x), state
        rows, recurrent = self.channel_rows(*bounds), self.entering(recurrent, projected)
        width = self.spec.num_projections * rows.shape[1]
        y, *state_after = self.recur_composed(projected[..., :width], rows, recurrent, boundaries, before)
        if self.output_norm is not None:
            y = self.gated(y, projected[..., width:])
        return self.out_proj(y.to(projected.dtype)), (state_after[0], state_after[1])

    def recur(
        self, projected: Tensor, state: Tensor | None, boundaries: Boundaries, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, state = self.channel_rows(*lower_bound), self.entering(state, projected)
        if self.output_norm is None:
            return self.scan_cell(projected, rows, state, boundaries)
        width = self.spec.num_projections * rows.shape[1]
        y, state = self.scan_cell(projected[..., :width], rows, state, boundaries)
        return self.gated(y, projected[..., width:]), state

    def scan_cell(
        self, projected: Tensor, rows: Tensor, state: Tensor | None, boundaries: Boundaries
    ) -> tuple[Tensor, Tensor]:
        """The cell, and the output gate if `spec` has it: y [B, T, R], and the state after it."""
        if state is not None and self.must_compose(boundaries):
            return self.recur_composed(projected, rows, state, boundaries)[:2]
        if self.is_single_token(projected, boundaries):
            return one_token(projected, rows, state, self.spec)
        if self.context_group is not None:
            return context_cell_scan(
                projected,
                rows,
                state,
                spec=self.spec,
                boundaries=boundaries,
                group=self.context_group,
                backend=self.backend,
            )
        return cell_scan(projected, rows, state, spec=self.spec, boundaries=boundaries, backend=self.backend)

    def initial_state(self) -> Tensor | None:
        initial = super().initial_state()  # averages of tanh are in (-1, 1)
        return initial.tanh() if initial is not None and self.spec.activation == "tanh" else initial

    def must_compose(self, boundaries: Boundaries) -> bool:
        """Whether `cell_scan` would lack the learnt state: it starts documents inside a batch from 0, and
        knows an RG-LRU's first token by a state of 0."""
        return self.h0 is not None and (
            boundaries.document_starts is not None or self.spec.equation.reads_starts
        )

    def recur_composed(
        self,
        projected: Tensor,
        rows: Tensor,
        state: Tensor | None,
        boundaries: Boundaries,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `scan_cell`, from the parts of the cell scan's definition, with the learnt initial state and the
        second tap of the input.

        Args:
            before: the input b before the first token, [B, 1, R], for the second tap; None for none.

        Returns:
            y [B, T, R], the state after it, and the last input if there is a second tap.
        """
        initial, group = self.initial_state(), self.context_group
        starts = None
        if self.spec.equation.reads_starts:
            assert state is not None
            assert initial is not None
            # Also after a piece of padding only.
            is_empty = (state == initial).all(1) if group is None or group.rank == 0 else None
            starts = CellInputs(projected, rows, state, boundaries, is_empty).starts()
        projections = projected.split(rows.shape[1], dim=-1)
        a, b = self.spec.coefficients(projections, rows, starts)
        if self.input_tap is not None:
            taps = torch.stack([self.input_tap, torch.ones_like(self.input_tap)], dim=1)
            b, before = self.convolve_channels(b, taps, before, boundaries)
        scanned = self.scans(projected, boundaries).linear(a, b, state, initial)
        return self.spec.gated(scanned.h, projections), scanned.last, before


class GILR(MinimalMixer):
    """Gated impulse linear recurrence: the minGRU with a tanh candidate.

    Source: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018.
    """

    own_fields = ()

    @classmethod
    def cell_spec(cls, config: "MinRNNConfig") -> CellSpec:
        return CellSpec("mingru", "tanh", has_fused_gate(config))
