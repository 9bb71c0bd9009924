"""The contenders that compute h_t = a_t * h_{t-1} + b_t, or a whole layer around it.

Each contender gets its preferred input: accelerated-scan [batch, width, time], mambapy [batch, time, width,
1], the log-space scan and HGRN log a. These are made before the clock starts, since a model that uses the
peer would produce them directly. b is positive, because the log-space scan requires it.

The paper's log-space scan (Feng et al., arXiv 2410.01201, appendix B; Heinsen, arXiv 2311.06281) is

    A_t = sum_{s<=t} log a_s        h_t = exp(A_t + logcumsumexp_t(log b_t - A_t))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.cell_scan import cell_scan
from ...models.cell_spec import CellSpec
from ...models.minimal_coefficients import mingru
from ...models.scan import linear_scan
from .measure import peer_module, require_cuda

Inputs = tuple[Tensor, ...]


def log_space_scan(log_a: Tensor, log_b: Tensor) -> Tensor:
    """h from log a and log b, [batch, time, width].

    Computed in fp32, since a sum over time loses all digits in bf16.
    """
    log_a, dtype = log_a.float(), log_b.dtype
    cumulative = log_a.cumsum(1)
    return (cumulative + (log_b.float() - cumulative).logcumsumexp(1)).exp().to(dtype)


@dataclass(frozen=True)
class ScanPeer:
    """A contender of the scan."""

    load: Callable[[torch.device], Callable[..., Tensor]]
    """Returns the function to time, or raises Unavailable."""
    inputs: Callable[..., Inputs] = lambda *operands: operands
    """Converts a, b [batch, time, width] (for a cell: projections [batch, time, 2 * width]) to the function's
    inputs.
    """
    output: Callable[[Tensor], Tensor] = lambda h: h
    """Converts the function's output to h [batch, time, width]."""
    live_tensors: tuple[int, int] = (4, 7)
    """Number of tensors [batch, time, width], counted as fp32, that exist at once (including a and b):
    forward, and with backward.
    """


def _ours(backend: str | None) -> Callable[[torch.device], Callable[..., Tensor]]:
    def load(device: torch.device) -> Callable[..., Tensor]:
        one = torch.ones(1, 1, 1, device=device)
        linear_scan(one, one, backend=backend)  # raises at once if something is missing
        return lambda a, b: linear_scan(a, b, backend=backend)[0]

    return load


def _mambapy(device: torch.device) -> Callable[..., Tensor]:
    return peer_module("mambapy.pscan", "mambapy").pscan


def _mingru_pytorch(device: torch.device) -> Callable[..., Tensor]:
    return peer_module("minGRU_pytorch.minGRU", "minGRU-pytorch").heinsen_associative_scan_log


def _accelerated_scan(device: torch.device) -> Callable[..., Tensor]:
    require_cuda(device)
    return peer_module("accelerated_scan.scalar", "accelerated-scan").scan


def _hgrn(device: torch.device) -> Callable[..., Tensor]:
    require_cuda(device)
    fused_recurrent_hgrn = peer_module("fla.ops.hgrn", "flash-linear-attention").fused_recurrent_hgrn
    return lambda log_a, b: fused_recurrent_hgrn(b, log_a)[0]


def _channels_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _logs(a: Tensor, b: Tensor) -> Inputs:
    return a.log(), b.log()


SCAN_PEERS: dict[str, ScanPeer] = {
    "log-space": ScanPeer(lambda device: log_space_scan, _logs, live_tensors=(9, 18)),
    "minGRU-pytorch": ScanPeer(_mingru_pytorch, _logs, live_tensors=(9, 18)),
    "mambapy": ScanPeer(
        _mambapy,
        lambda a, b: (a.unsqueeze(-1), b.unsqueeze(-1)),
        lambda h: h.squeeze(-1),
        live_tensors=(6, 12),
    ),
    "accelerated-scan": ScanPeer(
        _accelerated_scan,
        lambda a, b: (_channels_first(a), _channels_first(b)),
        lambda h: h.transpose(1, 2),
        (6, 10),
    ),
    "fla-hgrn": ScanPeer(_hgrn, lambda a, b: (a.log(), b), live_tensors=(5, 9)),
}
OUR_SCANS: dict[str, ScanPeer] = {
    "minrnn": ScanPeer(_ours(None)),
    "minrnn-torch": ScanPeer(_ours("torch"), live_tensors=(9, 18)),
}


# --- The cell: pre-activations k, u -> h, the paper's minGRU


def unfused_mingru(k: Tensor, u: Tensor) -> Tensor:
    """Our cell and scan as separate operators; candidate activation g."""
    return linear_scan(*mingru(k, u, "g"))[0]


def log_space_mingru(k: Tensor, u: Tensor) -> Tensor:
    """The paper's minGRU in log space: log(1-z) = -softplus(k), log z = -softplus(-k), log g(u)."""
    k, dtype, u = k.float(), u.dtype, u.float()
    log_g = torch.where(u >= 0, (F.relu(u) + 0.5).log(), -F.softplus(-u))
    return log_space_scan(-F.softplus(k), -F.softplus(-k) + log_g).to(dtype)


def fused_mingru(projected: Tensor) -> Tensor:
    """Our fused cell, with k and u as one tensor of twice the width."""
    bias = projected.new_zeros(1, projected.shape[-1] // 2, dtype=torch.float32)
    return cell_scan(projected, bias, spec=CellSpec("mingru", activation="g"))[0]


def _halves(
    function: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[torch.device], Callable[[Tensor], Tensor]]:
    return lambda device: lambda projected: function(*projected.chunk(2, dim=-1))


CELL_PEERS: dict[str, ScanPeer] = {
    "minrnn-fused": ScanPeer(lambda device: fused_mingru),
    "minrnn-unfused": ScanPeer(_halves(unfused_mingru), live_tensors=(10, 18)),
    "log-space": ScanPeer(_halves(log_space_mingru), live_tensors=(12, 24)),
}


# --- Whole layers at equal width: x [batch, time, width] -> y, projections included


class MinGRULayer(nn.Module):
    """A projection and our cell: the counterpart of nn.GRU.

    Args:
        width: of x and of the state.
        cell: projected [batch, time, 2 * width] -> h.
    """

    def __init__(self, width: int, cell: Callable[[Tensor], Tensor]):
        super().__init__()
        self.projections, self.cell = nn.Linear(width, 2 * width, bias=False), cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.projections(x))


class TorchLayer(nn.Module):
    """nn.GRU or nn.LSTM without its final state."""

    def __init__(self, layer: nn.GRU | nn.LSTM):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def _mingru_pytorch_layer(device: torch.device, width: int) -> nn.Module:
    return peer_module("minGRU_pytorch.minGRU", "minGRU-pytorch").minGRU(width)


LAYER_PEERS: dict[str, Callable[[torch.device, int], nn.Module]] = {
    "minrnn-fused": lambda device, width: MinGRULayer(width, fused_mingru),
    "minrnn-unfused": lambda device, width: MinGRULayer(width, _halves(unfused_mingru)(device)),
    "minGRU-pytorch": _mingru_pytorch_layer,
    "nn.GRU": lambda device, width: TorchLayer(nn.GRU(width, width, batch_first=True)),
    "nn.LSTM": lambda device, width: TorchLayer(nn.LSTM(width, width, batch_first=True)),
}
