"""How fast a run is between two of its log lines."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Between two log lines, without the pauses for saving and validating."""

    tokens_per_second: float
    data_seconds: float
    """Seconds per step that this process waited for its data."""
    step_seconds: float


class Throughput:
    """Measures `Rates`.

    Args:
        tokens: that the run has seen before.
    """

    def __init__(self, tokens: int):
        self._tokens, self._clock = tokens, time.perf_counter()
        self._waits: list[float] = []

    def add_wait(self, seconds: float) -> None:
        """Count a step that waited this long for its data."""
        self._waits.append(seconds)

    def measure(self, tokens: int) -> Rates:
        """The rates since the last call, when the run has seen `tokens` in all."""
        now, num_steps = time.perf_counter(), max(len(self._waits), 1)
        seconds = now - self._clock
        rates = Rates((tokens - self._tokens) / seconds, sum(self._waits) / num_steps, seconds / num_steps)
        self._tokens, self._clock, self._waits = tokens, now, []
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time in this context does not count."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start
