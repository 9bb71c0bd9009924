"""Cells with a complex diagonal state whose decay does not depend on the input: LRU and S4D.

A complex channel is a pair of real ones. `BoundedScans.rotating` runs the recurrence.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .bounded_scans import BoundedScans
from .dtypes import at_least_fp32
from .mixer import MinRNNMixer

if TYPE_CHECKING:
    from .configuration_minrnn import MinRNNConfig


class LRU(MinRNNMixer):
    """Linear recurrent unit: R/2 complex channels.

        h_t = exp(-exp(nu) + i exp(theta)) h_{t-1} + exp(gamma) u_t

    The projections are the paper's B, the down-projection its C. Its term D x is left out, because the block
    adds its input. Angles start uniformly in [0, pi): those in [pi, 2 pi) are the same with conjugate B and
    C. Source: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349.
    """

    learns_h0 = True

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        pairs = config.recurrent_size // 2
        self.nu, self.theta, self.gamma = (nn.Parameter(torch.empty(pairs)) for _ in range(3))

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        return {"u": config.recurrent_size}

    @classmethod
    def recurrence_flops(cls, config: "MinRNNConfig") -> int:
        return 8 * (config.recurrent_size // 2)  # a complex product and a complex sum for each pair

    @classmethod
    def config_errors(cls, config: "MinRNNConfig") -> dict[str, str]:
        if config.recurrent_size % 2 == 0:
            return {}
        message = f"times hidden_size must give an even number of channels, not {config.recurrent_size}"
        return {"expansion_factor": message}

    def init_parameters(self, memory: Tensor) -> None:
        memory = memory[: self.nu.shape[0]]
        rate = -torch.log1p(-1 / memory)
        init.copy_(self.nu, rate.log())
        init.copy_(self.theta, (torch.rand_like(rate) * math.pi).clamp(min=1e-3).log())
        init.copy_(self.gamma, 0.5 * torch.log(-torch.expm1(-2 * rate)))  # sqrt(1 - |a|^2)

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        rate, theta, scale = (at_least_fp32(x).exp() for x in (self.nu, self.theta, self.gamma))
        b = at_least_fp32(parts[0]) * torch.cat([scale, scale])
        h = scans.rotating(torch.exp(-rate), theta, b, state, self.initial_state())
        return h.h, h.last


class S4D(MinRNNMixer):
    """The diagonal state space model: N complex states for each channel, one input and one output.

        h_t = exp(dt A) h_{t-1} + u_t,   y_t = 2 Re(sum_n C_n (exp(dt A_n) - 1) / A_n h_{t,n}) + D u_t

    A_n = -1/2 + i pi n at the start (S4D-Lin), dt per channel, zero-order hold; N is `state_expansion`, 8 by
    default. Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models",
    arXiv 2206.11893.
    """

    own_fields = ("state_expansion",)
    default_expansion = 8

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        channels, self.num_states = config.recurrent_size, self.expansion(config)
        pairs = channels * self.num_states
        self.log_dt, self.skip = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        self.log_real, self.imaginary = (nn.Parameter(torch.empty(pairs)) for _ in range(2))
        self.readout = nn.Parameter(torch.empty(2 * pairs))  # C, real parts | imaginary parts

    @classmethod
    def expansion(cls, config: "MinRNNConfig") -> int:
        """Complex states for each channel."""
        return config.state_expansion or cls.default_expansion

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        return {"u": config.recurrent_size}

    @classmethod
    def state_size(cls, config: "MinRNNConfig") -> int:
        return 2 * config.recurrent_size * cls.expansion(config)

    @classmethod
    def recurrence_flops(cls, config: "MinRNNConfig") -> int:
        # For each state: a complex product 6, the real input 1, Re(w h) 3, and its sum 1.
        return 11 * config.recurrent_size * cls.expansion(config)

    def init_parameters(self, memory: Tensor) -> None:
        n = torch.arange(self.num_states, dtype=memory.dtype).repeat(len(memory))
        init.copy_(self.log_dt, torch.log(-2 * torch.log1p(-1 / memory)))  # exp(-dt / 2) = 1 - 1 / memory
        init.constant_(self.log_real, math.log(0.5))
        init.copy_(self.imaginary, math.pi * n)
        init.normal_(self.readout, std=self.num_states**-0.5)
        init.constant_(self.skip, 1.0)

    def cell(
        self, parts: tuple[Tensor, ...], state: Tensor | None, scans: BoundedScans, *lower_bound: Tensor
    ) -> tuple[Tensor, Tensor]:
        (u,) = parts
        dt = at_least_fp32(self.log_dt).exp().unsqueeze(1)
        real, imaginary, c, ci = (
            at_least_fp32(x).view(-1, self.num_states)
            for x in (self.log_real, self.imaginary, *self.readout.chunk(2))
        )
        real = -real.exp()
        weight = 2 * torch.stack(_times(c, ci, *_hold(dt, real, imaginary)))
        y = scans.readout(torch.exp(dt * real), dt * imaginary, weight, u, state)
        return torch.addcmul(y.h, at_least_fp32(self.skip), u), y.last


def _times(x: Tensor, xi: Tensor, y: Tensor, yi: Tensor) -> tuple[Tensor, Tensor]:
    """(x + i xi) (y + i yi) as real and imaginary part."""
    return x * y - xi * yi, x * yi + xi * y


def _hold(dt: Tensor, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(dt A) - 1) / A with A = real + i imaginary: the input's weight in zero-order hold.

    The difference is computed without cancellation, as dt may be small.
    """
    theta, norm = dt * imaginary, real.square() + imaginary.square()
    grown = torch.expm1(dt * real)
    difference = grown * theta.cos() - 2 * (theta / 2).sin().square(), (1 + grown) * theta.sin()
    return _times(difference[0], difference[1], real / norm, -imaginary / norm)
