"""The size of a model with a given number of parameters. The pipeline and the benches use the same search.

A family has a width in steps that suit the hardware and, if it has an MLP or the like, a second size with
finer steps. `find_size` chooses the width so that the fine size can meet the target, and prefers the setting
that is closest to the family's own recommendation. Parameters are counted by the caller, on the meta device.
"""

from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE = 0.02  # relative difference from the target number of parameters
Size = tuple[int, int]  # width, and the fine size (0 if there is none)
NUM_WIDTHS = 9  # widths to try after the first that can reach the target


@dataclass(frozen=True)
class SizeRule:
    """Which sizes a family may have."""

    step: int
    """Widths are multiples of this."""
    fine: Callable[[int], tuple[int, int, int, int]] | None
    """Minimum, recommendation, maximum and step of the fine size for a width; None: there is no fine size."""

    def finest(self) -> "SizeRule":
        """The rule with single steps of the fine size, for small models."""
        fine = self.fine
        return self if fine is None else SizeRule(self.step, lambda width: (*fine(width)[:3], 1))


class NoSizeError(ValueError):
    """No size has the target number of parameters; the message names the nearest."""


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
        count: number of parameters of a size. It rises with both.

    Raises:
        NoSizeError: there is no such size.
    """
    coarse = _candidates(rule, count, target)
    size, number = _best(coarse, target)
    if abs(number - target) <= TOLERANCE * target:
        return size, number
    candidates = [*coarse, *_candidates(rule.finest(), count, target)]
    size, number = _best(candidates, target)
    if abs(number - target) > TOLERANCE * target:
        size, number, _ = min(candidates, key=lambda entry: abs(entry[1] - target))
        fine = f" and a second size of {size[1]:,}" if size[1] else ""
        raise NoSizeError(
            f"no {name} has {target:,} parameters within {TOLERANCE:.0%}; the nearest has {number:,}, with a "
            f"width of {size[0]:,}{fine}"
        )
    return size, number


def _best(candidates: list[tuple[Size, int, float]], target: int) -> tuple[Size, int]:
    """The candidate to use, if any is within TOLERANCE, and its number of parameters."""

    def rank(entry: tuple[Size, int, float]) -> tuple[bool, bool, bool, float]:
        (width, _), number, distance = entry
        error = abs(number - target) / target
        # tensor cores need multiples of 8
        return (error > TOLERANCE, width % 8 != 0, error > TOLERANCE / 4, distance)

    size, number, _ = min(candidates, key=rank)
    return size, number


def _candidates(rule: SizeRule, count: Callable[[Size], int], target: int) -> list[tuple[Size, int, float]]:
    """Sizes near the target: (size, parameters, distance of the setting from the recommended one)."""

    def bounds(width: int) -> tuple[int, int, int, int]:
        return (0, 0, 0, 1) if rule.fine is None else rule.fine(width)

    def largest(steps: int) -> int:
        width = steps * rule.step
        return count((width, bounds(width)[2]))

    low, high = 0, 1
    while largest(high) < target:
        low, high = high, 2 * high
    while high - low > 1:  # find the smallest width that can reach the target
        middle = (low + high) // 2
        low, high = (low, middle) if largest(middle) >= target else (middle, high)
    # A width below may be nearer than all that reach the target.
    first = max(1, high - (1 if rule.fine is not None else NUM_WIDTHS - 1))
    candidates = []
    for width in range(first * rule.step, (high + NUM_WIDTHS) * rule.step, rule.step):
        minimum, recommended, maximum, step = bounds(width)
        smallest = count((width, minimum))
        fine = minimum
        if rule.fine is not None:
            # the number of parameters is affine in the fine size
            slope = (count((width, maximum)) - smallest) / (maximum - minimum)
            steps = round((target - smallest) / slope / step + minimum / step) if slope else 0
            fine = min(max(step * steps, minimum), maximum)
        number = count((width, fine))
        distance = abs(fine / recommended - 1) if recommended else abs(number / target - 1)
        candidates.append(((width, fine), number, distance))
        if smallest > (1 + TOLERANCE) * target:
            break
    return candidates
