"""Pathfinder: are the two marked ends joined by one of the dashed contours?

After the definition of Linsley et al. (arXiv 1805.08315; snakes2.py of drewlinsley/pathfinder) with the
parameters of Long Range Arena (arXiv 2011.04006), written anew. An image has two long contours of straight
dashes ("paddles") and several short ones that distract. A disc marks an end of one long contour. A second
disc marks the other end of the same contour (label 1) or the far end of the other contour (label 0).

    first dash -> pivot, `margin` behind its end -> the next dash begins `margin` behind the pivot, in a
    direction drawn with weight cos(min(continuity * |turn|, 90 degrees))^2 from those that keep it clear

A dash keeps clear if the pixels up to about `margin` around it are free of other dashes'. So dashes that are
made longer by `margin` at both ends touch only if they are neighbours in a contour (tests check labels so).
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .contours import Layout, Shapes

ANTIALIAS = 2  # lines are drawn this many times larger, then reduced
MIN_CONTOUR = 3  # dashes of a long contour where there are short ones, which have a third of them
CLEAR_ABOVE = 0.02  # of the reduced mask of a dash: no other dash may use a pixel that it touches


@dataclass(frozen=True)
class Parameters:
    """The published parameters of an image."""

    size: int
    margins: tuple[int, ...]
    """Half of the gap between neighbouring dashes, in pixels; one is drawn for each image."""
    dash_length: int
    thickness: float
    contour_length: int
    """Dashes of a long contour."""
    distractor_dashes: int
    """Dashes of all short contours together, at most."""
    continuity: float
    """Greater values make straighter contours."""
    seed_distance: int
    """Distance of the first ends of the two long contours."""
    marker_radius: float
    target_contrast: float
    distractor_contrast: float
    padding: int = 1
    """Free pixels at the image's edge."""

    @property
    def distractor_length(self) -> int:
        """Dashes of a short contour."""
        return self.contour_length // 3

    @property
    def num_distractors(self) -> int:
        """Short contours, if there is room for all."""
        return self.distractor_dashes // self.distractor_length if self.distractor_dashes else 0

    def with_contours(self, length: int, distractor_dashes: int | None = None) -> "Parameters":
        """The same with long contours of `length` dashes, and so many dashes that distract (None: the same
        number)."""
        if distractor_dashes is None:
            distractor_dashes = self.distractor_dashes
        return dataclasses.replace(self, contour_length=length, distractor_dashes=distractor_dashes)


PATHFINDER_32 = Parameters(
    size=32,
    margins=(1,),
    dash_length=2,
    thickness=0.5,
    contour_length=14,
    distractor_dashes=20,
    continuity=1.0,
    seed_distance=7,
    marker_radius=1.5,
    target_contrast=0.75 * 2,
    distractor_contrast=2.0,
)
PATHFINDER_128 = Parameters(
    size=128,
    margins=(2, 3),
    dash_length=5,
    thickness=1.5,
    contour_length=14,
    distractor_dashes=35,
    continuity=1.8,
    seed_distance=20,
    marker_radius=3.0,
    target_contrast=0.9,
    distractor_contrast=0.9,
)

Point = tuple[int, int]  # (y, x) in pixels


class Dash(NamedTuple):
    """A straight stroke."""

    start: Point
    angle: float
    """Direction from start, in radians; y points down."""


@dataclass
class Drawing:
    """An image and what it was drawn from."""

    image: np.ndarray
    """uint8 [size, size]"""
    label: int
    dashes: list[Dash]
    """All dashes, in random order: it does not tell the contour of a dash."""
    markers: tuple[Point, Point]
    margin: int


class Stamp(NamedTuple):
    """The pixels of a dash, relative to its start."""

    pixels: np.ndarray
    """int64 [n, 2], offsets (y, x)"""
    values: np.ndarray
    """float [n], intensities in (0, 1]"""
    clear: np.ndarray
    """int64 [m, 2], offsets of the pixels that no other dash may use"""


def _reduced(canvas: np.ndarray, size: int) -> np.ndarray:
    """A drawing at ANTIALIAS times the size, reduced (Lanczos), float [size, size] in [0, 1]."""
    from PIL import Image

    image = Image.fromarray(canvas.astype(np.float32)).resize((size, size), Image.Resampling.LANCZOS)
    return np.clip(np.asarray(image), 0.0, 1.0)


def _stamp(length: int, thickness: float, margin: int, angle: float) -> Stamp:
    from PIL import Image, ImageDraw

    reach = length + math.ceil(thickness) + margin
    side, centre = 2 * reach * ANTIALIAS + 1, reach * ANTIALIAS
    large = Image.new("L", (side, side))
    head = (centre + length * ANTIALIAS * math.cos(angle), centre + length * ANTIALIAS * math.sin(angle))
    ImageDraw.Draw(large).line([(centre, centre), head], fill=1, width=round(thickness * ANTIALIAS))
    line = np.asarray(large, dtype=bool)
    values = _reduced(line, 2 * reach + 1)
    clear = _reduced(_dilated(line, margin * ANTIALIAS), 2 * reach + 1) > CLEAR_ABOVE
    pixels = np.argwhere(values > 0)
    return Stamp(pixels - reach, values[tuple(pixels.T)], np.argwhere(clear) - reach)


def _dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """All pixels within `radius` of a pixel of the mask."""
    padded, height, width = np.pad(mask, radius), *mask.shape
    out = np.zeros_like(mask)
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if y * y + x * x <= radius * radius:
                out |= padded[radius + y : radius + y + height, radius + x : radius + x + width]
    return out


