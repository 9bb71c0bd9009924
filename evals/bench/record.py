"""What a bench leaves behind: a JSON file that says all that was run, a table, a plot.

    {"bench", "command", "commit", "time", "machine", "versions", "config", "ceilings", "rows"}

Each row is one contender at one point, with every round's seconds, or with the reason why it could not run. The file is written anew after
every section, so that a run that is cut off leaves what it had. No host names, no paths.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...common.files import replace
from ...pipeline.machine import num_cores
from ...pipeline.public import public_config, public_value

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

    A `+` behind it marks a checkout whose files differ from that commit, changed or new (results of earlier measurements aside): what was
    measured cannot be found again. No such record is committed (tests/evals/test_results.py).
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


class Record:
    """The growing result of one bench.

    Args:
        bench: its name.
        argv: its arguments, as typed.
        config: every setting, resolved.
        device: what it runs on.
        out: the JSON file; the plot goes beside it.
    """

    def __init__(
        self, bench: str, argv: Sequence[str], config: dict[str, Any], device: torch.device, out: Path
    ):
        self.out = out
        self.data: dict[str, Any] = {
            "bench": bench,
            "command": command_line(f"minrnn bench {bench}", argv),
            "commit": commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(device),
            "versions": versions(),
            "config": public_config({key: value for key, value in config.items() if key != "out"}),
            "ceilings": {},
            "rows": [],
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """More rows, on disk at once."""
        self.rows.extend(rows)
        self.write()

    def write(self) -> None:
        """Replace the file by what is known now."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        replace(self.out, json.dumps(self.data, indent=1) + "\n")

    def finish(self, draw: Callable[[Any, list[dict[str, Any]]], None]) -> None:
        """Write the file and the plot; `draw(figure, rows)` fills the latter."""
        self.write()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        draw(figure, [row for row in self.rows if "reason" not in row])
        machine = self.data["machine"]
        where = (
            machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
        )
        figure.suptitle(
            f"{self.data['command']}\n{where}, torch {self.data['versions']['torch']}", fontsize=8
        )
        FigureCanvasAgg(figure).print_png(str(self.out.with_suffix(".png")))
        print(f"\n{self.out} and {self.out.with_suffix('.png').name} written")


def table(
    rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]], title: str
) -> str:
    """Rows as text under a title; a row with a reason shows that instead of numbers."""
    names = list(columns)
    lines = [
        [columns[names[0]](row), *(columns[name](row) if "reason" not in row else "" for name in names[1:])]
        for row in rows
    ]
    widths = (
        [max(len(name), *(len(line[i]) for line in lines)) for i, name in enumerate(names)] if lines else []
    )
    out = [
        f"\n{title}",
        "  ".join(
            name.ljust(w) if i == 0 else name.rjust(w)
            for i, (name, w) in enumerate(zip(names, widths, strict=False))
        ),
    ]
    for row, line in zip(rows, lines, strict=True):
        first = line[0].ljust(widths[0])
        rest = (
            f"- {row['reason']}"
            if "reason" in row
            else "  ".join(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))
        )
        out.append(f"{first}  {rest}")
    return "\n".join(out)


def si(value: float | None, unit: str = "") -> str:
    """1234567 -> 1.23M; bytes in powers of ten like everything else."""
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}"
