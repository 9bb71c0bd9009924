"""The size of a model with a given number of parameters. The pipeline and the benches use the same search.

A family has a width in steps that suit the hardware and, if it has an MLP or the like, a second size with
finer steps. `find_size` chooses the width so that the fine size can meet the target, and prefers the setting
that is closest to the family's own recommendation. Parameters are counted by the caller, on the meta device.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE = 0.02  # relative difference from the target number of parameters
Size = tuple[int, int]  # width, and the fine size (0 if there is none)
NUM_WIDTHS = 9  # widths to try after the first that can reach the target
MAX_INVALID = 256  # widths in a row that may be invalid


@dataclass(frozen=True)
class SizeRule:
    """Which sizes a family may have."""

    step: int
    """Widths are multiples of this."""
    fine: Callable[[int], tuple[int, int, int, int]] | None
    """Minimum, recommendation, maximum and step of the fine size for a width; None: there is no fine size."""
    finest_step: int | None = None
    """Of widths, if no multiple of `step` meets the target; None for the same."""

    def finest(self) -> "SizeRule":
        """The rule with the smallest steps, for small models."""
        fine, step = self.fine, self.finest_step or self.step
        return SizeRule(step, None if fine is None else lambda width: (*fine(width)[:3], 1))


class NoSizeError(ValueError):
    """No size has the target number of parameters; the message names the nearest."""


class InvalidSizeError(ValueError):
    """A family cannot have a size, e.g. because heads do not divide its width; the message says why."""


def mlp(
    ratio: float, step: int = 8, smallest: float = 0.5, largest: float = 2.0
) -> Callable[[int], tuple[int, int, int, int]]:
    """The fine size of an MLP: from `smallest` to `largest` times the recommended `ratio` times the width."""

    def bounds(width: int) -> tuple[int, int, int, int]:
        minimum, maximum = (step * int(part * ratio * width / step) for part in (smallest, largest))
        return max(minimum, step), int(ratio * width), max(maximum, 2 * step), step

    return bounds


def find_size(name: str, rule: SizeRule, count: Callable[[Size], int], target: int) -> tuple[Size, int]:
    """The size whose number of parameters is closest to `target`, within TOLERANCE; and that number.

    Args:
        name: of the model, for the message.
        count: number of parameters of a size. It rises with both, and may raise InvalidSizeError.

    Raises:
        NoSizeError: there is no such size.
        InvalidSizeError: no size near the target is valid.
    """
    candidates: list[Candidate] = []
    for steps in (rule, rule.finest()):
        candidates += _candidates(steps, count, target)
        size, number, _ = min(candidates, key=lambda candidate: _rank(candidate, target))
        if abs(number - target) <= TOLERANCE * target:
            return size, number
    size, number, _ = min(candidates, key=lambda candidate: abs(candidate[1] - target))
    fine = f" and a second size of {size[1]:,}" if size[1] else ""
    raise NoSizeError(
        f"no {name} has {target:,} parameters within {TOLERANCE:.0%}; the nearest has {number:,}, with a "
        f"width of {size[0]:,}{fine}"
    )


Candidate = tuple[Size, int, float]
"""Size, number of parameters, distance of the setting from the recommended one."""


def _rank(candidate: Candidate, target: int) -> tuple[bool, bool, bool, float]:
    """The smallest is the candidate to use."""
    (width, _), number, distance = candidate
    error = abs(number - target) / target
    # tensor cores need multiples of 8
    return (error > TOLERANCE, width % 8 != 0, error > TOLERANCE / 4, distance)


def _candidates(rule: SizeRule, count: Callable[[Size], int], target: int) -> list[Candidate]:
    """Sizes near the target, at least one."""
    low, high = 0, 1
    while _largest(rule, count, high) < target:
        low, high = high, 2 * high
    while high - low > 1:  # find the smallest width that can reach the target
        middle = (low + high) // 2
        low, high = (low, middle) if _largest(rule, count, middle) >= target else (middle, high)
    # A width below may be nearer than all that reach the target.
    first = max(1, high - (1 if rule.fine is not None else NUM_WIDTHS - 1))
    candidates: list[Candidate] = []
    steps = first
    while steps < high + NUM_WIDTHS or not candidates:
        candidate = _candidate(rule, count, steps * rule.step, target)
        if candidate is not None:
            candidates.append(candidate)
            if candidate[1] > (1 + TOLERANCE) * target:
                break
        steps += 1
    return candidates


def _bounds(rule: SizeRule, width: int) -> tuple[int, int, int, int]:
    return (0, 0, 0, 1) if rule.fine is None else rule.fine(width)


def _largest(rule: SizeRule, count: Callable[[Size], int], steps: int) -> int:
    """The largest number of parameters at a width, or at the next that is valid.

    Raises:
        InvalidSizeError: none of the following widths is.
    """
    last = (steps + MAX_INVALID) * rule.step
    for width in range(steps * rule.step, last, rule.step):
        with contextlib.suppress(InvalidSizeError):
            return count((width, _bounds(rule, width)[2]))
    return count((last, _bounds(rule, last)[2]))


def _candidate(rule: SizeRule, count: Callable[[Size], int], width: int, target: int) -> Candidate | None:
    """The size of a width that is nearest to the target; None if the width is not valid."""
    minimum, recommended, maximum, step = _bounds(rule, width)
    try:
        number, fine = count((width, minimum)), minimum
        if rule.fine is not None:
            # the number of parameters is affine in the fine size
            slope = (count((width, maximum)) - number) / (maximum - minimum)
            steps = round((target - number) / slope / step + minimum / step) if slope else 0
            fine = min(max(step * steps, minimum), maximum)
            number = count((width, fine))
    except InvalidSizeError:
        return None
    distance = abs(fine / recommended - 1) if recommended else abs(number / target - 1)
    return (width, fine), number, distance
