"""Ternary projections: weights in {-1, 0, 1} times a scale, activations of 8 bits.

    y = quantized(norm(x)) @ quantized(W)^T

The rounding has the identity as its gradient (straight-through), and the weights that are trained and saved
stay in full precision. This is the BitLinear layer of Zhu et al., "Scalable MatMul-free Language Modeling",
arXiv 2406.02528, and of Ma et al., arXiv 2402.17764.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dtypes import at_least_fp32, compute_dtype

if TYPE_CHECKING:
    from .configuration_minrnn import MinRNNConfig

LEVELS = 127  # of an activation, on each side of 0
SMALLEST = 1e-5  # scale of an all-zero row


def ternary_weights(weight: Tensor) -> Tensor:
    """Each element rounded to -1, 0 or 1 times the mean absolute value; the gradient passes unchanged."""
    with torch.no_grad():
        scale = weight.abs().mean().clamp(min=SMALLEST)
        error = (weight / scale).round().clamp(-1, 1) * scale - weight
    return weight + error


def eight_bit_activations(x: Tensor) -> Tensor:
    """Each row [..., width] rounded to multiples of its largest absolute value / 127; the gradient passes."""
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LEVELS
        error = (x / scale).round() * scale - x
    return x + error


class TernaryLinear(nn.Linear):
    """A linear layer without bias whose weights and inputs are quantized, with an RMS norm before it."""

    def __init__(self, in_features: int, out_features: int, eps: float):
        super().__init__(in_features, out_features, bias=False)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        dtype = compute_dtype(input)
        x = F.rms_norm(at_least_fp32(input), input.shape[-1:], eps=self.eps)
        x, weight = eight_bit_activations(x), ternary_weights(at_least_fp32(self.weight))
        return F.linear(x.to(dtype), weight.to(dtype))


def linear(config: "MinRNNConfig", in_features: int, *widths: int) -> nn.Linear:
    """One or several projections of the model as one matrix, without bias: ternary if `config.ternary`.

    Args:
        widths: of the projections, side by side in the output. The attribute `widths` of the layer holds
            them for optimizers that treat each projection by itself.
    """
    layer: Any
    if config.ternary:
        layer = TernaryLinear(in_features, sum(widths), config.rms_norm_eps)
    else:
        layer = nn.Linear(in_features, sum(widths), bias=False)
    layer.widths = widths
    return layer
