"""The six tasks of Long Range Arena (Tay et al., arXiv 2011.04006), with the published splits and lengths."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...common.errors import one_line_message
from ..tokenizer import SPECIAL_TOKENS, byte_tokenizer
from . import listops, pathfinder
from .examples import Example
from .files import NamedRow, hub_file, hub_rows, parquet_rows, split_files, tsv_rows
from .task import GeneratedTask, LabelledTask

TO_PARQUET = {"train": "train*.parquet", "validation": "validation*.parquet", "test": "test*.parquet"}


@dataclass(frozen=True, kw_only=True)
class ListOps(GeneratedTask):
    """ListOps: the value of nested operations on lists of digits."""

    min_length: int = 500
    """Expressions have more tokens than this."""
    max_length: int = 2000
    """Expressions have fewer tokens than this."""
    max_depth: int = 10
    """Depth at which every argument is a digit."""
    max_args: int = 10
    """Largest number of arguments of an operation; the smallest is 2."""

    NAME: ClassVar[str] = "listops"
    LABELS: ClassVar[tuple[str, ...]] = tuple(map(str, range(10)))
    INPUT: ClassVar[str] = "an expression, such as `[MAX 2 9 [MIN 4 7 ] 0 ]`"
    GENERATOR_OPTIONS: ClassVar[tuple[str, ...]] = ("data_seed", "min_length", "max_depth", "max_args")
    SIZES: ClassVar[tuple[int, int, int]] = (96_000, 2_000, 2_000)
    COLUMNS: ClassVar[list[str]] = ["Source", "Target"]

    @property
    def length(self) -> int:
        return self.max_length - 1

    @property
    def symbols(self) -> list[str]:
        return list(listops.SYMBOLS)

    @property
    def source(self) -> dict[str, Any]:
        shape = {"lengths": [self.min_length, self.max_length], "max_args": self.max_args}
        return {**super().source, **shape, "max_depth": self.max_depth}

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        if self.folder:
            return errors | _length_errors(self.max_length)
        if self.max_depth < 2:
            errors["max_depth"] = f"must be at least 2 (one operation on digits), not {self.max_depth}"
        if self.max_args < 2:
            errors["max_args"] = f"must be at least 2, not {self.max_args}"
        if self.max_length < self.min_length + 2 or self.max_length < 6:
            errors["max_length"] = (
                f"must be at least 6, and greater than min_length + 1 = {self.min_length + 1}"
            )
        elif not errors and self.min_length >= (longest := self._longest()):
            errors["min_length"] = f"no expression of this depth has more than {longest:,} tokens"
        return errors

    def _longest(self) -> int:
        """Number of tokens of the longest expression."""
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = 2 + self.max_args * longest
        return longest

    def block(self, number: int) -> list[Example]:
        seed = (self.data_seed, number)
        source = listops.ExpressionSource(
            seed, self.min_length, self.max_length, self.max_depth, self.max_args
        )
        drawn = [source.draw() for _ in range(self.BLOCK)]
        return [((tokens,), value) for tokens, value in drawn]

    def rows(self, split: str) -> Iterator[NamedRow]:
        name = {"validation": "val"}.get(split, split)
        for path in split_files(self.folder_path(), [f"*_{name}.tsv", f"{name}.tsv"]):
            yield from tsv_rows(path, self.COLUMNS, has_header=True)

    def convert(self, row: dict[str, Any]) -> Example:
        tokens, label = listops.parse(row["Source"]), self.checked_label(row["Target"])
        if len(tokens) >= self.max_length:
            raise ValueError(f"{len(tokens)} tokens, but max_length {self.max_length} allows fewer only")
        value, _ = listops.evaluate(tokens)
        if value != label:
            raise ValueError(f"the expression's value is {value}, but its label is {label}")
        return (tokens,), label


@dataclass(frozen=True, kw_only=True)
class PixelTask(LabelledTask):
    """A task on square grey images, whose pixels are read row by row."""

    INPUT: ClassVar[str] = "the grey levels of a square image, 0 to 255, row by row, with spaces between them"
    SIDE: ClassVar[int]
    IMAGE_COLUMN: ClassVar[str] = "image"

    @property
    def length(self) -> int:
        return self.SIDE**2

    @property
    def symbols(self) -> list[str]:
        return list(map(str, range(256)))

    def rows(self, split: str) -> Iterator[NamedRow]:
        for path in split_files(self.folder_path(), [TO_PARQUET[split]]):
            yield from parquet_rows(path, [self.IMAGE_COLUMN, "label"])

    def convert(self, row: dict[str, Any]) -> Example:
        from PIL import Image

        value = row[self.IMAGE_COLUMN]
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if not (isinstance(encoded, bytes) and encoded):
            raise ValueError(f"{self.IMAGE_COLUMN} holds no bytes of an image")
        try:
            image = Image.open(io.BytesIO(encoded))
            width, height = image.size
            pixels = image.convert("L").tobytes() if width == height == self.SIDE else None
        # all from Pillow
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"the image is damaged ({one_line_message(error)})") from None
        if pixels is None:
            raise ValueError(f"the image is {width} x {height}, not {self.SIDE} x {self.SIDE}")
        return (pixels,), self.checked_label(row["label"])


@dataclass(frozen=True, kw_only=True)
class Pathfinder(PixelTask, GeneratedTask):
    """Pathfinder: whether a dashed contour joins two marked ends, in images of 32 x 32."""

    contour_length: int = 14
    """Dashes of a long contour. Long Range Arena's easier sets have 6 and 9; 2 needs
    distractor_dashes 0."""
    distractor_dashes: int | None = None
    """Dashes of all short contours together, at most; None for the published number."""

    NAME: ClassVar[str] = "pathfinder"
    LABELS: ClassVar[tuple[str, ...]] = ("apart", "joined")
    GENERATOR_OPTIONS: ClassVar[tuple[str, ...]] = ("data_seed", "contour_length", "distractor_dashes")
    SIZES: ClassVar[tuple[int, int, int]] = (160_000, 20_000, 20_000)
    SIDE: ClassVar[int] = 32
    PARAMETERS: ClassVar[pathfinder.Parameters] = pathfinder.PATHFINDER_32

    @property
    def source(self) -> dict[str, Any]:
        source = {**super().source, "contour_length": self.contour_length}
        if self.distractor_dashes is not None:  # else as before there was a choice, for caches that exist
            source["distractor_dashes"] = self.distractor_dashes
        return source

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        least = 2 if self.distractor_dashes == 0 else pathfinder.MIN_CONTOUR
        if not least <= self.contour_length <= self.PARAMETERS.contour_length:
            limits = f"{least} to {self.PARAMETERS.contour_length}"
            errors["contour_length"] = f"must be {limits}, not {self.contour_length}"
        most = self.PARAMETERS.distractor_dashes
        if self.distractor_dashes is not None and not 0 <= self.distractor_dashes <= most:
            errors["distractor_dashes"] = f"must be 0 to {most}, not {self.distractor_dashes}"
        return errors

    def block(self, number: int) -> list[Example]:
        generator = np.random.default_rng([self.data_seed, number])
        parameters = self.PARAMETERS.with_contours(self.contour_length, self.distractor_dashes)
        drawings = [pathfinder.draw(parameters, generator) for _ in range(self.BLOCK)]
        return [((drawing.image.tobytes(),), drawing.label) for drawing in drawings]


@dataclass(frozen=True, kw_only=True)
class PathX(Pathfinder):
    """Path-X: Pathfinder in images of 128 x 128, which are 16,384 tokens."""

    NAME: ClassVar[str] = "pathx"
    SIDE: ClassVar[int] = 128
    PARAMETERS: ClassVar[pathfinder.Parameters] = pathfinder.PATHFINDER_128
    BLOCK: ClassVar[int] = 50


@dataclass(frozen=True, kw_only=True)
class Image(PixelTask):
    """Image: CIFAR-10 in grey. The last tenth of the training images is for validation, as published."""

    NAME: ClassVar[str] = "image"
    LABELS: ClassVar[tuple[str, ...]] = (
        *"airplane automobile bird cat deer dog frog horse ship truck".split(),
    )
    SIDE: ClassVar[int] = 32
    IMAGE_COLUMN: ClassVar[str] = "img"
    HUB: ClassVar[str] = "uoft-cs/cifar10"
    REVISION: ClassVar[str] = "0b2714987fa478483af9968de7c934580d0bb9a2"
    HELD_OUT: ClassVar[float] = 0.1

    def rows(self, split: str) -> Iterator[NamedRow]:
        source = "test" if split == "test" else "train"
        if self.folder:
            rows = super().rows(source)
        else:
            rows = hub_rows(self.HUB, source, [self.IMAGE_COLUMN, "label"], self.REVISION)
        if split == "test":
            yield from rows
            return
        rows = list(rows)
        edge = round(len(rows) * (1 - self.HELD_OUT))
        yield from rows[:edge] if split == "train" else rows[edge:]


@dataclass(frozen=True, kw_only=True)
class _ByteTask(LabelledTask):
    """A task on texts, read as bytes."""

    max_length: int = 4096
    """Longer texts are cut to this many bytes."""

    @property
    def length(self) -> int:
        return self.max_length

    @property
    def source(self) -> dict[str, Any]:
        return {**super().source, "max_length": self.max_length}

    def errors(self) -> dict[str, str]:
        return super().errors() | _length_errors(self.max_length)

    @property
    def symbols(self) -> list[str]:
        raise NotImplementedError("The tokenizer of bytes has no words.")

    @property
    def pad(self) -> int:
        return 256 + SPECIAL_TOKENS.index("<pad>")

    def tokenizer(self) -> Any:
        return byte_tokenizer(begins_with_bos=False)

    def encode(self, text: Any, column: str) -> bytes:
        """The first `length` bytes of a text, as published.

        Raises:
            ValueError: it is no text, or an empty one.
        """
        if not (isinstance(text, str) and text):
            problem = "is empty" if text == "" else f"holds no text ({type(text).__name__})"
            raise ValueError(f"{column} {problem}")
        return text.encode()[: self.length]


@dataclass(frozen=True, kw_only=True)
class Text(_ByteTask):
    """Text: whether an IMDb review is positive. As published, the validation split is the test split."""

    NAME: ClassVar[str] = "text"
    LABELS: ClassVar[tuple[str, ...]] = ("negative", "positive")
    INPUT: ClassVar[str] = "a review of a film"
    HUB: ClassVar[str] = "stanfordnlp/imdb"
    REVISION: ClassVar[str] = "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"

    def rows(self, split: str) -> Iterator[NamedRow]:
        source = "train" if split == "train" else "test"
        if not self.folder:
            yield from hub_rows(self.HUB, source, ["text", "label"], self.REVISION)
            return
        for path in split_files(self.folder_path(), [TO_PARQUET[source]]):
            yield from parquet_rows(path, ["text", "label"])

    def convert(self, row: dict[str, Any]) -> Example:
        return (self.encode(row["text"], "text"),), self.checked_label(row["label"])


@dataclass(frozen=True, kw_only=True)
class Retrieval(_ByteTask):
    """Retrieval: whether one paper of the ACL Anthology Network cites the other, by their texts."""

    max_length: int = 4000
    """Longer texts are cut to this many bytes."""

    NAME: ClassVar[str] = "retrieval"
    LABELS: ClassVar[tuple[str, ...]] = ("unrelated", "cites")
    INPUT: ClassVar[str] = "two papers"
    TOWERS: ClassVar[int] = 2
    HUB: ClassVar[str] = "OpenNLPLab/lra"
    REVISION: ClassVar[str] = "6cb133c44f406da743661488df9e977b87d98775"
    COLUMNS: ClassVar[list[str]] = ["label", "id1", "id2", "text1", "text2"]

    def rows(self, split: str) -> Iterator[NamedRow]:
        name = f"new_aan_pairs.{'eval' if split == 'validation' else split}.tsv"
        if self.folder:
            (path,) = split_files(self.folder_path(), [name])
        else:
            path = hub_file(self.HUB, f"data/aan/{name}", self.REVISION)
        yield from tsv_rows(path, self.COLUMNS, has_header=False)

    def convert(self, row: dict[str, Any]) -> Example:
        texts = self.encode(row["text1"], "text1"), self.encode(row["text2"], "text2")
        return texts, self.checked_label(row["label"])


def _length_errors(max_length: int) -> dict[str, str]:
    return {} if max_length >= 1 else {"max_length": f"must be at least 1, not {max_length}"}
