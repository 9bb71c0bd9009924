"""The tasks of Long Range Arena: definitions against independent ones, generators, data files, readers."""

import io
import itertools
import re
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import IGNORE_INDEX, build_task, open_data
from minrnn.data.lra import (
    LRA_TASKS,
    GeneratedTask,
    LabelledReader,
    LabelledSet,
    LabelledTask,
    ListOps,
    listops,
    pathfinder,
)
from minrnn.data.lra.cache import FIRST_BLOCKS, generate
from minrnn.data.lra.examples import Examples


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


def test_the_published_definition_of_listops():
    """Arguments are digits with probability 0.75 above the last depth; every class and operator occurs."""
    task = ListOps()
    examples = [example for block in range(2) for example in task.block(block)]
    labels = Counter(label for _, label in examples)
    assert set(labels) == set(range(10))
    tokens = Counter(token for (text,), _ in examples for token in text)
    operators = [tokens[listops.DIGITS + i] for i in range(4)]
    assert max(operators) < 1.1 * min(operators)
    assert sum(operators) == tokens[listops.END]


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
        num_distractors, rest = divmod(len(drawing.dashes) - targets, parameters.distractor_length)
        assert rest == 0
        assert 0 <= num_distractors <= parameters.num_distractors
        assert drawing.margin in parameters.margins
        assert all(drawing.image[marker] > 100 for marker in drawing.markers)


TINY: dict[str, dict[str, Any]] = {
    "listops": {"min_length": 4, "max_length": 30, "max_depth": 4},
    "pathfinder": {},
    "pathx": {},
}


def tiny(name: str, **options: Any) -> LabelledTask:
    sizes = {"train_examples": 12, "validation_examples": 5, "test_examples": 4}
    task = build_task(f"lra/{name}", {**sizes, **TINY.get(name, {}), **options})
    assert isinstance(task, LabelledTask)
    return task


@pytest.mark.parametrize("name", ["listops", "pathfinder"])
def test_the_same_seed_makes_the_same_examples_in_any_number_of_processes(name: str, monkeypatch):
    task = tiny(name)
    assert isinstance(task, GeneratedTask)
    monkeypatch.setattr(type(task), "BLOCK", 2)
    alone, several = (list(itertools.islice(generate(task, max_processes=count), 21)) for count in (1, 2))
    assert alone == several
    assert len({texts for texts, _ in alone}) == 21
    other = tiny(name, data_seed=1)
    assert next(generate(other, max_processes=1)) != alone[0]


@pytest.mark.parametrize("name", ["listops", "pathfinder"])
def test_splits_do_not_depend_on_the_sizes_of_others_and_share_no_example(name: str, tmp_path: Path):
    small, large = (
        open_data(tiny(name, train_examples=count, validation_examples=more), tmp_path)
        for count, more in ((8, 3), (30, 6))
    )

    def texts(data: Any, split: str) -> list[bytes]:
        examples = data.examples(split)
        return [examples.texts(number)[0].tobytes() for number in range(len(examples))]

    assert texts(small, "test") == texts(large, "test")
    assert texts(small, "train") == texts(large, "train")[:8]
    every = [text for split in ("train", "validation", "test") for text in texts(large, split)]
    assert len(every) == len(set(every)) == 30 + 6 + 4


@pytest.mark.parametrize("name", list(TINY))
def test_examples_are_made_once(name: str, tmp_path: Path, monkeypatch):
    task = tiny(name)
    data = open_data(task, tmp_path)
    assert data.manifest()["examples"] == {"train": 12, "validation": 5, "test": 4}
    stored = {split: data.examples(split) for split in ("train", "validation", "test")}
    texts = [bytes(examples.texts(i)[0]) for examples in stored.values() for i in range(len(examples))]
    assert len(set(texts)) == 21
    assert all(len(text) <= task.length for text in texts)
    monkeypatch.setattr(type(task), "block", None)  # would fail if it were called
    again = open_data(task, tmp_path)
    assert again.folder == data.folder
    assert [path.name for path in data.folder.parent.iterdir() if path.is_dir()] == [data.folder.name]
    tokens = next(data.folder.glob("tokens-train.npy"))
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"tokens-train\.npy has \d+ bytes, not \d+: remove that folder"):
        open_data(task, tmp_path)


