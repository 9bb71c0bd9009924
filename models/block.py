"""A block of the model: the mixer (mixer.py), which carries the state through time, and the MLP.

    x + mixer(norm(x)),   then   x + mlp(norm(x))

With `residual_scales`, the block reads s x + r x0 in place of x, where x0 is the embedding (as in
github.com/KellerJordan/modded-nanogpt).

Shapes: B batch, T time, H hidden_size.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .bidirectional import ReverseMixer
from .boundaries import Boundaries
from .configuration_minrnn import MinRNNConfig
from .layers import RMSNorm, swiglu
from .mixer import MinRNNMixer
from .registry import mixer_class
from .ternary import linear


class MinRNNMLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    def __init__(self, config: MinRNNConfig):
        super().__init__()
        self.act, self.gated, self.backend = ACT2FN[config.hidden_act], config.gated_mlp, config.scan_backend
        self.is_swiglu = config.gated_mlp and config.hidden_act in ("silu", "swish")
        widths = [config.intermediate_size] * (2 if config.gated_mlp else 1)
        self.up_proj = linear(config, config.hidden_size, *widths)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size)

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

    def __init__(self, config: MinRNNConfig, layer: int):
        super().__init__()
        self.residual_scales = nn.Parameter(torch.empty(2)) if config.residual_scales else None
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.scan_backend)
        self.mixer = mixer_class(config, layer)(config, layer)
        self.reverse = None
        if config.bidirectional:
            self.reverse = ReverseMixer(mixer_class(config, layer)(config, layer))
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
            projection.initial_scale = (config.num_hidden_layers * len(projections)) ** -0.5

    def forward(
        self,
        x: Tensor,
        recurrent: Tensor | None,
        conv: Tensor | None,
        boundaries: Boundaries,
        lower_bound: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, T, H] -> [B, T, H], and the state after it. x0 [B, T, H] is the embedding, for
        `residual_scales`.

        The state is not a tuple, because reentrant checkpointing ignores gradients inside of tuples.
        """
        if self.residual_scales is not None:
            assert x0 is not None
            scale, scale0 = self.residual_scales
            x = scale * x + scale0 * x0
        normed = self.mixer_norm(x)
        mixed, (recurrent, conv) = self.mixer(normed, (recurrent, conv), boundaries, lower_bound)
        if self.reverse is not None:
            mixed = mixed + self.reverse(normed, boundaries, lower_bound)
        x = x + self.dropout(mixed)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, recurrent, conv
