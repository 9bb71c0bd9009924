"""Number formats: their names in recipes and options, and the format that each kind of computation uses."""

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32; fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


def accumulate_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Dtype of the carried state: fp64 if either operand is fp64, otherwise fp32."""
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the matrix products of x: autocast's dtype where autocast is on, otherwise x's own."""
    device = x.device.type
    # The meta device has no autocast.
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on and x.dtype != torch.float64 else x.dtype
