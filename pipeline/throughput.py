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
    usual_step_seconds: float
    """As step_seconds, without the first step of a start, which compiles, if there was another."""


class Throughput:
    """Measures `Rates`.

    Args:
        tokens: that the run has seen before.
    """

    def __init__(self, tokens: int):
        self._tokens, self._clock = tokens, time.perf_counter()
        self._waits: list[float] = []
        self._first_seconds: float | None = None
        """Of the first step, with the wait for the second, in the first interval; then 0."""

    def add_wait(self, seconds: float) -> None:
        """Count a step that has waited this long for its data and now begins."""
        if self._first_seconds is None and self._waits:
            self._first_seconds = time.perf_counter() - self._clock
        self._waits.append(seconds)

    def measure(self, tokens: int) -> Rates:
        """The rates since the last call, when the run has seen `tokens` in all."""
        now, num_steps = time.perf_counter(), max(len(self._waits), 1)
        seconds = now - self._clock
        usual = (
            (seconds - self._first_seconds) / (num_steps - 1) if self._first_seconds else seconds / num_steps
        )
        rates = Rates(
            tokens_per_second=(tokens - self._tokens) / seconds,
            data_seconds=sum(self._waits) / num_steps,
            step_seconds=seconds / num_steps,
            usual_step_seconds=usual,
        )
        self._tokens, self._clock, self._waits, self._first_seconds = tokens, now, [], 0.0
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time in this context does not count."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start
