"""Cells that average values with exponential weights: RWKV-4."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .bounded_scans import BoundedScans
from .dtypes import at_least_fp32
from .max_plus import EMPTY
from .mixer import MinRNNMixer

if TYPE_CHECKING:
    from .configuration_minrnn import MinRNNConfig


class RWKV4(MinRNNMixer):
    """The WKV average of RWKV-4, as two scans with a constant decay.

        wkv_t = (sum_{i<t} exp(-(t-1-i) w + k_i) v_i + exp(u + k_t) v_t) / (the same sum without v)
        y_t = sigmoid(r_t) wkv_t                            r is the output gate

    Numerator and denominator are kept divided by exp(m_t), m_t = max(m_{t-1} - w, k_t), so that keys of any
    size neither overflow nor vanish. The state is numerator | denominator | m. Source: Peng et al., "RWKV:
    Reinventing RNNs for the Transformer Era", arXiv 2305.13048, section 3.1; the block's convolution stands
    for its token shift, and the block's MLP for its channel mixing.
    """

    gate_activation = "sigmoid"

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        self.decay = nn.Parameter(torch.empty(config.recurrent_size))  # log w
        self.bonus = nn.Parameter(torch.empty(config.recurrent_size))  # u

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        return dict.fromkeys(("k", "v"), config.recurrent_size)

    @classmethod
    def state_size(cls, config: "MinRNNConfig") -> int:
        return 3 * config.recurrent_size

    def init_parameters(self, memory: Tensor) -> None:
        init.copy_(self.decay, torch.log(-torch.log1p(-1 / memory)))
        init.constant_(self.bonus, -1.2)  # log 0.3, as published

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        k, v = (at_least_fp32(part) for part in parts)
        sums0, m0 = (None, None) if state is None else state.split([2 * k.shape[2], k.shape[2]], dim=-1)
        w, bonus = at_least_fp32(self.decay).exp(), k + self.bonus
        m = scans.max_plus(w, k, m0)
        before = scans.previous(m, empty=EMPTY)
        a = torch.exp(before - m.h - w)  # in this order, a small w is not rounded away
        b = torch.exp((k - m.h).clamp(max=0))  # above 0 only in padding
        sums = scans.linear(torch.cat([a, a], dim=-1), torch.cat([b * v, b], dim=-1), sums0)
        numerator, denominator = scans.previous(sums).chunk(2, dim=-1)
        top = torch.maximum(before, bonus.detach())
        past, now = torch.exp(before - top), torch.exp(bonus - top)
        wkv = (past * numerator + now * v) / (past * denominator + now)
        return wkv, torch.cat([sums.last, m.last], dim=-1)