def test_one_process_makes_the_examples_and_the_others_wait(tmp_path: Path, monkeypatch):
    """Two at the same time: the generator is called once, and the one that waits reports progress."""
    task, calls, waiting = tiny("listops"), [], threading.Event()
    task_class: Any = type(task)
    original = task_class.block

    def block(self: Any, number: int) -> Any:
        calls.append(number)
        assert waiting.wait(30)
        return original(self, number)

    monkeypatch.setattr(task_class, "block", block)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_data, task, tmp_path)
        while not calls:
            time.sleep(0.01)
        second = pool.submit(open_data, task, tmp_path, waiting.set)
        assert first.result(60).folder == second.result(60).folder
    assert calls == list(FIRST_BLOCKS.values())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache: .* cannot be used \(.*\); name another folder"):
        open_data(tiny("listops"), tmp_path / "cache")


def write_parquet(path: Path, **columns: list[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


def picture(size: tuple[int, int] = (32, 32), shade: int = 7, form: str = "PNG") -> dict[str, Any]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, form)
    return {"bytes": buffer.getvalue(), "path": None}


def test_images_are_read_in_grey_and_split_as_published(tmp_path: Path):
    folder = tmp_path / "cifar10"
    write_parquet(
        folder / "train-00000-of-00001.parquet",
        img=[picture(shade=shade) for shade in range(20)],
        label=[shade % 10 for shade in range(20)],
    )
    write_parquet(folder / "test-00000-of-00001.parquet", img=[picture(shade=99, form="JPEG")], label=[3])
    data = open_data(LRA_TASKS["image"](folder=str(folder)), tmp_path / "cache")
    train, validation, test = (data.examples(split) for split in ("train", "validation", "test"))
    assert [int(train.texts(i)[0][0]) for i in range(len(train))] == list(range(18))
    assert [int(validation.texts(i)[0][0]) for i in range(len(validation))] == [18, 19]
    assert test.texts(0)[0].tolist() == [99] * 1024
    assert (validation.label(1), test.label(0)) == (9, 3)


def test_texts_are_bytes_cut_at_the_published_length(tmp_path: Path):
    folder = tmp_path / "imdb"
    for split in ("train", "test"):
        write_parquet(folder / f"{split}-0.parquet", text=["Grüße", "x" * 5000], label=[0, 1])
    task = LRA_TASKS["text"](folder=str(folder))
    examples = open_data(task, tmp_path / "cache").examples("train")
    assert bytes(examples.texts(0)[0]).decode() == "Grüße"
    assert len(examples.texts(1)[0]) == 4096
    assert task.tokenizer()("Grüße").input_ids == list("Grüße".encode())


def test_pairs_of_papers(tmp_path: Path):
    folder = tmp_path / "aan"
    folder.mkdir()
    for split in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{split}.tsv").write_text(
            '1.0\t7\t8\tfirst "text\tsecond\n0.0\t1\t2\ta\tb\n'
        )
    data = open_data(LRA_TASKS["retrieval"](folder=str(folder)), tmp_path / "cache")
    examples = data.examples("validation")
    assert [bytes(text) for text in examples.texts(0)] == [b'first "text', b"second"]
    assert [examples.label(i) for i in range(2)] == [1, 0]
    batch = data.open_reader(0, 1, 2, 0, None).next_chunk()
    assert batch.input_ids.shape == (2, 2, 16)
    assert batch.num_tokens == 11 + 6 + 1 + 1


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("image", {"img": [{"bytes": b"no image", "path": None}], "label": [1]}, "[0]: the image is damaged"),
        ("image", {"img": [picture((31, 32))], "label": [1]}, "[0]: the image is 31 x 32, not 32 x 32"),
        ("image", {"img": [picture(), picture()], "label": [1, 10]}, "[1]: label 10 is not one of 0 to 9"),
        ("image", {"img": [picture()]}, "has no column label; its columns: img"),
        ("text", {"text": ["a", None], "label": [0, 1]}, "[1]: text holds no text (NoneType)"),
        ("text", {"text": ["a", ""], "label": [0, 1]}, "[1]: text is empty"),
        ("text", {"text": ["a"], "label": [-1]}, "[0]: label -1 is not one of 0 to 1"),
        ("text", {"text": ["a"], "label": [0.5]}, "[0]: label 0.5 is not one of 0 to 1"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, name: str, columns: dict[str, list[Any]], message: str):
    folder = tmp_path / name
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", **columns)
    with pytest.raises(UserError) as raised:
        open_data(LRA_TASKS[name](folder=str(folder)), tmp_path / "cache")
    assert f"data.task: {folder / 'train.parquet'}" in str(raised.value)
    assert message in str(raised.value)
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "lra").iterdir())


