"""The generated tasks of Long Range Arena: definitions against independent ones."""

import re
import statistics
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minrnn.data.lra import ListOps, listops, pathfinder


def rewrite(text: str) -> int:
    """The value of an expression, by replacing innermost lists in the text until one digit is left."""
    innermost = re.compile(r"\[(MIN|MAX|MED|SM) ((?:\d )+)\]")

    def value(match: re.Match) -> str:
        functions = {"MIN": min, "MAX": max, "MED": statistics.median, "SM": lambda x: sum(x) % 10}
        return str(int(functions[match[1]]([int(word) for word in match[2].split()])))

    while "[" in text:
        text, count = innermost.subn(value, text)
        assert count, text
    return int(text)


def spelled(tokens: bytes) -> str:
    return " ".join(listops.SYMBOLS[token] for token in tokens)


def test_a_thousand_expressions_have_the_values_of_an_independent_evaluator():
    source = listops.ExpressionSource((7,), 500, 2000, 10, 10)
    for _ in range(1000):
        tokens, value = source.draw()
        assert 500 < len(tokens) < 2000
        assert rewrite(spelled(tokens)) == value
        assert listops.evaluate(tokens)[1] <= 9


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0 or draw(st.booleans()):
        return str(draw(st.integers(0, 9)))
    arguments = draw(st.lists(expressions(depth - 1), min_size=1, max_size=5))
    return f"[{draw(st.sampled_from(listops.OPERATORS))} {' '.join(arguments)} ]"


@given(expressions())
def test_expressions_of_files_are_evaluated(text: str):
    tokens = listops.parse(text.replace("[", "( [").replace("]", "] )"))
    assert spelled(tokens) == text
    assert listops.evaluate(tokens)[0] == rewrite(text)


@given(st.lists(st.integers(0, len(listops.SYMBOLS) - 1), max_size=12))
def test_what_is_no_expression_is_refused(tokens: list[int]):
    """`evaluate` accepts a list of tokens exactly if rewriting its text ends with one digit."""
    text = spelled(bytes(tokens))
    while (shorter := re.sub(r"\[(MIN|MAX|MED|SM) (\d )+\]", "0", text)) != text:
        text = shorter
    if re.fullmatch(r"\d", text):
        listops.evaluate(bytes(tokens))
    else:
        with pytest.raises(ValueError, match=r"token|ends|empty"):
            listops.evaluate(bytes(tokens))


def test_listops_is_drawn_with_the_published_probabilities():
    """Above the last depth an argument is an operation with probability 0.25; operators, digits and numbers
    of arguments are equally likely. Measured on expressions that no bound of the length selects, within four
    standard deviations.
    """
    max_depth, source = 5, listops.ExpressionSource((11,), 0, 10**9, 5, 10)
    operations, operators, digits, counts = Counter[bool](), Counter[int](), Counter[int](), Counter[int]()
    for _ in range(400):
        stack = []
        for token in source.draw()[0]:
            if token == listops.END:
                counts[stack.pop()] += 1
                continue
            is_operation = token >= listops.DIGITS
            if stack:
                stack[-1] += 1
                if len(stack) + 1 < max_depth:
                    operations[is_operation] += 1
            if is_operation:
                stack.append(0)
            (operators if is_operation else digits)[token] += 1

    def check(seen: Counter, expected: dict[Any, float]) -> None:
        assert seen.keys() == expected.keys()
        total = seen.total()
        for value, share in expected.items():
            assert abs(seen[value] - share * total) < 4 * (total * share * (1 - share)) ** 0.5, (value, seen)

    check(operations, {True: 0.25, False: 0.75})
    check(operators, {listops.DIGITS + i: 1 / 4 for i in range(4)})
    check(digits, dict.fromkeys(range(10), 0.1))
    check(counts, dict.fromkeys(range(2, 11), 1 / 9))


def test_classes_and_depths_of_listops():
    """Those that docs/lra.md names: the values 0 and 9 are frequent, and all reach the greatest depth."""
    examples = [example for block in range(4) for example in ListOps().block(block)]
    labels = Counter(label for _, label in examples)
    assert all(0.13 < labels[label] / len(examples) < 0.21 for label in (0, 9))
    assert all(0.04 < labels[label] / len(examples) < 0.12 for label in range(1, 9))
    assert {listops.evaluate(text)[1] for (text,), _ in examples} == {9}


def is_joined(drawing: pathfinder.Drawing, dash_length: int) -> bool:
    """Whether a line leads from one marker to the other, if all dashes are made longer by the gap.

    The dashes are drawn as lines of one pixel, at 8 times the size, and the areas at the markers are
    compared. Nothing of the generator's order or contours is used. Ends of dashes are rounded to pixels: half
    a pixel more closes the gaps.
    """
    from PIL import Image, ImageDraw

    scale, reach = 8, drawing.margin + 0.5
    side = len(drawing.image) * scale
    image = Image.new("1", (side, side))
    draw = ImageDraw.Draw(image)
    for (y, x), angle in drawing.dashes:
        dy, dx, length = np.sin(angle), np.cos(angle), dash_length + reach
        start = ((x - reach * dx) * scale, (y - reach * dy) * scale)
        draw.line([start, ((x + length * dx) * scale, (y + length * dy) * scale)], fill=1, width=scale)
    pixels = np.asarray(image)
    labels = components(pixels)
    near = [marker_components(labels, marker, scale) for marker in drawing.markers]
    return bool(near[0] & near[1])


def components(pixels: np.ndarray) -> np.ndarray:
    """The number of the connected area (8 neighbours) of each pixel; 0 for the background."""
    from scipy import ndimage

    return cast(np.ndarray, cast(Any, ndimage.label(pixels, np.ones((3, 3))))[0])


def marker_components(labels: np.ndarray, marker: tuple[int, int], scale: int) -> set[int]:
    y, x = (coordinate * scale for coordinate in marker)
    window = labels[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
    return set(window[window > 0].tolist())


PARAMETERS = [
    pathfinder.PATHFINDER_32,
    *(pathfinder.PATHFINDER_32.with_contours(length) for length in (3, 6, 9)),
    *(pathfinder.PATHFINDER_32.with_contours(length, 0) for length in (2, 3)),
    pathfinder.PATHFINDER_128,
]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_labels_are_those_of_a_tracing_of_the_drawing(parameters: pathfinder.Parameters):
    generator = np.random.default_rng(3)
    drawings = [pathfinder.draw(parameters, generator) for _ in range(60)]
    assert 15 < sum(drawing.label for drawing in drawings) < 45
    traced = [is_joined(drawing, parameters.dash_length) for drawing in drawings]
    assert traced == [bool(drawing.label) for drawing in drawings]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_drawing_has_the_published_parts(parameters: pathfinder.Parameters):
    generator = np.random.default_rng(4)
    for _ in range(20):
        drawing = pathfinder.draw(parameters, generator)
        assert drawing.image.shape == (parameters.size, parameters.size)
        assert drawing.image.max() == 255
        targets = 2 * parameters.contour_length
        num_distractors, rest = divmod(len(drawing.dashes) - targets, max(parameters.distractor_length, 1))
        assert rest == 0
        assert 0 <= num_distractors <= parameters.num_distractors
        assert drawing.margin in parameters.margins
        assert all(drawing.image[marker] > 100 for marker in drawing.markers)
