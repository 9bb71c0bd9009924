"""All checks and measurements that need a GPU: `minrnn figures gpu --out DIR [--minutes 9]`.

    checks      the GPU backend against fp64, forward and gradients          bench/agreement.py
    fused       scan and fused cell at sizes that fill the GPU               bench/scan.py
    train       about 350M parameters, lengths 512 .. 65,536                 bench/train.py
    scans       every peer's scan at several sizes and lengths               bench/scan.py
    layers      whole layers at equal width, including cuDNN's GRU and LSTM  bench/scan.py
    generate    decoding after contexts up to 1,048,576, with CUDA graphs    bench/generate.py

A machine with torch, triton, transformers, numpy, matplotlib and tqdm is enough. minrnn need not be
installed: `PYTHONPATH=CHECKOUT python -m minrnn.launch.cli figures gpu`. Each section has a share of the
remaining time and writes DIR/SECTION.json while it runs, so an interruption keeps the finished measurements;
DIR/gpu.json records how each section ended. Decoding comes last, since a failed capture of a CUDA graph may
make the process unusable.
"""

import argparse
import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...common.errors import UserError
from ...common.files import user_path, write_json
from ...common.output import warn
from ..bench.agreement import run_checks
from ..bench.command import run_bench
from ..memory import release_memory
from ..record import command_line, commit, machine, versions

NO_SWEEP, NO_LAYERS = ("--lengths", "none"), ("--layers", "none")
BIG = ("--params", "350M", "--layers", "24", "--peers", "llama,mamba2", "--rounds", "3", "--limit", "20")
SECTIONS: dict[str, tuple[float, str, tuple[str, ...]]] = {
    # name: (share of the time, benchmark, its arguments)
    "checks": (2.0, "", ()),
    "fused": (
        1.0,
        "scan",
        ("--shapes", "8x8192x2048,1x65536x2048", "--dtypes", "bf16", *NO_SWEEP, *NO_LAYERS, "--rounds", "3"),
    ),
    "train": (
        2.5,
        "train",
        (*BIG, "--tokens", "16384", "--lengths", "512,2048,8192,65536", "--chunk", "8192"),
    ),
    "scans": (
        1.5,
        "scan",
        (
            "--shapes",
            "8x2048x1024,64x1024x256,1x65536x1024",
            "--lengths",
            "512,4096,32768,65536,1048576",
            *NO_LAYERS,
            "--rounds",
            "3",
        ),
    ),
    "layers": (
        0.5,
        "scan",
        ("--shapes", "none", *NO_SWEEP, "--layers", "64x1000x100,8x1024x1024,8x8192x1024,64x512x512"),
    ),
    "generate": (
        2.0,
        "generate",
        (
            *(*BIG, "--dtype", "bf16", "--contexts", "1024,16384,131072,1048576", "--batches", "1,16"),
            *("--steps", "32", "--read-ours", "131072", "--cuda-graphs"),
        ),
    ),
}
SMALL = ("--rounds", "1", "--min-seconds", "0")
TINY_MODEL = ("--params", "400k", "--layers", "2", "--peers", "none")
TINY: dict[str, tuple[str, ...]] = {
    "checks": (),
    "fused": ("--shapes", "2x64x16", "--dtypes", "bf16", *NO_SWEEP, *NO_LAYERS, *SMALL),
    "train": (*TINY_MODEL, "--tokens", "64", "--lengths", "32", *SMALL),
    "scans": ("--shapes", "2x32x8", "--lengths", "16", "--tokens", "64", *NO_LAYERS, *SMALL),
    "layers": ("--shapes", "none", *NO_SWEEP, "--layers", "2x16x8", *SMALL),
    "generate": (*TINY_MODEL, "--contexts", "32", "--batches", "1", "--steps", "2", *SMALL),
}


class OutOfTime(BaseException):
    """The time of a section is over.

    Not an Exception, since the benchmarks turn those into rows of their tables.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread after so many seconds, if the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        warn("this system has no alarms: the time of the section is not limited")
        yield
        return

    def expire(signal_number: int, frame: Any) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _write(path: Path, value: Any) -> None:
    write_json(path, value)


def _checks(device: torch.device, tiny: bool, out: Path, command: str) -> None:
    """Run the section `checks`."""
    header = {"command": command, "commit": commit(), "machine": machine(device), "versions": versions()}

    def report(rows: list[dict[str, Any]]) -> None:
        failed = [row for row in rows if not row["passed"]]
        _write(
            out,
            {**header, "num_checks": len(rows), "num_failed": len(failed), "failed": failed, "rows": rows},
        )

    run_checks(device, tiny, report)
    result = json.loads(out.read_text())
    print(f"{result['num_checks']} checks, {result['num_failed']} failed")
    for row in result["failed"][:20]:
        print(f"  {json.dumps(row)}")


def run(
    device: torch.device, out: Path, minutes: float, tiny: bool, names: list[str], command: str
) -> dict[str, Any]:
    """Run all sections; returns and writes how each of them ended. The files record `command`."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    summary: dict[str, Any] = {
        "command": command,
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
        "minutes": minutes,
        "sections": {},
    }
    for i, name in enumerate(names):
        share, bench, arguments = SECTIONS[name]
        seconds = (deadline - time.monotonic()) * share / sum(SECTIONS[other][0] for other in names[i:])
        print(f"\n=== {name}: at most {seconds:.0f} s", flush=True)
        path = out / f"{name}.json"
        argv = [*(TINY[name] if tiny else arguments), "--device", device.type, "--out", str(path)]
        work: Callable[[], None] = (
            (lambda path=path: _checks(device, tiny, path, command))
            if not bench
            else (lambda b=bench, a=argv: run_bench(b, a))
        )
        start = time.monotonic()
        try:
            with time_limit(seconds):
                work()
            end = "finished"
        except OutOfTime:
            end = f"cut off after {seconds:.0f} s; what it had is in {path.name}"
        except Exception as error:  # the sections are independent
            traceback.print_exc()
            end = f"failed: {type(error).__name__}: {error}"
        summary["sections"][name] = {"end": end, "seconds": round(time.monotonic() - start, 1)}
        _write(out / "gpu.json", summary)
        gc.collect()
        release_memory(device)
        print(f"=== {name}: {end}", flush=True)
    return summary


def main(argv: list[str]) -> None:
    """Run `minrnn figures gpu`."""
    parser = argparse.ArgumentParser(
        "minrnn figures gpu", description="Run all GPU checks and benchmarks within a time limit."
    )
    parser.add_argument("--out", type=user_path, required=True, help="folder for the results")
    parser.add_argument(
        "--minutes", type=float, default=9, help="limit for all sections together (default: %(default)s)"
    )
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help="sections to run, in order (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for trying the script, with --tiny"
    )
    parser.add_argument("--tiny", action="store_true", help="use sizes that take almost no time")
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.sections.split(",")]
    errors = [
        ("--sections", f"there is no {name!r} (there are {', '.join(SECTIONS)})")
        for name in names
        if name not in SECTIONS
    ]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        errors.append(("--device", "cuda is not available here; --device cpu --tiny tries the script out"))
    if arguments.minutes <= 0:
        errors.append(("--minutes", f"must be more than 0, not {arguments.minutes:g}"))
    if errors:
        raise UserError.from_list(errors)
    command = command_line("minrnn figures gpu", argv)
    device = torch.device(arguments.device)
    summary = run(device, arguments.out, arguments.minutes, arguments.tiny, names, command)
    if any(section["end"].startswith("failed") for section in summary["sections"].values()):
        raise SystemExit(1)
