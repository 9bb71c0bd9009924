"""A block of the model: the mixer, which carries the state through time, and the MLP.

    block:  x + down(cell(conv(norm(x)))),   then   x + mlp(norm(x))
    cell:   projections -> (a, b) -> linear_scan -> h  [* silu(gate)]

Document starts and padding are described in boundaries.py.

Shapes: B batch, T time, H hidden_size, R recurrent_size, K conv_kernel.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .bidirectional import ReverseMixer
from .boundaries import Boundaries
from .cell_scan import cell_scan, one_token
from .cell_spec import CellSpec
from .cells import CELLS
from .configuration_minrnn import MinRNNConfig
from .context_parallel import ContextGroup, context_cell_scan, context_conv
from .conv import causal_conv, conv_one_token, next_conv_state
from .layers import RMSNorm, swiglu
from .numba_support import is_token_step

State = tuple[Tensor | None, Tensor | None]  # recurrent [B, R] fp32, conv inputs [B, K-1, H]


class MinRNNMixer(nn.Module):
    """conv -> projections -> scan -> gate -> down-projection: the part that depends on earlier tokens."""

    def __init__(self, config: MinRNNConfig):
        super().__init__()
        self.cell = CELLS[config.cell]
        self.backend = config.scan_backend
        self.spec = CellSpec(config.cell, config.candidate_activation, config.output_gate)
        self.context_group: ContextGroup | None = None  # see `use_context_parallel`
        self.kernel = max(config.conv_kernel, 1)
        self.conv_weight = (
            nn.Parameter(torch.empty(config.hidden_size, self.kernel)) if self.kernel > 1 else None
        )
        self.in_proj = nn.Linear(
            config.hidden_size, self.spec.num_projections * config.recurrent_size, bias=False
        )
        self.gate_bias = nn.Parameter(torch.empty(self.cell.num_gates, config.recurrent_size))
        self.out_proj = nn.Linear(config.recurrent_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: State, boundaries: Boundaries) -> tuple[Tensor, State]:
        """x [B, T, H] -> [B, T, H], and the state after it."""
        boundaries = boundaries.to(x.device)
        if self.context_group is not None:
            return self.one_slice(x, state, boundaries, self.context_group)
        if (
            self.backend is None
            and is_token_step(x)
            and boundaries.lengths is None
            and boundaries.document_starts is None
        ):
            return self.one_token(x, state)
        recurrent, conv = state
        next_conv = None
        if self.conv_weight is not None:
            next_conv = next_conv_state(x, conv, self.kernel, boundaries.document_starts, boundaries.lengths)
            x = causal_conv(x, self.conv_weight, conv, boundaries.reach, self.backend)
        y, recurrent = cell_scan(
            self.in_proj(x),
            self.gate_bias,
            recurrent,
            spec=self.spec,
            boundaries=boundaries,
            backend=self.backend,
        )
        return self.out_proj(y), (recurrent, next_conv)

    def one_token(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The same for one token x [B, 1, H] in inference, in plain operations with little overhead."""
        recurrent, conv = state
        if self.conv_weight is not None:
            x, conv = conv_one_token(x, self.conv_weight, conv)
        y, recurrent = one_token(self.in_proj(x), self.gate_bias, recurrent, self.spec)
        return self.out_proj(y), (recurrent, conv)

    def one_slice(
        self, x: Tensor, state: State, boundaries: Boundaries, group: ContextGroup
    ) -> tuple[Tensor, State]:
        """The same for one process's slice x [B, T, H] of a text, with the states around the whole text."""
        if boundaries.lengths is not None:
            raise ValueError(
                "A sequence that is cut between processes cannot be padded: "
                "pass no attention_mask, or use_context_parallel(model, None)."
            )
        recurrent, conv = state
        if self.conv_weight is not None:
            x, conv = context_conv(x, self.conv_weight, conv, boundaries.reach, group, self.backend)
        y, recurrent = context_cell_scan(
            self.in_proj(x),
            self.gate_bias,
            recurrent,
            spec=self.spec,
            boundaries=boundaries,
            group=group,
            backend=self.backend,
        )
        return self.out_proj(y), (recurrent, conv)


class MinRNNMLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    def __init__(self, config: MinRNNConfig):
        super().__init__()
        self.act, self.gated, self.backend = ACT2FN[config.hidden_act], config.gated_mlp, config.scan_backend
        self.is_swiglu = config.gated_mlp and config.hidden_act in ("silu", "swish")
        self.up_proj = nn.Linear(
            config.hidden_size, config.intermediate_size * (2 if config.gated_mlp else 1), bias=False
        )
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)
        if self.is_swiglu:
            return self.down_proj(swiglu(x, self.backend))
        if not self.gated:
            return self.down_proj(self.act(x))
        gate, up = x.chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


class MinRNNBlock(GradientCheckpointingLayer):
    """Mixer and MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, config: MinRNNConfig):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.scan_backend)
        self.mixer = MinRNNMixer(config)
        self.reverse = ReverseMixer(MinRNNMixer(config), self.mixer.kernel) if config.bidirectional else None
        self.mlp_norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps, config.scan_backend)
            if config.intermediate_size
            else None
        )
        self.mlp = MinRNNMLP(config) if config.intermediate_size else None
        self.dropout = nn.Dropout(config.dropout)
        # Projections into the residual stream are scaled down by the number of additions. _init_weights reads
        # the scale there, because transformers does not call it for a module without parameters of its own,
        # such as this one.
        projections = [module.out_proj for module in self.modules() if isinstance(module, MinRNNMixer)]
        if self.mlp is not None:
            projections.append(self.mlp.down_proj)
        for projection in projections:
            projection.residual_scale = (config.num_hidden_layers * len(projections)) ** -0.5

    def forward(
        self, x: Tensor, recurrent: Tensor | None, conv: Tensor | None, boundaries: Boundaries
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, T, H] -> [B, T, H], and the state after it.

        The state is not a tuple, because reentrant checkpointing ignores gradients inside of tuples.
        """
        normed = self.mixer_norm(x)
        mixed, (recurrent, conv) = self.mixer(normed, (recurrent, conv), boundaries)
        if self.reverse is not None:
            mixed = mixed + self.reverse(normed, boundaries)
        x = x + self.dropout(mixed)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, recurrent, conv
