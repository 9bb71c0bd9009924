"""The mixer: the part of a block that reads earlier tokens. Every cell is a subclass, and so is attention.

    mixer:  x -> causal convolution -> projections -> cell [-> norm] [* activation(output gate)]
              -> down-projection

A cell is the recurrence in it: a subclass names its projections and its state, and computes outputs and the
next state from them in `cell`. It uses the scans of `BoundedScans`, which handle document starts, padding,
single tokens and sequences that are cut between processes, so that a cell is written once, as an equation.
docs/new-cell.md adds one step by step.

Shapes: B batch, T time, H hidden_size, R recurrent_size, K conv_kernel, S state_size.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .boundaries import Boundaries
from .bounded_scans import BoundedScans
from .context_parallel import ContextGroup, context_conv, context_tail
from .conv import causal_conv, causal_window, conv_one_token, next_conv_state
from .dtypes import at_least_fp32
from .layers import RMSNorm
from .numba_support import is_token_step
from .ternary import linear

if TYPE_CHECKING:
    from .configuration_minrnn import MinRNNConfig

GROUP = 64  # channels that the output norm takes together, if the width is a multiple of it
State = tuple[Tensor | None, Tensor | None]  # recurrent [B, S] fp32, conv inputs [B, K-1, H] (`tail_shape`)


class MinRNNMixer(nn.Module):
    """Base of all cells.

    Args:
        config: of the model.
        layer: index of the block, from 0.
    """

    gate_activation: str | None = "silu"
    """Activation of the output gate (`config.output_gate`), a name of `transformers.activations.ACT2FN`; None
    for a cell that applies the gate itself."""
    own_fields: tuple[str, ...] = ()
    """Fields of the configuration that not every cell reads, but this one does."""
    has_full_convolution = False
    """The projections read the last K inputs of all channels, instead of one depthwise convolution."""
    takes_convolution = True
    """The mixer begins with a causal convolution (`config.conv_kernel`)."""
    takes_output_norm = True
    """The mixer can norm the cell's output before the output gate (`config.output_norm`)."""
    takes_two_taps = False
    """The cell's input can be b_t + lambda b_{t-1} (`config.two_tap_input`)."""
    learns_h0 = False
    """The cell can begin documents from a learnt state (`config.learn_h0`); its scans take `initial_state`
    then."""

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__()
        self.layer, self.num_layers = layer, config.num_hidden_layers
        self.backend = config.scan_backend
        self.context_group: ContextGroup | None = None  # see `use_context_parallel`
        self.kernel = max(config.conv_kernel, 1) if self.takes_convolution else 1
        is_depthwise = self.kernel > 1 and not self.has_full_convolution
        self.conv_weight = (
            nn.Parameter(torch.empty(config.hidden_size, self.kernel)) if is_depthwise else None
        )
        self.widths = list(self.projections(config).values())
        self.gate = ACT2FN[self.gate_activation] if self.gate_activation and config.output_gate else None
        if self.gate is not None:
            self.widths.append(self.output_size(config))
        self.output_norm = None
        self.norm_group = nearest_divisor(self.output_size(config), GROUP)
        if config.output_norm and self.takes_output_norm:
            self.output_norm = RMSNorm(self.norm_group, config.rms_norm_eps, config.scan_backend)
        taps = self.kernel if self.has_full_convolution else 1
        self.in_proj = linear(config, taps * config.hidden_size, *self.widths)
        self.out_proj = linear(config, self.output_size(config), config.hidden_size)
        has_h0 = config.learn_h0 and self.learns_h0
        self.h0 = nn.Parameter(torch.empty(self.state_size(config))) if has_h0 else None

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        """Name and width of each projection of x, in the order in which `cell` receives them."""
        raise NotImplementedError

    @classmethod
    def state_size(cls, config: "MinRNNConfig") -> int:
        """Numbers of the recurrent state in each row."""
        return config.recurrent_size

    @classmethod
    def tail_shape(cls, config: "MinRNNConfig") -> tuple[int, int] | None:
        """Tokens and numbers of each of the last inputs that are kept, for the convolution; None for none."""
        taps = config.conv_kernel - 1
        return (taps, config.hidden_size) if taps > 0 else None

    @classmethod
    def recurrence_flops(cls, config: "MinRNNConfig") -> int:
        """Operations (additions, products) of the recurrence and its readout per token, without what is
        computed from the input alone. a h + b takes 2 for each number of the state."""
        return 2 * cls.state_size(config)

    @classmethod
    def attention_flops(cls, config: "MinRNNConfig") -> int:
        """Operations of scores and values of an attention per token."""
        return 0

    @classmethod
    def output_size(cls, config: "MinRNNConfig") -> int:
        """Channels of the cell's output."""
        return config.recurrent_size

    @classmethod
    def lower_bound_size(cls, config: "MinRNNConfig") -> int:
        """Decays in each layer with a learnt lower bound, which `cell` then receives; 0 for none."""
        return 0

    @classmethod
    def config_errors(cls, config: "MinRNNConfig") -> dict[str, str]:
        """What is wrong with the fields of a configuration for this cell, by field."""
        return {}

    def init_parameters(self, memory: Tensor) -> None:
        """Set the cell's own parameters before training.

        Args:
            memory: memory lengths in tokens, fp32 [R], spread log-uniformly; at zero input, the decay of
                channel r should be 1 - 1 / memory[r].
        """

    def initial_state(self) -> Tensor | None:
        """The learnt state before the first token of a document, [S] in at least fp32; None if it is 0.

        It must be 0 where `h0` is, so that training begins as without it. A cell whose state is bounded maps
        `h0` into its range.
        """
        return None if self.h0 is None else at_least_fp32(self.h0)

    def entering(self, state: Tensor | None, projected: Tensor) -> Tensor | None:
        """The state before the batch, [B, S]: the learnt one, if there is one, where a text begins."""
        initial = self.initial_state()
        if initial is None:
            return state
        initial = initial.to(projected.device)
        # All processes of a group hold the total gradient of the state before the sequence, but gradients of
        # parameters are summed over them: the first process counts this one.
        is_first = self.context_group is None or self.context_group.rank == 0
        if state is None:
            state = (initial if is_first else initial.detach()).expand(len(projected), -1)
        # DDP and ZeRO expect a gradient of every parameter in every step, and this batch may begin no text.
        return state + 0 * initial if torch.is_grad_enabled() else state

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The recurrence.

        Args:
            parts: the projections, each [B, T, width], in the dtype of the matrix products.
            state: before the first token, [B, S] in fp32 (fp64); None before the first token of a text.
            scans: what the recurrence is computed with.
            lower_bound: the layer's bounds, [lower_bound_size], if the cell has any.

        Returns:
            Outputs [B, T, output_size] in any dtype, and the state after the last token [B, S].
        """
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: State, boundaries: Boundaries, lower_bound: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, H] -> [B, T, H], and the state after it."""
        boundaries = self.on_device(boundaries, x)
        recurrent, conv = state
        x, conv = self.convolve(x, conv, boundaries)
        bounds = () if lower_bound is None else (lower_bound.to(x.device),)
        y, recurrent = self.recur(self.in_proj(x), recurrent, boundaries, *bounds)
        return self.out_proj(y), (recurrent, conv)

    def on_device(self, boundaries: Boundaries, x: Tensor) -> Boundaries:
        """The boundaries where x is. Raises ValueError for padding in a row that is cut between processes."""
        if self.context_group is not None and boundaries.lengths is not None:
            raise ValueError(
                "A sequence that is cut between processes cannot be padded: "
                "pass no attention_mask, or use_context_parallel(model, None)."
            )
        return boundaries.to(x.device)

    def convolve(
        self, x: Tensor, conv: Tensor | None, boundaries: Boundaries
    ) -> tuple[Tensor, Tensor | None]:
        """The convolution's output [B, T, H] ([B, T, K H] if it is full) and its next state."""
        if self.kernel == 1:
            return x, None
        if self.conv_weight is not None:
            return self.convolve_channels(x, self.conv_weight, conv, boundaries)
        if self.context_group is not None:
            return self.convolve_slice(x, conv, boundaries.reach, self.context_group)
        next_conv = next_conv_state(x, conv, self.kernel, boundaries.document_starts, boundaries.lengths)
        return causal_window(x, self.kernel, conv, boundaries.reach), next_conv

    def convolve_channels(
        self, x: Tensor, weight: Tensor, conv: Tensor | None, boundaries: Boundaries
    ) -> tuple[Tensor, Tensor]:
        """A depthwise convolution with `weight` [W, kernel]: x [B, T, W] -> [B, T, W], and its next state."""
        if self.context_group is not None:
            return context_conv(x, weight, conv, boundaries.reach, self.context_group, self.backend)
        if self.is_single_token(x, boundaries):
            return conv_one_token(x, weight, conv)
        starts, lengths = boundaries.document_starts, boundaries.lengths
        next_conv = next_conv_state(x, conv, weight.shape[1], starts, lengths)
        return causal_conv(x, weight, conv, boundaries.reach, self.backend), next_conv

    def convolve_slice(
        self, x: Tensor, conv: Tensor | None, reach: Tensor | None, group: ContextGroup
    ) -> tuple[Tensor, Tensor]:
        """A full convolution's window for one process's slice of a text."""
        entering, last = context_tail(x, self.kernel - 1, conv, reach, group)
        return causal_window(x, self.kernel, entering, reach), last

    def is_single_token(self, x: Tensor, boundaries: Boundaries) -> bool:
        """Whether this is a step of decoding, for which plain operations have the least overhead."""
        no_cut = boundaries.lengths is None and boundaries.document_starts is None
        return self.backend is None and self.context_group is None and no_cut and is_token_step(x)

    def scans(self, projected: Tensor, boundaries: Boundaries) -> BoundedScans:
        """The scans of a batch."""
        return BoundedScans(
            boundaries,
            self.backend,
            self.context_group,
            is_single_token=self.is_single_token(projected, boundaries),
        )

    def recur(
        self, projected: Tensor, state: Tensor | None, boundaries: Boundaries, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        """projected [B, T, sum of widths] -> y [B, T, output_size] in its dtype, and the next state."""
        scans, parts = self.scans(projected, boundaries), projected.split(self.widths, dim=-1)
        state = self.entering(state, projected)
        h, state = self.cell(parts[:-1] if self.gate else parts, state, scans, *lower_bound)
        return self.gated(h.to(projected.dtype), parts[-1]), state

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """The cell's output y [B, T, output_size], normed, times the activated output gate; each only if the
        configuration has it."""
        if self.output_norm is not None:
            groups = y.unflatten(-1, (-1, self.norm_group))
            y = self.output_norm(groups).flatten(-2).to(y.dtype)
        return y if self.gate is None else y * self.gate(gate)


def nearest_divisor(number: int, target: int) -> int:
    """The divisor of `number` that is nearest to `target`, as a ratio."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return min(
        (*small, *(number // divisor for divisor in small)),
        key=lambda divisor: abs(math.log(divisor / target)),
    )


def gate_bias(memory: Tensor, bound: float = 0.0) -> Tensor:
    """The bias x with bound + (1 - bound) sigmoid(x) = 1 - 1 / memory, or just above the bound.

    sigmoid(x) / sigmoid(-x) = exp(x) is (1 - bound) memory - 1, which keeps its digits for long memories.
    """
    return torch.log(((1 - bound) * memory - 1).clamp(min=0.02))


def inverse_softplus(y: Tensor) -> Tensor:
    """The pre-activation whose softplus is y > 0."""
    return y + torch.log(-torch.expm1(-y))
