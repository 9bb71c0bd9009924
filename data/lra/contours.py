"""Grows the contours of Pathfinder on a grid of taken pixels, in compiled code (numba).

Most attempts to grow two long contours end at the image's edge or at another dash, and are repeated: about
100 times for a Pathfinder image, so an attempt must take microseconds.

A dash is (y, x, shape): where it starts, and the row of `Shapes` with the pixels that it keeps clear. Shapes
0 to 359 are first dashes, in the direction of so many degrees. The others are later dashes: each starts on
the circle around a pivot and points towards the pivot.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from minrnn.models.kernel_cache import keep_on_disk  # absolute: a kernel's hash covers relative imports

FIRST_DASHES = 360
MIN_WEIGHT = 1e-4  # of all directions together, below which a contour has reached a dead end
MAX_PLACES = 50  # tried for the first dash of a distractor
MAX_DISTRACTOR_TRIALS = 5


class Shapes(NamedTuple):
    """The dashes of an image's parameters. With k later dashes there are 360 + k shapes."""

    clear: np.ndarray
    """int64 [360 + k, m, 2], offsets (y, x) from the start; a shape has `num_clear` of them"""
    num_clear: np.ndarray
    """int64 [360 + k]"""
    heads: np.ndarray
    """int64 [k, 2], starts of the later dashes, relative to the pivot"""
    angles: np.ndarray
    """float [k], directions from the pivot to these"""


class Layout(NamedTuple):
    """Numbers that growing needs; see `pathfinder.Parameters`."""

    edge: int
    """Pixels of the grid around the image, all taken."""
    size: int
    dash_length: int
    margin: int
    continuity: float
    contour_length: int
    seed_distance: int
    distractor_length: int


def _kernel(function: Callable) -> Any:
    """Decorator: compile at the first call; keep it on disk."""
    dispatcher = numba.njit(function)
    is_compiled = hasattr(dispatcher, "py_func")  # not with NUMBA_DISABLE_JIT
    return keep_on_disk(dispatcher) if is_compiled else dispatcher


@numba.njit
def _shifted(coordinate, offset):
    return math.floor(coordinate + offset + 0.5)


@numba.njit
def _is_clear(taken, shapes, y, x, shape):
    for i in range(shapes.num_clear[shape]):
        if taken[y + shapes.clear[shape, i, 0], x + shapes.clear[shape, i, 1]]:
            return False
    return True


@numba.njit
def _take(taken, shapes, dash, count):
    for i in range(shapes.num_clear[dash[2]]):
        taken[dash[0] + shapes.clear[dash[2], i, 0], dash[1] + shapes.clear[dash[2], i, 1]] += count


@numba.njit
def _start(taken, shapes, layout, y, x, degrees, dash):
    """Write and take a first dash; returns the pivot and the angle after it."""
    dash[0], dash[1], dash[2] = y, x, degrees
    _take(taken, shapes, dash, 1)
    angle = math.radians(float((degrees + 180) % 360 - 180))
    reach = layout.dash_length + layout.margin
    return _shifted(y, reach * math.sin(angle)), _shifted(x, reach * math.cos(angle)), angle


@numba.njit
def _grow(taken, shapes, layout, generator, last, dash, y, x, angle):
    """Write and take the dash after `last` at the pivot (y, x); returns (is there room, pivot, angle).

    The direction is drawn with weight cos(continuity * |turn|)^2 from those that keep clear. Only the last
    dash may be closer: they share the gap.
    """
    count = len(shapes.angles)
    weights = np.zeros(count)
    _take(taken, shapes, last, -1)
    for k in range(count):
        turn = abs(shapes.angles[k] - angle)
        turn = min(turn, 2 * math.pi - turn) * layout.continuity
        if turn < math.pi / 2 and _is_clear(
            taken, shapes, y + shapes.heads[k, 0], x + shapes.heads[k, 1], FIRST_DASHES + k
        ):
            weights[k] = math.cos(turn) ** 2
    _take(taken, shapes, last, 1)
    total = weights.sum()
    if total < MIN_WEIGHT:
        return False, y, x, angle
    rest, k = generator.random() * total, -1
    while rest >= 0.0 and k < count - 1:
        k += 1
        rest -= weights[k]
    while weights[k] == 0.0:  # after rounding
        k -= 1
    dash[0], dash[1], dash[2] = y + shapes.heads[k, 0], x + shapes.heads[k, 1], FIRST_DASHES + k
    _take(taken, shapes, dash, 1)
    angle = shapes.angles[k]
    y, x = (
        _shifted(dash[0], layout.margin * math.sin(angle)),
        _shifted(dash[1], layout.margin * math.cos(angle)),
    )
    return True, y, x, angle


@_kernel
def grow_targets(taken, shapes, layout, generator, dashes):
    """One attempt at the two long contours, grown in turns; returns whether both got their length.

    Args:
        taken: int32 [size + 2 edge, size + 2 edge]: how many dashes keep a pixel clear. Is changed.
        dashes: int64 [2, contour_length, 3], for the result. The first contour starts in the middle of the
            image, the second seed_distance away.
    """
    border = layout.edge + 2 * layout.seed_distance
    room = layout.size - 4 * layout.seed_distance
    y, x = border + generator.integers(0, room), border + generator.integers(0, room)
    pivots = np.zeros((2, 2), np.int64)
    angles = np.zeros(2)
    for i in range(2):
        degrees = generator.integers(0, 360)
        if not _is_clear(taken, shapes, y, x, degrees):
            return False
        pivots[i, 0], pivots[i, 1], angles[i] = _start(taken, shapes, layout, y, x, degrees, dashes[i, 0])
        away = math.radians(float(generator.integers(0, 360)))
        y = _shifted(y, layout.seed_distance * math.sin(away))
        x = _shifted(x, layout.seed_distance * math.cos(away))
    for step in range(1, layout.contour_length):
        for i in range(2):
            has_room, pivots[i, 0], pivots[i, 1], angles[i] = _grow(
                taken,
                shapes,
                layout,
                generator,
                dashes[i, step - 1],
                dashes[i, step],
                pivots[i, 0],
                pivots[i, 1],
                angles[i],
            )
            if not has_room:
                return False
    return True


@_kernel
def grow_distractor(taken, shapes, layout, generator, dashes):
    """A short contour at a random place; returns whether there was room for one.

    Args:
        taken: as in `grow_targets`; is unchanged without room.
        dashes: int64 [distractor_length, 3], for the result.
    """
    for _ in range(MAX_DISTRACTOR_TRIALS):
        degrees, y, x, is_found = generator.integers(0, 360), 0, 0, False
        for _ in range(MAX_PLACES):
            y = layout.edge + generator.integers(0, layout.size)
            x = layout.edge + generator.integers(0, layout.size)
            is_found = _is_clear(taken, shapes, y, x, degrees)
            if is_found:
                break
        if not is_found:
            continue
        y, x, angle = _start(taken, shapes, layout, y, x, degrees, dashes[0])
        step = 1
        while step < layout.distractor_length:
            has_room, y, x, angle = _grow(
                taken, shapes, layout, generator, dashes[step - 1], dashes[step], y, x, angle
            )
            if not has_room:
                break
            step += 1
        if step == layout.distractor_length:
            return True
        for i in range(step):
            _take(taken, shapes, dashes[i], -1)
    return False
