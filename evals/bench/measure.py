"""Rotation of turns, ceilings, and reasons why a contender cannot run.

    contenders {name: turn}  --round_robin-->  {name: Timing}

A turn repeats the work and returns the seconds of one repetition.

In each round every contender has one turn, so other load on the machine slows all of them. The first turn
warms up (compilation, autotuning, page faults) outside the clock. A contender that raises is out, with its
reason. One that has used up its time limit gets no more turns; the number of its rounds shows that.
"""

import contextlib
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from ...common.output import warn
from ...models.dtypes import DTYPES as ALL_DTYPES
from ...pipeline.machine import CHOICES, choose_precision, device_name, measure_rates
from ..memory import synchronize

IDLE_PERIOD, IDLE_LIMIT = 0.2, 20.0  # seconds, of `when_idle`
DTYPES = {name: ALL_DTYPES[name] for name in CHOICES}


def resolve_dtype(arguments: Any) -> None:
    """Replace --dtype auto by the faster of fp32 and bf16 on the device; warn if a requested dtype is slow.

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
    """A contender cannot run here; the message says why and, if possible, what to do."""


def peer_module(module: str, pip_name: str) -> Any:
    """Import a module of a peer's package; if it is missing, Unavailable with the command that installs
    it.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"the package {package} is missing: pip install {pip_name}")
    return importlib.import_module(module)


def require_cuda(device: torch.device) -> None:
    """Raise Unavailable unless the device is a CUDA GPU."""
    if device.type != "cuda":
        raise Unavailable(f"needs CUDA, this run is on {device.type}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def failure_reason(error: Exception) -> str:
    """The reason why a contender is out, in one line."""
    if isinstance(error, Unavailable):
        return str(error)
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    if is_out_of_memory(error):
        return f"out of memory: {first_line}"
    return f"{type(error).__name__}: {first_line}"


class Stopwatch:
    """A turn that warms a function up, then calls it so often that the clock runs for about `min_seconds`.

    Args:
        prepare: makes the function with its inputs, which exist for one turn only, so that contenders need
            not fit into memory together.
        device: to wait for.
        min_seconds: of one turn.
    """

    def __init__(self, prepare: Callable[[], Callable[[], object]], device: torch.device, min_seconds: float):
        self.prepare, self.device, self.min_seconds = prepare, device, min_seconds
        self.repeats = 0

    def __call__(self) -> dict[str, float]:
        function = self.prepare()
        warm = self._run(function, 1)
        if not self.repeats:
            once = self._run(function, 1) if warm < 1 else warm  # one call of a slow contender is enough
            self.repeats = max(1, min(1000, round(self.min_seconds / max(once, 1e-9))))
        return {"seconds": self._run(function, self.repeats) / self.repeats}

    def _run(self, function: Callable[[], object], repeats: int) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize(self.device)
        return time.perf_counter() - start


def without_preparation(function: Callable[[], object]) -> Callable[[], Callable[[], object]]:
    """The `prepare` of a `Stopwatch` for a function that needs none."""
    return lambda: function


@dataclass
class Timing:
    """The measurements of one contender."""

    seconds: list[float] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)
    """Other values that turns report (peak_bytes): the maximum over all rounds."""
    reason: str | None = None
    """Why there are no seconds, or None."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict[str, Any]:
        """The fields for the record."""
        if self.reason is not None:
            return {"reason": self.reason}
        return {"seconds": self.seconds, "median_seconds": self.median, **self.extra}


Turn = Callable[[], Mapping[str, float]]


def round_robin(turns: Mapping[str, Turn], rounds: int, limit: float, bar: Any) -> dict[str, Timing]:
    """Give each contender one turn, round after round.

    Args:
        turns: each returns {"seconds": of one unit of work, ...}.
        rounds: maximum number of turns of each contender.
        limit: a contender that has used this many seconds gets no further turn (but always one).
        bar: a tqdm bar, or None; it advances by one per turn.
    """
    timings = {name: Timing() for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    for round_number in range(rounds):
        for name, turn in turns.items():
            timing = timings[name]
            if bar is not None:
                bar.set_postfix_str(name, refresh=True)
                bar.update()
            if timing.reason is not None or (round_number and spent[name] > limit):
                continue
            start = time.perf_counter()
            try:
                result = dict(turn())
            except Exception as error:  # any error of a peer goes into the record; the others continue
                timing.reason = failure_reason(error)
                continue
            spent[name] += time.perf_counter() - start
            timing.seconds.append(result.pop("seconds"))
            timing.extra = {key: max(value, timing.extra.get(key, value)) for key, value in result.items()}
    return timings


def when_idle(turn: Turn) -> Turn:
    """The same turn, begun when this process and its workers use hardly any processor time, so have
    finished what the turns before it have left; or after IDLE_LIMIT."""

    def begin() -> Mapping[str, float]:
        end, before = time.monotonic() + IDLE_LIMIT, -math.inf
        while (now := _seconds_used()) - before > 0.1 * IDLE_PERIOD and time.monotonic() < end:
            before = now
            time.sleep(IDLE_PERIOD)
        return turn()

    return begin


def _seconds_used() -> float:
    """Processor time of this process and those below it, in seconds."""
    current, seconds = psutil.Process(), 0.0
    for process in (current, *current.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


@dataclass(frozen=True)
class Ceiling:
    """An operation that shows the maximum speed of the machine."""

    function: Callable[[], object]
    amount: float
    """Bytes or floating-point operations of one call."""
    unit: str


def ceilings(
    device: torch.device, dtype: torch.dtype, num_elements: int, matmul_size: int
) -> dict[str, Ceiling]:
    """The machine's copy (traffic of 2 tensors), addition (3; it allocates its result, as peers do) and
    matrix product.
    """
    x, y = (torch.ones(num_elements, device=device, dtype=dtype) for _ in range(2))
    m, n = (torch.ones(matmul_size, matmul_size, device=device, dtype=dtype) for _ in range(2))
    tensor_bytes = num_elements * dtype.itemsize
    return {
        "copy": Ceiling(lambda: x.copy_(y), 2 * tensor_bytes, "bytes/s"),
        "torch.add": Ceiling(lambda: torch.add(x, y), 3 * tensor_bytes, "bytes/s"),
        "matmul": Ceiling(lambda: torch.mm(m, n), 2 * matmul_size**3, "FLOP/s"),
    }


def default_ceilings(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> dict[str, Ceiling]:
    """`ceilings` at sizes that fill the machine, or at tiny ones."""
    if tiny:
        return ceilings(device, dtype, 2**16, 256)
    is_cpu = device.type == "cpu"
    return ceilings(device, dtype, 2**24 if is_cpu else 2**28, 1024 if is_cpu else 8192)


def ceiling_rows(measured: Mapping[str, Timing], of: Mapping[str, Ceiling]) -> dict[str, dict[str, Any]]:
    """Rate, unit and rounds of each ceiling, for the record."""
    rows = {}
    for name, ceiling in of.items():
        timing = measured[name]
        rate = {} if timing.reason else {"rate": ceiling.amount / timing.median}
        rows[name] = {**rate, "unit": ceiling.unit, **timing.row()}
    return rows
