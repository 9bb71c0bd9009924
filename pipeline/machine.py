"""What the machine can do: its devices, what they compute in and how fast, its cores and its allocator."""

import ctypes
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..common.errors import UserError
from ..models.dtypes import DTYPES

CHOICES = ("fp32", "bf16")  # that `auto` takes one of
GAIN = (
    1.2  # bf16, which has fewer digits, is chosen if it is so many times faster: more than measurements vary
)
SLOW = 3.0  # times slower than another precision: worth a warning


# --- Devices


def resolve_device(name: str, key: str = "--device") -> torch.device:
    """The device of this name: cpu, cuda, mps, xpu, or one of several as cuda:1; auto is the accelerator, if
    there is one.

    Raises:
        UserError: under `key`, if there is no such device here.
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
    here = ["cpu"] + ([] if accelerator is None else [accelerator.type])
    if device.type not in here:
        raise UserError(key, f"there is no {device.type} device here; use {' or '.join(here)}, or auto")
    if device.type != "cpu" and (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise UserError(key, f"there is no {name} here; the last is {device.type}:{count - 1}")
    return device


def device_name(device: torch.device) -> str:
    """What the device is called in messages: its type, and its maker's name where torch knows that."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"xpu ({torch.xpu.get_device_name(device)})" if device.type == "xpu" else device.type


def supports(device: torch.device, precision: str) -> bool:
    """Whether the device computes in this precision itself. A CPU computes in any, if slowly."""
    if precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if precision == "bf16" and device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    return precision != "fp64" or device.type in ("cpu", "cuda")  # MPS has none at all, and many an XPU


# --- Precision


def matmul_rate(device: torch.device, dtype: torch.dtype, trials: int = 3) -> float:
    """Floating-point operations per second of a plain square matrix product, the best of some trials: the
    ceiling of a training step."""
    size, seconds = _size_to_measure(device, dtype)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    _product_seconds(a, b, 1)
    repeats = max(1, round(0.03 / seconds))
    return 2 * size**3 * repeats / min(_product_seconds(a, b, repeats) for _ in range(trials))


def _size_to_measure(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """The size of a product that fills the device, or takes about a tenth of a second before, and its
    seconds.

    A CPU without bf16 units needs seconds for what others do in milliseconds. The products run in one thread,
    since several that wait for each other on a busy machine say nothing about its speed.
    """
    num_threads, largest = torch.get_num_threads(), 1024 if device.type == "cpu" else 8192
    size = largest // 8
    torch.set_num_threads(1)
    try:
        while True:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            _product_seconds(a, b, 1)
            seconds = _product_seconds(a, b, 1)
            if size == largest or 8 * seconds > 0.1:
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
    """What is computed in, and why."""

    precision: str
    reason: str = ""
    """Why it is not what was asked for, in words; empty if it is."""
    warning: str = ""
    """That it is slow here; empty if it is not."""


def choose_precision(
    asked: str, saved: str | None, rates: Mapping[str, float], device: str, key: str = "train.precision"
) -> PrecisionChoice:
    """The precision to compute in.

    What was asked for is taken. `auto` is what was saved, if anything was, and else the faster of fp32 and
    bf16 (fp32 where they are close).

    Args:
        asked: auto, fp32, bf16 or fp64.
        saved: what a run began with; None for one that begins.
        rates: of matrix products, in FLOP/s, of each precision that the device supports.
        device: its name, for messages.
        key: the setting, for messages.

    Raises:
        UserError: the device does not support what was asked for or saved.
    """
    if asked == "auto" and saved is None:
        if "bf16" not in rates:
            return PrecisionChoice("fp32", f"chosen, since {device} does not support bf16")
        best, other = CHOICES[::-1] if rates["bf16"] > GAIN * rates["fp32"] else CHOICES
        return PrecisionChoice(
            best, f"chosen: {_gflops(rates[best])} against {_gflops(rates[other])} in {other}"
        )
    precision = saved if asked == "auto" and saved is not None else asked
    way_out = f"{key} auto" if asked != "auto" else f"{key} fp32 and run.change [{key}]"
    if precision not in rates:
        began = "" if asked != "auto" else ", which the run began in"
        raise UserError(key, f"{device} does not support {precision}{began}; use {way_out}")
    fastest = max(rates, key=rates.__getitem__)
    warning, times = "", rates[fastest] / rates[precision]
    if times > SLOW:
        both = f"matrix products reach {_gflops(rates[precision])} in {precision} here, and {_gflops(rates[fastest])} in {fastest}"
        warning = f"{key}: {both}, {times:.0f} times as much; {way_out} is faster"
    return PrecisionChoice(precision, "as the run began" if asked == "auto" else "", warning)


def _gflops(rate: float) -> str:
    return f"{rate / 1e9:.3g} GFLOP/s" if rate < 1e12 else f"{rate / 1e12:.3g} TFLOP/s"


def training_flops_per_token(num_parameters: int) -> int:
    """6 per parameter: two for the forward product, four for the two backward ones."""
    return 6 * num_parameters


# --- Cores and memory


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_threads(environment: Mapping[str, str], cores: int) -> int | None:
    """Threads of a process that a launcher started; None to leave them as they are.

    torchrun and Accelerate set OMP_NUM_THREADS to 1 where the user set nothing, so a 1 from them means each
    process's share of the cores.
    """
    launched = "LOCAL_RANK" in environment or "ACCELERATE_MIXED_PRECISION" in environment
    if not launched or environment.get("OMP_NUM_THREADS", "1") != "1":
        return None
    return max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", "1")))


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot run on a device, in one line: no compiler, no Triton, an old GPU. None where
    it can.

    Found out by compiling the smallest function: its own error would come in the first step.
    """
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device))
    except Exception as error:  # torch's own, the compiler's, Triton's, the file system's
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back to the kernel.

    A training step frees and takes the same large tensors again and again. By default each goes through mmap,
    and its pages are faulted in anew every time, which on a virtual machine costs more than the arithmetic.
    """
    m_mmap_max, m_trim_threshold = -4, -1  # <malloc.h>
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # no glibc: nothing to set
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
