"""Whether the Triton kernels can run on a device, tested by running a small one.

A GPU and the package are not enough. Triton builds its launcher with a C compiler, writes compiled kernels to
a folder, and does not support every GPU, or every number format on it. The smallest kernel depends on all of
this. It runs once per process, device and number format, when the first scan there chooses a backend.
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportAttributeAccessIssue=false
# (triton may be missing, and gives the functions it compiles another meaning)

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .launches_triton import Launch
from .minimal_coefficients_triton import sigmoid
from .tiles_triton import INTERPRETED, as_stored, jit, tl, triton

SIZE = 32


@jit
def probe_kernel(x, y, SIZE: tl.constexpr):
    """y = sigmoid(x): reads and writes a number format, and uses the kernels' NVIDIA-only instruction."""
    offset = tl.arange(0, SIZE)
    tl.store(y + offset, as_stored(sigmoid(tl.load(x + offset).to(tl.float32)), y))


def run_probe(x: Tensor) -> None:
    """Run a kernel on x, zeros [SIZE]. Raises Triton's error, or ArithmeticError if the result is wrong."""
    y = torch.full_like(x, torch.nan)
    Launch(probe_kernel, 1, 1, {"x": x, "y": y}, {"SIZE": SIZE}).run()
    if not torch.equal(y, torch.full_like(y, 0.5)):
        raise ArithmeticError("a kernel's result is wrong")


@functools.cache
def _failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """The probe's error on a device, in one line; None if it passed."""

    def probe() -> str | None:
        # Outside of the try block: a broken or full device is another error.
        x = torch.zeros(SIZE, dtype=dtype, device=device)
        try:
            run_probe(x)
        except Exception as error:  # Triton's own, the compiler's, the driver's, the file system's
            lines = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"
        return None

    with ThreadPoolExecutor(1) as thread:  # without the caller's tracing, autocast or inference mode
        return thread.submit(probe).result()


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on tensors of `dtype` on `device`; None if they can."""
    if triton is None:
        return "the package triton is missing, or older than 3.6"
    if INTERPRETED.value:
        return None
    if device.type != "cuda":
        return (
            "they run on a GPU (or on the CPU in the interpreter, TRITON_INTERPRET=1), "
            f"and the tensors are on {device}"
        )
    if torch.version.hip is not None:
        return "they have instructions that only NVIDIA GPUs know"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _failure(torch.device("cuda", index), dtype)
