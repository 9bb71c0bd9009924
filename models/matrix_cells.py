"""Cells with a state matrix in each head: linear attention, HGRN2, GLA, mLSTM.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        y_t = S_t^T q_t        S [K, V]

They differ in the decay a (none, per key channel, per head), in what is done to q and k, and in how y is
scaled. V is `config.head_dim`, K is `config.state_expansion`. Where a paper describes a whole block, its
recurrence and the norm of its output are the cell, and our block is around it.

Shapes: B batch, T time, N heads.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .bounded_scans import BoundedScans
from .dtypes import at_least_fp32
from .layers import RMSNorm
from .max_plus import EMPTY
from .mixer import GROUP, MinRNNMixer, gate_bias, nearest_divisor
from .ternary import linear

if TYPE_CHECKING:
    from .configuration_minrnn import MinRNNConfig

SMALLEST_HEAD, LARGEST_HEAD = 16, 256  # which the default never leaves in wide models


def head_size(config: "MinRNNConfig") -> int:
    """V: `config.head_dim`, or its default."""
    return config.head_dim or nearest_divisor(config.recurrent_size, GROUP)


def num_heads(config: "MinRNNConfig") -> int:
    """N."""
    return config.recurrent_size // head_size(config)


class MatrixMixer(MinRNNMixer):
    """Base of the cells with a state matrix in each head."""

    own_fields = ("head_dim", "state_expansion")
    takes_output_norm = False
    has_normalizer = False
    """The state has one more column, the decayed sum of k, which scales y."""
    has_decay = True
    """The state decays."""
    has_head_norm = True
    """An RMS norm of y over the channels of each head, before the output gate."""

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        self.num_heads, self.num_keys = num_heads(config), self.keys_per_head(config)
        self.matrix_size = self.num_heads * self.num_keys * (head_size(config) + self.has_normalizer)
        self.head_norm = None
        if self.has_head_norm:
            self.head_norm = RMSNorm(head_size(config), config.rms_norm_eps, config.scan_backend)

    @classmethod
    def keys_per_head(cls, config: "MinRNNConfig") -> int:
        """K; by default as many key channels as value channels."""
        return config.state_expansion or head_size(config)

    @classmethod
    def num_key_channels(cls, config: "MinRNNConfig") -> int:
        """N K."""
        return num_heads(config) * cls.keys_per_head(config)

    @classmethod
    def state_size(cls, config: "MinRNNConfig") -> int:
        return cls.num_key_channels(config) * (head_size(config) + cls.has_normalizer)

    @classmethod
    def recurrence_flops(cls, config: "MinRNNConfig") -> int:
        # For each number of the matrix: its decay 1, the outer product k v^T 2, the readout S^T q 2. Chunks
        # of tokens need other numbers of operations for the same result.
        size = cls.num_key_channels(config) * (head_size(config) + cls.has_normalizer)
        return (4 + cls.has_decay) * size

    @classmethod
    def config_errors(cls, config: "MinRNNConfig") -> dict[str, str]:
        errors = {}
        width, size = config.recurrent_size, head_size(config)
        if width % size:
            errors["head_dim"] = (
                f"must divide expansion_factor * hidden_size = {width}, and {size} does not; "
                f"the nearest that does is {nearest_divisor(width, size)}"
            )
        elif config.head_dim is None and width > LARGEST_HEAD and not SMALLEST_HEAD <= size <= LARGEST_HEAD:
            errors["head_dim"] = (
                f"expansion_factor * hidden_size = {width} has no divisor near {GROUP}, and heads of "
                f"{size} would be far from it: choose another hidden_size, or set head_dim to a divisor"
            )
        return errors

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, N D] -> [B, T, N, D]."""
        return x.unflatten(-1, (self.num_heads, -1))

    def output(self, y: Tensor) -> Tensor:
        """The cell's output [B, T, N V] from y [B, T, N, V]."""
        return (y if self.head_norm is None else self.head_norm(y)).flatten(-2)


