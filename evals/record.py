"""What every results file says about its making: command, commit, machine, versions.

No host names, no paths.
"""

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

UNITS = (
    *(
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
    ),
    *("asimd", "neon", "sve", "sve2", "bf16", "svebf16", "i8mm", "sme"),
)
PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "numba", "datasets"),
    *(
        "minGRU-pytorch",
        "mambapy",
        "accelerated-scan",
        "flash-linear-attention",
        "mamba-ssm",
        "causal-conv1d",
    ),
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
    """Those of a CPU's features (a line of /proc/cpuinfo) that decide how fast it multiplies."""
    present = set(flags.split())
    return [unit for unit in UNITS if unit in present]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return torch.backends.cpu.get_cpu_capability().lower()
    return next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")


def machine(device: torch.device) -> dict[str, Any]:
    """What the bench ran on."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cpu_units": cpu_units(_cpu_flags()),
        "cores": num_cores(),
    }
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        found["cpu_units_limit"] = limit  # of the library that multiplies
    found |= {"threads": torch.get_num_threads(), "gpu": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
        found["gpu"]["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str | None]:
    """Of python and of every package that matters; None for one that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


# What a measurement writes into the checkout: the second bench of a series is as clean as the first.
_WRITTEN_BY_EVALS = (":(exclude,top)evals/results", ":(exclude,top)docs/quickstart.png")


def commit() -> str | None:
    """The checkout's commit; None outside a checkout.

    A `+` behind it marks a checkout whose files differ from that commit, changed or new (results of earlier
    measurements aside): what was measured cannot be found again. No such record is committed
    (tests/evals/test_results.py).
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
    """What was typed, but for where the result went; local paths by their last part."""
    kept, words = [], iter(argv)
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            kept.append(option + equals + public_value(value))
    return shlex.join([*command.split(), *kept])
