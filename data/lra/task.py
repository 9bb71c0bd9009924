"""The base of the labelled tasks: options, splits, and where their examples come from."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...common.errors import UserError
from ..tokenizer import WORD_SPECIAL_TOKENS, word_tokenizer
from .examples import SPLITS, Example
from .files import KEY, NamedRow

MAX_REPORTED = 20  # rows that one error names


@dataclass(frozen=True, kw_only=True)
class LabelledTask(ABC):
    """A task. Its fields are the options of `data.task`."""

    folder: str | None = None
    """A local folder with files of the published schema (docs/lra.md) instead of the default source."""
    train_examples: int | None = None
    """Number of training examples; None for the published number."""
    validation_examples: int | None = None
    """Number of examples of a validation; None for the published number."""
    test_examples: int | None = None
    """Number of examples of the test; None for the published number."""

    NAME: ClassVar[str]
    LABELS: ClassVar[tuple[str, ...]]
    INPUT: ClassVar[str]
    """What a model of the task reads, for its card."""
    TOWERS: ClassVar[int] = 1
    """Texts of an example."""
    HUB: ClassVar[str]
    """The dataset of the hub with the examples; generated tasks have none."""
    REVISION: ClassVar[str]
    """Its commit."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of tokens of the longest text."""

    @property
    @abstractmethod
    def symbols(self) -> list[str]:
        """The names of the tokens, indexed by id."""

    @abstractmethod
    def rows(self, split: str) -> Iterator[NamedRow]:
        """The rows of a split, from `folder` or the hub.

        Raises:
            UserError: they cannot be read.
        """

    @abstractmethod
    def convert(self, row: dict[str, Any]) -> Example:
        """The example of a row.

        Raises:
            ValueError: the row is wrong.
        """

    @property
    def num_labels(self) -> int:
        return len(self.LABELS)

    @property
    def chance(self) -> float:
        """The accuracy of guessing among all labels."""
        return 1.0 / self.num_labels

    @property
    def source(self) -> dict[str, Any]:
        """What decides the stored examples, besides NAME and `folder`; JSON."""
        return {} if self.folder else {"hub": self.HUB, "revision": self.REVISION}

    @property
    def pad(self) -> int:
        """The id of the padding token."""
        return len(self.symbols) + WORD_SPECIAL_TOKENS.index("<pad>")

    def tokenizer(self) -> Any:
        """The tokenizer of exports. It writes the tokens that training reads."""
        return word_tokenizer(self.symbols)

    def limit(self, split: str) -> int | None:
        """The option SPLIT_examples."""
        return getattr(self, f"{split}_examples")

    def errors(self) -> dict[str, str]:
        """Error messages by option. Subclasses add those of their own options."""
        return {
            f"{split}_examples": f"must be at least 1, not {self.limit(split)}"
            for split in SPLITS
            if (count := self.limit(split)) is not None and count < 1
        }

    def folder_path(self) -> Path:
        """`folder` with ~ replaced."""
        assert self.folder is not None
        return Path(self.folder).expanduser()

    def checked_label(self, value: Any) -> int:
        """A row's label as an index of LABELS.

        Raises:
            ValueError: it is none of them.
        """
        try:
            label = int(float(value)) if float(value) == int(float(value)) else -1
        except (TypeError, ValueError):
            label = -1
        if not 0 <= label < self.num_labels:
            raise ValueError(f"label {value!r} is not one of 0 to {self.num_labels - 1}")
        return label

    def examples(self, split: str) -> Iterator[Example]:
        """The converted rows of a split.

        Raises:
            UserError: the rows that are wrong, up to MAX_REPORTED of them, each with its file and number.
        """
        return converted(self.rows(split), self.convert)


def converted(rows: Iterable[NamedRow], convert: Any) -> Iterator[Example]:
    """The examples of rows; see `LabelledTask.examples`."""
    errors: list[tuple[str, str]] = []
    for name, row in rows:
        try:
            example = convert(row)
        except ValueError as error:
            errors.append((KEY, f"{name}: {error}"))
            if len(errors) == MAX_REPORTED:
                break
            continue
        if not errors:
            yield example
    if errors:
        raise UserError.from_list(errors)


@dataclass(frozen=True, kw_only=True)
class GeneratedTask(LabelledTask):
    """A task whose examples are generated, unless a folder is named.

    Examples come in blocks. A block is a function of (data_seed, its number), so the result does not depend
    on the number of processes that generate.
    """

    data_seed: int = 0
    """Seed of the generated examples."""

    GENERATOR_OPTIONS: ClassVar[tuple[str, ...]] = ("data_seed",)
    """Options that examples of a folder do not depend on."""
    SIZES: ClassVar[tuple[int, int, int]]
    """Published numbers of examples: training, validation, test."""
    BLOCK: ClassVar[int] = 250

    @abstractmethod
    def block(self, number: int) -> list[Example]:
        """BLOCK generated examples."""

    def errors(self) -> dict[str, str]:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        unused = {
            name: "is for generated examples, not for those of folder; leave it out"
            for name in self.GENERATOR_OPTIONS
            if self.folder and getattr(self, name) != defaults[name]
        }
        return super().errors() | unused

    def sizes(self) -> dict[str, int]:
        """Number of generated examples of each split."""
        return {
            split: self.limit(split) or published for split, published in zip(SPLITS, self.SIZES, strict=True)
        }

    @property
    def source(self) -> dict[str, Any]:
        return {} if self.folder else {"data_seed": self.data_seed, "sizes": list(self.sizes().values())}
