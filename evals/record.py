"""The origin that every results file records: command, commit, machine, versions. No host names, no paths."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..pipeline.machine import num_cores
from ..pipeline.public import public_value

# Features of x86 and of ARM CPUs.
UNITS = (
    *[
        "avx",
        "avx2",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_bf16",
        "amx_fp16",
    ],
    *["asimd", "neon", "sve", "sve2", "bf16", "svebf16", "i8mm", "sme"],
)
PACKAGES = (
    *["torch", "triton", "transformers", "numpy", "numba", "datasets"],
    *[
        "minGRU-pytorch",
        "mambapy",
        "accelerated-scan",
        "flash-linear-attention",
        "mamba-ssm",
        "causal-conv1d",
    ],
)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def cpu_units(flags: str) -> list[str]:
    """The features of a CPU (a line of /proc/cpuinfo) that determine its speed of multiplication."""
    present = set(flags.split())
    return [unit for unit in UNITS if unit in present]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return torch.backends.cpu.get_cpu_capability().lower()
    return next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware of a measurement."""
    hardware: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cpu_units": cpu_units(_cpu_flags()),
        "cores": num_cores(),
    }
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        hardware["cpu_units_limit"] = limit  # of oneDNN, torch's library for matrix products
    hardware |= {"threads": torch.get_num_threads(), "gpu": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
        hardware["gpu"]["cuda"] = torch.version.cuda
    return hardware


def versions() -> dict[str, str | None]:
    """Versions of Python and of the relevant packages; None for a missing package."""
    by_package: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_package[package] = None
    return by_package


# Files that measurements write into the checkout; they do not mark a commit as changed.
_WRITTEN_BY_EVALS = (":(exclude,top)evals/results", ":(exclude,top)docs/quickstart.png")


def commit() -> str | None:
    """The checkout's commit; None outside a checkout.

    A trailing `+` marks a checkout with changed or new files (other than results), whose code cannot be found
    again. Such records are not committed (tests/evals/test_results.py).
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = [*git, "status", "--porcelain", "--", ":(top)", *_WRITTEN_BY_EVALS]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def command_line(command: str, argv: Sequence[str]) -> str:
    """The command as typed, without --out; local paths are reduced to their last part."""
    recorded, words = [], iter(argv)
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            recorded.append(option + equals + public_value(value))
    return shlex.join([*command.split(), *recorded])
