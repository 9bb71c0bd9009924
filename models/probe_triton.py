"""Whether the Triton kernels can run on a device: found out by running one, before anything depends on it.

A GPU and the package do not suffice. Triton builds its launcher with a C compiler, keeps what it compiles in
a folder that must be writable, and no longer knows every GPU, or every number format on it. All of that shows
in the smallest kernel, which is run once for each process, device and number format, when the first scan
there asks for a backend.
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportAttributeAccessIssue=false
# (triton may be missing, and gives the functions it compiles another meaning)

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .cells_triton import sigmoid
from .tiles_triton import INTERPRETED, Launch, as_stored, jit, tl, triton

SIZE = 32


@jit
def probe_kernel(x, y, SIZE: tl.constexpr):
    """y = sigmoid(x): reads and writes a number format, and has the instruction that only NVIDIA's assembler knows."""
    place = tl.arange(0, SIZE)
    tl.store(y + place, as_stored(sigmoid(tl.load(x + place).to(tl.float32)), y))


def run_probe(x: Tensor) -> None:
    """Run a kernel on x, zeros [SIZE]. Raises whatever Triton raises, and ArithmeticError where the result is wrong."""
    y = torch.full_like(x, torch.nan)
    Launch(probe_kernel, 1, 1, {"x": x, "y": y}, {"SIZE": SIZE}).run()
    if not torch.equal(y, torch.full_like(y, 0.5)):
        raise ArithmeticError("a kernel's result is wrong")


@functools.cache
def _failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """How the probe ended on a device, in one line; None if it passed."""

    def probe() -> str | None:
        x = torch.zeros(
            SIZE, dtype=dtype, device=device
        )  # a device that is out of order, or full, is another matter
        try:
            run_probe(x)
        except Exception as error:  # Triton's own, the compiler's, the driver's, the file system's
            lines = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"
        return None

    with ThreadPoolExecutor(1) as thread:  # where no mode of tracing, autocast or inference is on
        return thread.submit(probe).result()


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on tensors of `dtype` on `device`; None where they can."""
    if triton is None:
        return "the package triton is missing, or older than 3.6"
    if INTERPRETED.value:
        return None
    if device.type != "cuda":
        return f"they run on a GPU (or on the CPU in the interpreter, TRITON_INTERPRET=1), and the tensors are on {device}"
    if torch.version.hip is not None:
        return "they have instructions that only NVIDIA GPUs know"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _failure(torch.device("cuda", index), dtype)
