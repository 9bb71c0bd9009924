"""What a run prints to stderr: on a terminal a progress bar, elsewhere whole lines.

    terminal   messages above a progress bar with the loss and the rate
    otherwise  messages, and a line for each line of metrics.jsonl: nothing moves the cursor back

`--quiet` leaves warnings and errors. `--verbose` adds the lines on a terminal, the phases of the set-up with
their times, and the libraries' warnings.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

Verbosity = Literal["quiet", "normal", "verbose"]
OPTIONS: dict[str, Verbosity] = {"--quiet": "quiet", "--verbose": "verbose"}
UNITS = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days"))
SHOWN_WAITING = 0.03  # of the time of a step: the progress bar says when waiting for data takes more


@dataclass(frozen=True)
class StepLine:
    """A step, as a line of the log or beside the progress bar."""

    step: int
    num_steps: int
    loss: float
    tokens_per_second: float
    matmul_fraction: float
    """Of the rate of matrix products that the step reaches."""
    waiting: float
    """Fraction of the time that the slowest process waits for its data."""
    peak_memory: int
    """Bytes of the process that takes the most: allocated by torch on a GPU, resident on the CPU."""
    seconds_left: float

    def line(self) -> str:
        """All of it."""
        return (
            f"step {self.step}/{self.num_steps}: loss {self.loss:.4f}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.matmul_fraction:.1%} of the matrix-product rate, "
            f"waits for data {self.waiting:.0%}, peak memory {self.peak_memory / 1e9:.2f} GB, "
            f"{in_words(self.seconds_left)} left"
        )

    def beside_the_bar(self) -> str:
        """What the bar does not show itself."""
        message = f"loss {self.loss:.3f}, {self.tokens_per_second:,.0f} tokens/s"
        return message + (f", waits for data {self.waiting:.0%}" if self.waiting > SHOWN_WAITING else "")


def take_verbosity(argv: list[str]) -> tuple[list[str], Verbosity]:
    """The other arguments, and the verbosity that `--quiet` or `--verbose` chooses; the last one decides."""
    chosen: list[Verbosity] = ["normal", *(OPTIONS[word] for word in argv if word in OPTIONS)]
    return [word for word in argv if word not in OPTIONS], chosen[-1]


class SetUpPhases:
    """Prints each phase of the set-up when it ends, with its seconds."""

    def __init__(self) -> None:
        self._phase, self._start = "", time.monotonic()

    def __call__(self, phase: str, is_set_up: bool) -> None:
        """A phase begins."""
        now = time.monotonic()
        if self._phase:
            print(f"{self._phase}: {now - self._start:.1f} s", file=sys.stderr)
        self._phase, self._start = phase if is_set_up else "", now


def reporter(verbosity: Verbosity) -> Callable[[str], object]:
    """A function that prints a message, above a progress bar if there is one; or does not, if quiet."""
    if verbosity == "quiet":
        return lambda message: None
    return lambda message: tqdm.write(message, file=sys.stderr)


class RunLog:
    """The log of the main process.

    Args:
        num_steps, step: of the whole run, and those already taken.
    """

    def __init__(self, verbosity: Verbosity, num_steps: int, step: int):
        self._report, is_terminal = reporter(verbosity), sys.stderr.isatty()
        self._has_lines = verbosity == "verbose" or not is_terminal
        self._bar: Any = None
        if is_terminal and verbosity != "quiet":
            self._bar = tqdm(total=num_steps, initial=step, unit="step", dynamic_ncols=True)

    def report(self, message: str) -> None:
        """Print a message, above the progress bar if there is one."""
        self._report(message)

    def advance(self) -> None:
        """A step was taken."""
        if self._bar is not None:
            self._bar.update()

    def show(self, line: StepLine) -> None:
        """Show a step that metrics.jsonl has, too."""
        if self._has_lines:
            self.report(line.line())
        if self._bar is not None:
            self._bar.set_postfix_str(line.beside_the_bar(), refresh=False)

    def close(self) -> None:
        """Leave the progress bar as it is."""
        if self._bar is not None:
            self._bar.close()


def in_words(seconds: float) -> str:
    """`about 3 min`, in the largest unit of which there are at least 1.5."""
    size, unit = next(((size, unit) for size, unit in reversed(UNITS) if seconds >= 1.5 * size), UNITS[0])
    return f"about {max(1, round(seconds / size))} {unit}"
