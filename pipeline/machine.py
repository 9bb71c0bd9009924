"""The machine: its devices, their precisions and rates, its cores, its memory allocator."""

import ctypes
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil
import torch

from ..common.errors import UserError
from ..models.dtypes import DTYPES

CHOICES = ("fp32", "bf16")  # that `auto` chooses from
MIN_SPEEDUP = 1.2  # of bf16 over fp32, for `auto` to choose it; above the noise of measurements
SLOW = 3.0  # a precision that is this many times slower than another gives a warning


# --- Devices


def resolve_device(name: str, key: str = "--device") -> torch.device:
    """The device of this name: cpu, cuda, mps, xpu, or cuda:1 for one of several. auto is the accelerator, if
    there is one.

    Raises:
        UserError: under `key`, if there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            key, f"{name!r} is no device; use auto, cpu, cuda, mps, xpu, or cuda:1 for one of several"
        ) from None
    types = ["cpu"] + ([] if accelerator is None else [accelerator.type])
    if device.type not in types:
        raise UserError(key, f"there is no {device.type} device here; use {' or '.join(types)}, or auto")
    if device.type != "cpu" and (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise UserError(key, f"there is no {name} here; the last is {device.type}:{count - 1}")
    return device


def device_name(device: torch.device) -> str:
    """The device's name for messages: its type, and the model where torch knows it."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"xpu ({torch.xpu.get_device_name(device)})" if device.type == "xpu" else device.type


def supports(device: torch.device, precision: str) -> bool:
    """Whether the device computes in this precision without emulation. A CPU supports every precision."""
    if precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if precision == "bf16" and device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    return precision != "fp64" or device.type in ("cpu", "cuda")  # MPS and many XPUs have no fp64


# --- Precision


def matmul_rate(device: torch.device, dtype: torch.dtype, trials: int = 3) -> float:
    """Rate of square matrix products in FLOP/s, the best of some trials: an upper limit of a training step's
    rate."""
    size, seconds = _size_to_measure(device, dtype)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    _product_seconds(a, b, 1)
    repeats = max(1, round(0.03 / seconds))
    return 2 * size**3 * repeats / min(_product_seconds(a, b, repeats) for _ in range(trials))


def _size_to_measure(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """The size of a product that fills the device, or of one that takes about a tenth of a second, and its
    time.

    A CPU without bf16 units needs seconds for products that take others milliseconds. The products run in one
    thread, because several threads on a busy machine wait for each other.
    """
    num_threads, max_size = torch.get_num_threads(), 1024 if device.type == "cpu" else 8192
    size = max_size // 8
    torch.set_num_threads(1)
    try:
        while True:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            _product_seconds(a, b, 1)
            seconds = _product_seconds(a, b, 1)
            if size == max_size or 8 * seconds > 0.1:
                return size, seconds
            size *= 2
    finally:
        torch.set_num_threads(num_threads)


def _product_seconds(a: torch.Tensor, b: torch.Tensor, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    if a.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def measure_rates(device: torch.device, precisions: Iterable[str]) -> dict[str, float]:
    """`matmul_rate` of each precision that the device supports."""
    return {
        name: matmul_rate(device, DTYPES[name], trials=2)
        for name in dict.fromkeys(precisions)
        if supports(device, name)
    }


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision to compute in."""

    precision: str
    reason: str = ""
    """Why it differs from the requested one; empty if it does not."""
    warning: str = ""
    """A warning if it is slow on this device; else empty."""


def choose_precision(
    requested: str, saved: str | None, rates: Mapping[str, float], device: str, key: str = "train.precision"
) -> PrecisionChoice:
    """Choose the precision to compute in.

    A requested precision is used. `auto` gives the saved one if there is one, else the faster of fp32 and
    bf16 (fp32 if they are close).

    Args:
        requested: auto, fp32, bf16 or fp64.
        saved: the precision of a resumed run; None for a new run.
        rates: of matrix products, in FLOP/s, for each precision that the device supports.
        device: its name, for messages.
        key: the setting, for messages.

    Raises:
        UserError: the device does not support the requested or saved precision.
    """
    if requested == "auto" and saved is None:
        if "bf16" not in rates:
            return PrecisionChoice("fp32", f"chosen, since {device} does not support bf16")
        best, other = CHOICES[::-1] if rates["bf16"] > MIN_SPEEDUP * rates["fp32"] else CHOICES
        return PrecisionChoice(
            best, f"chosen: {_gflops(rates[best])} against {_gflops(rates[other])} in {other}"
        )
    precision = saved if requested == "auto" and saved is not None else requested
    advice = f"{key} auto" if requested != "auto" else f"{key} fp32 and run.change [{key}]"
    if precision not in rates:
        origin = "" if requested != "auto" else ", which the run began in"
        raise UserError(key, f"{device} does not support {precision}{origin}; use {advice}")
    fastest = max(rates, key=rates.__getitem__)
    warning, ratio = "", rates[fastest] / rates[precision]
    if ratio > SLOW:
        own = f"matrix products reach {_gflops(rates[precision])} in {precision} here"
        best = f"{_gflops(rates[fastest])} in {fastest}"
        warning = f"{key}: {own}, and {best}, {ratio:.0f} times as much; {advice} is faster"
    return PrecisionChoice(precision, "as the run began" if requested == "auto" else "", warning)


def _gflops(rate: float) -> str:
    return f"{rate / 1e9:.3g} GFLOP/s" if rate < 1e12 else f"{rate / 1e12:.3g} TFLOP/s"


def training_flops_per_token(num_parameters: int) -> int:
    """6 per parameter: 2 for the forward product, 4 for the two backward products."""
    return 6 * num_parameters


# --- Cores and memory


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_threads(environment: Mapping[str, str], cores: int) -> int | None:
    """Threads of a process that a launcher started; None to leave the number unchanged.

    torchrun and Accelerate set OMP_NUM_THREADS to 1 if the user did not set it. So a 1 from them is replaced
    by the process's share of the cores.
    """
    launched = "LOCAL_RANK" in environment or "ACCELERATE_MIXED_PRECISION" in environment
    if not launched or environment.get("OMP_NUM_THREADS", "1") != "1":
        return None
    return max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", "1")))


def compile_error(device: torch.device) -> str | None:
    """Why torch.compile cannot run on a device, in one line (no compiler, no Triton, an old GPU); None if it
    can.

    It compiles the smallest function, because the error would otherwise appear in the first step.
    """
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device))
    except Exception as error:  # of torch, the compiler, Triton, the file system
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel.

    A training step frees and allocates the same large tensors again and again. By default glibc allocates
    each with mmap, and its pages are faulted in every time, which on a virtual machine costs more than the
    arithmetic.
    """
    m_mmap_max, m_trim_threshold = -4, -1  # <malloc.h>
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # no glibc: nothing to set
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def main_memory() -> int | None:
    """Bytes of main memory; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory(device: torch.device) -> int:
    """Peak memory of the process since its start or a reset, in bytes: allocated by torch on a GPU, resident
    on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):  # not Linux: the current memory is a lower bound
        return current_memory(device)


def current_memory(device: torch.device) -> int:
    """Current memory, counted as in `peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
