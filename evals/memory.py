"""Memory of a device: in use, peak, and available."""

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..pipeline.machine import current_memory, peak_memory

__all__ = [
    "available_bytes",
    "current_memory",
    "peak_memory",
    "release_memory",
    "reset_peak_memory",
    "synchronize",
    "tensor_bytes",
]


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to do for the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def tensor_bytes(tensors: Any) -> int:
    """Number of bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def release_memory(device: torch.device) -> None:
    """Return freed memory to the system, so that the next contender can use it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # without glibc, nothing is retained
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device."""
    release_memory(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def reset_peak_memory(device: torch.device) -> None:
    """Start counting peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # without it, the peak is that of the whole process
        # man 5 proc: resets the peak of the resident set
        Path("/proc/self/clear_refs").write_text("5")
