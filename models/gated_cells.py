"""Cells with a real state per channel and gates that depend on the input: GILR-LSTM, HGRN, QRNN, RG-LRU.

Where a paper describes a whole block, its recurrence is the cell and our block is around it, so that cells
can be compared with everything else equal.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .bounded_scans import BoundedScans
from .cell_spec import CellSpec
from .dtypes import at_least_fp32
from .minimal_cells import MinimalMixer, has_fused_gate
from .mixer import MinRNNMixer, gate_bias, inverse_softplus
from .ternary import linear

if TYPE_CHECKING:
    from .configuration_minrnn import MinRNNConfig


class GILRLSTM(MinRNNMixer):
    """An LSTM whose gates read the output of a GILR in place of its own.

        g_t = a_t g_{t-1} + (1 - a_t) tanh(u_t)             a = sigmoid(k): a GILR, the first scan
        f, i, z, o = W x_t + U g_{t-1}
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(z)       the second scan
        h_t = sigmoid(o) c_t                                without an output gate, c_t

    The state is g | c. Source: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence
    Length", ICLR 2018, section 3.3.
    """

    gate_activation = None
    takes_output_norm = False
    learns_h0 = True

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        self.gate_bias = nn.Parameter(torch.empty(3, config.recurrent_size))  # of k, f, i
        self.hidden_in_proj = linear(config, config.recurrent_size, *self.widths[2:])

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        return dict.fromkeys(("k", "u", "f", "i", "z", "o")[: 5 + config.output_gate], config.recurrent_size)

    @classmethod
    def state_size(cls, config: "MinRNNConfig") -> int:
        return 2 * config.recurrent_size

    def init_parameters(self, memory: Tensor) -> None:
        bias = gate_bias(memory)
        init.copy_(self.gate_bias, torch.stack([bias, bias, -bias]))

    def initial_state(self) -> Tensor | None:
        if (initial := super().initial_state()) is None:
            return None
        g, c = initial.chunk(2)
        return torch.cat([g.tanh(), c])  # g is an average of tanh, in (-1, 1)

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        g0, c0 = (None, None) if state is None else state.chunk(2, dim=-1)
        initial = self.initial_state()
        g_initial, c_initial = (None, None) if initial is None else initial.chunk(2)
        k = at_least_fp32(parts[0]) + self.gate_bias[0]
        b = (torch.sigmoid(-k) * torch.tanh(parts[1])).to(parts[1].dtype)
        g = scans.linear(torch.sigmoid(k), b, g0, g_initial)
        before = scans.previous(g, empty=0.0 if g_initial is None else g_initial)
        hidden = self.hidden_in_proj(before).split(self.widths[2:], dim=-1)
        f, i, z, *o = (x + y for x, y in zip(parts[2:], hidden, strict=True))
        f, i = at_least_fp32(f) + self.gate_bias[1], at_least_fp32(i) + self.gate_bias[2]
        c = scans.linear(torch.sigmoid(f), (torch.sigmoid(i) * torch.tanh(z)).to(z.dtype), c0, c_initial)
        h = c.h * torch.sigmoid(o[0]) if o else c.h
        return h, torch.cat([g.last, c.last], dim=-1)


class HGRN(MinimalMixer):
    """Hierarchically gated recurrence, with real decays above a bound that rises from layer to layer.

        a_t = lb + (1 - lb) sigmoid(f_t),   h_t = a_t h_{t-1} + (1 - a_t) silu(u_t)

    Source: Qin et al., "Hierarchically Gated Recurrent Neural Network", arXiv 2311.04823.
    """

    own_fields = ()

    @classmethod
    def cell_spec(cls, config: "MinRNNConfig") -> CellSpec:
        return CellSpec("hgrn", "silu", has_fused_gate(config))

    @classmethod
    def lower_bound_size(cls, config: "MinRNNConfig") -> int:
        return config.recurrent_size

    def init_parameters(self, memory: Tensor) -> None:
        init.copy_(self.gate_bias, gate_bias(memory, bound=self.layer / self.num_layers))
        self.init_tap()

    def channel_rows(self, *lower_bound: Tensor) -> Tensor:
        (bound,) = lower_bound
        return torch.cat([self.gate_bias, bound.unsqueeze(0)])


class QRNN(MinRNNMixer):
    """Quasi-recurrent network (fo-pooling): the gates come from a causal convolution over all channels.

        a_t = sigmoid(f_t),   h_t = a_t h_{t-1} + (1 - a_t) tanh(u_t),   y_t = sigmoid(o_t) h_t

    f, u, o are projections of the last `conv_kernel` inputs. Source: Bradbury et al., "Quasi-Recurrent Neural
    Networks", arXiv 1611.01576.
    """

    gate_activation = "sigmoid"
    has_full_convolution = True
    learns_h0 = True

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        self.gate_bias = nn.Parameter(torch.empty(1, config.recurrent_size))

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        return dict.fromkeys(("f", "u"), config.recurrent_size)

    def init_parameters(self, memory: Tensor) -> None:
        init.copy_(self.gate_bias, gate_bias(memory))

    def initial_state(self) -> Tensor | None:
        initial = super().initial_state()
        return None if initial is None else initial.tanh()  # h is an average of tanh, in (-1, 1)

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        f, u = parts
        f = at_least_fp32(f) + self.gate_bias[0]
        b = (torch.sigmoid(-f) * torch.tanh(u)).to(u.dtype)
        h = scans.linear(torch.sigmoid(f), b, state, self.initial_state())
        return h.h, h.last


class RGLRU(MinimalMixer):
    """The real-gated linear recurrent unit of Hawk and Griffin.

        a_t = exp(-8 sigmoid(r_t) softplus(L)),   h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(i_t) u_t

    At a document start the factor sqrt(1 - a^2) is 1. Source: De et al., "Griffin", arXiv 2402.19427, section
    2.4; the gates are dense projections here.
    """

    own_fields = ()
    gate_activation = "gelu"
    takes_two_taps = False

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        self.decay = nn.Parameter(torch.empty(config.recurrent_size))  # L

    @classmethod
    def cell_spec(cls, config: "MinRNNConfig") -> CellSpec:
        return CellSpec("rglru", "none", has_fused_gate(config))

    def init_parameters(self, memory: Tensor) -> None:
        init.zeros_(self.gate_bias)
        init.copy_(self.decay, inverse_softplus(-torch.log1p(-1 / memory) / 4))  # sigmoid(0) * 8 = 4

    def channel_rows(self, *lower_bound: Tensor) -> Tensor:
        rate = -8 * F.softplus(at_least_fp32(self.decay))
        return torch.cat([self.gate_bias, rate.unsqueeze(0)])