def test_a_truncated_image_is_named(tmp_path: Path):
    damaged = {"bytes": picture(form="JPEG")["bytes"][:-40], "path": None}
    write_parquet(tmp_path / "cifar" / "train.parquet", img=[picture(), damaged], label=[0, 1])
    with pytest.raises(UserError, match=r"train\.parquet\[1\]: the image is damaged \("):
        open_data(LRA_TASKS["image"](folder=str(tmp_path / "cifar")), tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[MAX 2 9 ]\t9\nx", "train.tsv:3 has 1 columns, not 2 (Source, Target)"),
        ("[MAX 2 x ]\t9", "train.tsv:2: 'x' is no symbol of ListOps"),
        ("[MAX 2 ] 9\t9", "train.tsv:2: token 3, '9', follows the end of the expression"),
        ("[MAX ]\t9", "train.tsv:2: token 1, ']', closes an empty list"),
        ("[MAX " + "2 " * 2000 + "]\t2", "train.tsv:2: 2002 tokens, but max_length 2000 allows fewer only"),
    ],
)
def test_a_broken_expression_is_named(tmp_path: Path, text: str, message: str):
    for split in ("train", "val", "test"):
        (tmp_path / f"basic_{split}.tsv").write_text(f"Source\tTarget\n{text}\n")
    with pytest.raises(UserError) as raised:
        open_data(ListOps(folder=str(tmp_path)), tmp_path / "cache")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", r"folder: .*/empty has no file train\*\.parquet"),
        ("listops", r"folder: .*/empty has no file \*_train\.tsv or train\.tsv"),
    ],
)
def test_a_folder_without_the_files(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_data(LRA_TASKS[name](folder=str(tmp_path / "empty")), tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        open_data(LRA_TASKS[name](folder=str(tmp_path / "missing")), tmp_path)


@given(
    count=st.integers(5, 40), num_readers=st.integers(1, 4), lanes=st.integers(1, 5), seed=st.integers(0, 3)
)
def test_readers_read_each_example_once_in_an_epoch(count: int, num_readers: int, lanes: int, seed: int):
    """Whatever the number of lanes, in an order of (seed, epoch); a reader goes on from any of its states."""
    examples = numbered(count)
    orders = []
    for reader in range(num_readers):
        share = -(-(count - reader) // num_readers)
        stream = LabelledReader(examples, reader, num_readers, lanes, 0, seed)
        batches = [stream.next_chunk() for _ in range(-(-2 * share // lanes) + 1)]
        middle = LabelledReader(examples, reader, num_readers, lanes, 0, seed, batches[0].state)
        for batch in batches[1:]:
            assert np.array_equal(middle.next_chunk().labels, batch.labels)
        labels = np.concatenate([batch.labels for batch in batches]).tolist()
        orders.append((labels[:share], labels[share : 2 * share]))
        assert all(
            batch.input_ids[row, 0] == label for batch in batches for row, label in enumerate(batch.labels)
        )
    for epoch in range(2):
        assert sorted(label for order in orders for label in order[epoch]) == list(range(count))


@given(count=st.integers(1, 30), num_readers=st.integers(1, 4), lanes=st.integers(1, 5))
def test_a_set_scores_each_example_once(count: int, num_readers: int, lanes: int):
    shares = [LabelledSet(numbered(count), 2, reader, num_readers, lanes, 0) for reader in range(num_readers)]
    batches = [list(share.chunks()) for share in shares]
    assert len({len(own) for own in batches}) == 1
    labels = [label for own in batches for batch in own for label in batch.labels.tolist()]
    assert sorted(label for label in labels if label != IGNORE_INDEX) == list(range(count))
    assert sum(share.num_positions for share in shares) == len(numbered(count).tokens)


def numbered(count: int) -> Examples:
    """Examples whose label and tokens are their number; example n has n % 7 + 1 tokens."""
    lengths = [number % 7 + 1 for number in range(count)]
    tokens = np.concatenate([np.full(length, number, np.uint8) for number, length in enumerate(lengths)])
    return Examples(tokens, np.cumsum([0, *lengths]), np.arange(count), 1, np.arange(count))
