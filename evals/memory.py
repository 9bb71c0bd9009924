"""Memory of a device: how much is used, was used at most, and is free."""

import contextlib
import ctypes
from typing import Any

import psutil
import torch
from torch import Tensor


def synchronize(device: torch.device) -> None:
    """Wait for the device; the CPU has nothing to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def tensor_bytes(tensors: Any) -> int:
    """Bytes that these tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def release_memory(device: torch.device) -> None:
    """Give freed memory back to the machine, so that the next contender finds it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing is held back
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def available_bytes(device: torch.device) -> int:
    """Memory that could still be taken on the device."""
    release_memory(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def reset_peak_memory(device: torch.device) -> None:
    """Peak memory is counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with (
        contextlib.suppress(OSError),
        open("/proc/self/clear_refs", "w") as file,
    ):  # else peaks are of the whole process
        file.write("5")  # man 5 proc: resets the peak of the resident set


def peak_memory(device: torch.device) -> int:
    """Largest memory since `reset_peak_memory`, bytes: allocated by torch on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):  # not Linux: the memory now, which its peak is not below
        return current_memory(device)


def current_memory(device: torch.device) -> int:
    """As `peak_memory`, but now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