class Candidates(NamedTuple):
    """All dashes that may follow at a pivot, relative to it."""

    heads: np.ndarray
    """int64 [k, 2], their far ends, on a circle"""
    angles: np.ndarray
    """float [k], directions from the pivot to the heads"""
    clear: np.ndarray
    """int64 [k, m, 2], the pixels that each must keep clear; some are there twice"""


def _opposite(angle: float) -> float:
    return angle + math.pi if angle < 0 else angle - math.pi


class Brushes(NamedTuple):
    """All dashes that an image's parameters and margin allow, by their number in `contours.Shapes`."""

    shapes: "Shapes"
    angles: list[float]
    stamps: list[Stamp]


@functools.lru_cache(maxsize=8)
def _brushes(length: int, thickness: float, margin: int) -> Brushes:
    from .contours import FIRST_DASHES, Shapes

    radius = length + margin
    circle = np.arange(0.0, 2 * math.pi, 1.0 / radius)
    heads = np.stack([radius * np.sin(circle), radius * np.cos(circle)], axis=1).round().astype(np.int64)
    heads = np.unique(heads, axis=0)
    outward = np.arctan2(heads[:, 0], heads[:, 1])
    angles = [math.radians((degrees + 180) % 360 - 180) for degrees in range(FIRST_DASHES)]
    angles += [_opposite(angle) for angle in outward.tolist()]
    stamps = [_stamp(length, thickness, margin, angle) for angle in angles]
    counts = np.array([len(stamp.clear) for stamp in stamps])
    clear = np.stack([np.resize(stamp.clear, (counts.max(), 2)) for stamp in stamps])
    return Brushes(Shapes(clear, counts, heads, outward), angles, stamps)


def _layout(parameters: Parameters, margin: int) -> "Layout":
    from .contours import Layout

    return Layout(
        edge=2 * (parameters.dash_length + math.ceil(parameters.thickness) + 2 * margin),
        size=parameters.size,
        dash_length=parameters.dash_length,
        margin=margin,
        continuity=parameters.continuity,
        contour_length=parameters.contour_length,
        seed_distance=parameters.seed_distance,
        distractor_length=parameters.distractor_length,
    )


def _new_grid(parameters: Parameters, layout: "Layout") -> np.ndarray:
    """Taken pixels of an empty image: those outside of it, and its padding."""
    side = layout.size + 2 * layout.edge
    taken = np.ones((side, side), np.int32)
    inside = slice(layout.edge + parameters.padding, side - layout.edge - parameters.padding)
    taken[inside, inside] = 0
    return taken


def _grow_contours(
    parameters: Parameters, layout: "Layout", shapes: "Shapes", generator: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The long contours, int64 [2, contour_length, 3], and the short ones, [distractor_length, 3] each."""
    from .contours import grow_distractor, grow_targets

    targets, taken = np.zeros((2, parameters.contour_length, 3), np.int64), _new_grid(parameters, layout)
    while not grow_targets(taken, shapes, layout, generator, targets):
        taken = _new_grid(parameters, layout)
    distractors = []
    for _ in range(parameters.num_distractors):
        dashes = np.zeros((parameters.distractor_length, 3), np.int64)
        if grow_distractor(taken, shapes, layout, generator, dashes):
            distractors.append(dashes)
    return targets, distractors


def _paint(image: np.ndarray, dashes: np.ndarray, stamps: list[Stamp], contrast: float) -> None:
    """Draw dashes [n, 3] on an image with an edge."""
    for y, x, number in dashes.tolist():
        stamp = stamps[number]
        index = stamp.pixels[:, 0] + y, stamp.pixels[:, 1] + x
        image[index] = np.maximum(image[index], contrast * stamp.values)


@functools.lru_cache(maxsize=8)
def _disc(radius: float) -> np.ndarray:
    """A filled disc, float [n, n] in [0, 1], n odd."""
    reach = math.ceil(radius) + 2
    side = 2 * reach + 1
    y, x = np.ogrid[: side * ANTIALIAS, : side * ANTIALIAS]
    y, x = y - reach * ANTIALIAS, x - reach * ANTIALIAS
    return _reduced(y * y + x * x <= (radius * ANTIALIAS) ** 2, side)


def draw(parameters: Parameters, generator: np.random.Generator) -> Drawing:
    """Draw an image. The brightest pixel is 255."""
    label, origin = (int(number) for number in generator.integers(2, size=2))
    margin = parameters.margins[int(generator.integers(len(parameters.margins)))]
    layout = _layout(parameters, margin)
    brushes = _brushes(parameters.dash_length, parameters.thickness, margin)
    targets, distractors = _grow_contours(parameters, layout, brushes.shapes, generator)
    edge, size = layout.edge, parameters.size
    image = np.zeros((size + 2 * edge, size + 2 * edge))
    _paint(image, targets.reshape(-1, 3), brushes.stamps, parameters.target_contrast)
    for dashes in distractors:
        _paint(image, dashes, brushes.stamps, parameters.distractor_contrast)
    disc = _disc(parameters.marker_radius)
    ends = targets[origin, 0], targets[origin if label else 1 - origin, -1]
    for y, x, _ in ends:
        top, left = y - disc.shape[0] // 2, x - disc.shape[0] // 2
        window = image[top : top + disc.shape[0], left : left + disc.shape[0]]
        np.maximum(window, disc, out=window)
    image = image[edge : edge + size, edge : edge + size]

    def place(dash: np.ndarray) -> Point:
        return int(dash[0]) - edge, int(dash[1]) - edge

    all_dashes = generator.permutation(np.concatenate([*targets, *distractors])).tolist()
    return Drawing(
        image=(255 * image / image.max()).astype(np.uint8),
        label=label,
        dashes=[Dash((y - edge, x - edge), brushes.angles[number]) for y, x, number in all_dashes],
        markers=(place(ends[0]), place(ends[1])),
        margin=margin,
    )
