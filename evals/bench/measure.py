"""Turns in rotation, ceilings, memory, and why a contender cannot run.

    contenders {name: turn}  --round_robin-->  {name: Timing}          a turn does the work some times and says the seconds for one

Round after round each contender has one turn, so that whatever else the machine does slows everybody. The first turn warms up (compilation,
autotuning, page faults) outside the clock. A contender that raises is out, with its reason; one that has used up its patience takes no more
turns, and the number of its rounds shows that.
"""

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...common.output import warn
from ...models.dtypes import DTYPES as ALL_DTYPES
from ...pipeline.machine import CHOICES, choose_precision, device_name, measure_rates
from ..memory import synchronize

DTYPES = {name: ALL_DTYPES[name] for name in CHOICES}


def settle_dtype(arguments: Any) -> None:
    """Replace --dtype auto by the faster of fp32 and bf16 on the device; warn where another was asked for that is slow.

    Raises:
        UserError: the device does not support it.
    """
    device = torch.device(arguments.device)
    choice = choose_precision(
        arguments.dtype, None, measure_rates(device, CHOICES), device_name(device), "--dtype"
    )
    arguments.dtype = choice.precision
    if choice.reason:
        print(f"--dtype auto: {choice.precision} ({choice.reason})")
    if choice.warning:
        warn(choice.warning)


class Unavailable(Exception):
    """A contender cannot run here; the message says why and, where there is one, the way out."""


def peer_module(module: str, pip_name: str) -> Any:
    """A module of a peer's package; Unavailable, with the command that helps, where the package is missing."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"the package {package} is missing: pip install {pip_name}")
    return importlib.import_module(module)


def require_cuda(device: torch.device) -> None:
    """Raise Unavailable unless the device is a CUDA GPU."""
    if device.type != "cuda":
        raise Unavailable(f"needs CUDA, this run is on {device.type}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def reason_of(error: Exception) -> str:
    """Why a contender is out, in a line."""
    if isinstance(error, Unavailable):
        return str(error)
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    if is_out_of_memory(error):
        return f"out of memory: {first_line}"
    return f"{type(error).__name__}: {first_line}"


class Stopwatch:
    """A function as a turn: warmed up, then called so often that the clock runs for about `min_seconds`.

    Args:
        prepare: makes the function, inputs included; they live for one turn only, so that contenders need not fit into memory together.
        device: what to wait for.
        min_seconds: of one turn.
    """

    def __init__(self, prepare: Callable[[], Callable[[], object]], device: torch.device, min_seconds: float):
        self.prepare, self.device, self.min_seconds = prepare, device, min_seconds
        self.repeats = 0

    def __call__(self) -> dict[str, float]:
        function = self.prepare()
        warm = self._run(function, 1)
        if not self.repeats:
            once = self._run(function, 1) if warm < 1 else warm  # a slow contender's first call says enough
            self.repeats = max(1, min(1000, round(self.min_seconds / max(once, 1e-9))))
        return {"seconds": self._run(function, self.repeats) / self.repeats}

    def _run(self, function: Callable[[], object], repeats: int) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize(self.device)
        return time.perf_counter() - start


def always(function: Callable[[], object]) -> Callable[[], Callable[[], object]]:
    """For a `Stopwatch` whose function needs no preparation."""
    return lambda: function


@dataclass
class Timing:
    """What the rounds gave for one contender."""

    seconds: list[float] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)
    """Whatever else turns report (peak_bytes): the largest of all rounds."""
    reason: str | None = None
    """Why there are no seconds."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict[str, Any]:
        """As it goes into the record."""
        if self.reason is not None:
            return {"reason": self.reason}
        return {"seconds": self.seconds, "median_seconds": self.median, **self.extra}


Turn = Callable[[], Mapping[str, float]]


def round_robin(turns: Mapping[str, Turn], rounds: int, patience: float, bar: Any) -> dict[str, Timing]:
    """One turn each, round after round.

    Args:
        turns: what to call; each returns {"seconds": of one unit of work, ...}.
        rounds: turns of each contender, at most.
        patience: a contender that has taken this many seconds takes no further turn (it always takes one).
        bar: a tqdm bar, or None; it moves by one for each turn.
    """
    timings = {name: Timing() for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    for round_number in range(rounds):
        for name, turn in turns.items():
            timing = timings[name]
            if bar is not None:
                bar.set_postfix_str(name, refresh=True)
                bar.update()
            if timing.reason is not None or (round_number and spent[name] > patience):
                continue
            start = time.perf_counter()
            try:
                told = dict(turn())
            except (
                Exception
            ) as error:  # whatever a peer raises, the others go on; the reason goes into the record
                timing.reason = reason_of(error)
                continue
            spent[name] += time.perf_counter() - start
            timing.seconds.append(told.pop("seconds"))
            timing.extra = {key: max(value, timing.extra.get(key, value)) for key, value in told.items()}
    return timings


@dataclass(frozen=True)
class Ceiling:
    """Something the machine does as fast as it can."""

    function: Callable[[], object]
    amount: float
    """Bytes or floating-point operations of one call."""
    unit: str


def ceilings(
    device: torch.device, dtype: torch.dtype, num_elements: int, matmul_size: int
) -> dict[str, Ceiling]:
    """The machine's copy (2 tensors of traffic), addition (3; its result is newly allocated, as a peer's is) and matrix product."""
    x, y = (torch.ones(num_elements, device=device, dtype=dtype) for _ in range(2))
    m, n = (torch.ones(matmul_size, matmul_size, device=device, dtype=dtype) for _ in range(2))
    tensor_bytes = num_elements * dtype.itemsize
    return {
        "copy": Ceiling(lambda: x.copy_(y), 2 * tensor_bytes, "bytes/s"),
        "torch.add": Ceiling(lambda: torch.add(x, y), 3 * tensor_bytes, "bytes/s"),
        "matmul": Ceiling(lambda: torch.mm(m, n), 2 * matmul_size**3, "FLOP/s"),
    }


def default_ceilings(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> dict[str, Ceiling]:
    """`ceilings` at sizes that fill the machine, or that take no time."""
    if tiny:
        return ceilings(device, dtype, 2**16, 256)
    return ceilings(
        device, dtype, 2**24 if device.type == "cpu" else 2**28, 1024 if device.type == "cpu" else 8192
    )


def ceiling_rows(measured: Mapping[str, Timing], of: Mapping[str, Ceiling]) -> dict[str, dict[str, Any]]:
    """For the record: rate, unit and rounds of each ceiling."""
    rows = {}
    for name, ceiling in of.items():
        timing = measured[name]
        rate = {} if timing.reason else {"rate": ceiling.amount / timing.median}
        rows[name] = {**rate, "unit": ceiling.unit, **timing.row()}
    return rows
