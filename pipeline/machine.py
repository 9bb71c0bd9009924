"""What the machine can do, to hold the training's speed against; and one setting that its allocator needs."""

import ctypes
import time

import torch


def matmul_rate(device: torch.device, dtype: torch.dtype, trials: int = 3) -> float:
    """Floating-point operations per second of a plain square matrix product, the best of some trials: the ceiling of a training step."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    run(1)
    repeats = max(1, round(0.03 / max(run(1), 1e-9)))
    return 2 * size**3 * repeats / min(run(repeats) for _ in range(trials))


def training_flops_per_token(num_parameters: int) -> int:
    """6 per parameter: two for the forward product, four for the two backward ones."""
    return 6 * num_parameters


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back to the kernel.

    A training step frees and takes the same large tensors again and again. By default each goes through mmap, and its pages are faulted in
    anew every time, which on a virtual machine costs more than the arithmetic.
    """
    m_mmap_max, m_trim_threshold = -4, -1  # <malloc.h>
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # no glibc: nothing to set
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