def resized(memory: Tensor, size: int) -> Tensor:
    """Memory lengths for `size` decays, from those of the channels: again from the first where they end."""
    return memory.repeat(-(-size // len(memory)))[:size]


def with_ones(v: Tensor) -> Tensor:
    """v with a column of ones, whose state is the decayed sum of k, which fp16 cannot hold."""
    return F.pad(v.float() if v.dtype == torch.float16 else v, (0, 1), value=1.0)


class LinearAttention(MatrixMixer):
    """Causal linear attention.

        S_t = S_{t-1} + phi(k_t) (v_t | 1)^T,   y | z = S_t^T phi(q_t),   output y / z,   phi = elu + 1

    Source: Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236, equations 16 to 20.
    """

    has_normalizer = True
    has_decay = False
    has_head_norm = False
    takes_output_norm = True
    smallest = 1e-6
    """Added to z, which is 0 where phi(q) and all phi(k) underflow."""

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        num_keys = cls.num_key_channels(config)
        return {"q": num_keys, "k": num_keys, "v": config.recurrent_size}

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (self.heads(part) for part in parts)
        q, k = (F.elu(at_least_fp32(x)) + 1 for x in (q, k))
        s = scans.matrix(q, k, with_ones(v), None, state)
        y = at_least_fp32(s.h)
        return self.output(y[..., :-1] / (y[..., -1:] + self.smallest)), s.last


class HGRN2(MatrixMixer):
    """HGRN with a state matrix: one decay for each key channel, and k is what the decay leaves.

        a_t = lb + (1 - lb) sigmoid(f_t),   S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T,   y_t = S_t^T silu(q_t)

    lb is the layer's lower bound, as in HGRN. Source: Qin et al., "HGRN2: Gated Linear RNNs with State
    Expansion", arXiv 2404.07904, section 3.2; silu as in its published code.
    """

    smallest = 1e-6
    """Of a decay, whose logarithm has no bounded gradient at 0."""

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        self.gate_bias = nn.Parameter(torch.empty(1, self.num_key_channels(config)))

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        num_keys = cls.num_key_channels(config)
        return {"q": num_keys, "f": num_keys, "v": config.recurrent_size}

    @classmethod
    def lower_bound_size(cls, config: "MinRNNConfig") -> int:
        return cls.num_key_channels(config)

    def init_parameters(self, memory: Tensor) -> None:
        memory = resized(memory, self.gate_bias.shape[1])
        init.copy_(self.gate_bias, gate_bias(memory, bound=self.layer / self.num_layers))

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        (q, f, v), (bound,) = parts, lower_bound
        f = at_least_fp32(f) + self.gate_bias[0]
        k = (1 - bound) * torch.sigmoid(-f)
        log_decay = torch.log1p(-k.clamp(max=1 - self.smallest))  # log a = log(1 - k)
        q, k, v, log_decay = (self.heads(x) for x in (F.silu(q), k, v, log_decay))
        s = scans.matrix(q, k, v, log_decay, state)
        return self.output(s.h), s.last


class GLA(MatrixMixer):
    """Gated linear attention: one decay for each key channel, from a projection of low rank.

        a_t = sigmoid(W2 W1 x_t + bias)^(1/16)
        S_t = diag(a_t) S_{t-1} + k_t v_t^T,   y_t = S_t^T q_t / sqrt(K)

    K is half of V by default. Source: Yang et al., "Gated Linear Attention Transformers with
    Hardware-Efficient Training", arXiv 2312.06635, section 4.4.
    """

    rank = 16
    temperature = 16

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        num_keys = self.num_key_channels(config)
        self.decay_proj = linear(config, self.rank, num_keys)
        self.gate_bias = nn.Parameter(torch.empty(1, num_keys))

    @classmethod
    def keys_per_head(cls, config: "MinRNNConfig") -> int:
        return config.state_expansion or max(head_size(config) // 2, 1)

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        num_keys = cls.num_key_channels(config)
        return {"q": num_keys, "k": num_keys, "v": config.recurrent_size, "decay": cls.rank}

    def init_parameters(self, memory: Tensor) -> None:
        memory = resized(memory, self.gate_bias.shape[1])
        log_p = self.temperature * torch.log1p(-1 / memory)  # of the gate, sigmoid(bias) = p
        init.copy_(self.gate_bias, log_p - torch.log(-torch.expm1(log_p)))

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        *qkv, low_rank = parts
        q, k, v = (self.heads(part) for part in qkv)
        gate = at_least_fp32(self.decay_proj(low_rank)) + self.gate_bias[0]
        log_decay = self.heads(F.logsigmoid(gate)) / self.temperature
        s = scans.matrix(q * self.num_keys**-0.5, k, v, log_decay, state)
        return self.output(s.h), s.last


class MLSTM(MatrixMixer):
    """The matrix LSTM of xLSTM[1:0]: exponential input gates, one decay per head, and a normalizer.

        S_t = sigmoid(f_t) S_{t-1} + exp(i_t) k_t / sqrt(K) (v_t | 1)^T
        y | z = S_t^T q_t,   output sigmoid(o_t) norm(y / max(|z|, 1))       o is the output gate

    S is kept divided by exp(m_t), m_t = max(log sigmoid(f_t) + m_{t-1}, i_t), so that no gate overflows; then
    exp(-m_t) stands for 1. The results do not depend on m, so no gradient flows through it. The state is S |
    m. Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", arXiv 2405.04517, equations 19 to 27.
    """

    gate_activation = "sigmoid"
    has_normalizer = True

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        self.gate_bias = nn.Parameter(torch.empty(2, self.num_heads))  # of i, f

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        num_keys, heads = cls.num_key_channels(config), num_heads(config)
        return {"q": num_keys, "k": num_keys, "v": config.recurrent_size, "i": heads, "f": heads}

    @classmethod
    def state_size(cls, config: "MinRNNConfig") -> int:
        return super().state_size(config) + num_heads(config)

    def init_parameters(self, memory: Tensor) -> None:
        forget = gate_bias(resized(memory, self.num_heads))
        init.copy_(self.gate_bias, torch.stack([torch.zeros_like(forget), forget]))

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (self.heads(part) for part in parts[:3])
        i, f = (at_least_fp32(part) + bias for part, bias in zip(parts[3:], self.gate_bias, strict=True))
        s0, m0 = (None, None) if state is None else state.split([self.matrix_size, self.num_heads], dim=-1)
        log_f = F.logsigmoid(f)
        m = scans.max_plus(-log_f, i, m0)
        log_decay = scans.previous(m, empty=EMPTY) - m.h + log_f  # a small log f is not rounded away
        scale = torch.exp((i - m.h).clamp(max=0)) * self.num_keys**-0.5  # i > m in padding only
        s = scans.matrix(q, at_least_fp32(k) * scale.unsqueeze(-1), with_ones(v), log_decay.unsqueeze(-1), s0)
        y = at_least_fp32(s.h)
        y = y[..., :-1] / torch.maximum(y[..., -1:].abs(), torch.exp(-m.h).unsqueeze(-1))
        return self.output(y), torch.cat([s.last, m.last], dim=-1)
