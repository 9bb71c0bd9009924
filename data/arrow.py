"""Datasets that `datasets` saved with `save_to_disk`: Arrow files, memory-mapped, each row a document."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..common.errors import UserError, one_line_message
from ..common.names import did_you_mean, nearest_names
from .files import convert_read_errors
from .row_filter import EVERY_ROW, RowRules
from .rows import STREAM_BYTES, check_columns, python_value
from .sources import Document, Part, Position, row_document

DATASET, DATASET_DICT = "state.json", "dataset_dict.json"  # the files that tell such a folder
BATCH_ROWS, PART_ROWS = 64, 256


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    is_dataset = (folder / DATASET).is_file() and (folder / "dataset_info.json").is_file()
    return is_dataset or has_saved_splits(folder)


def has_saved_splits(folder: Path) -> bool:
    """Whether a folder is a DatasetDict, which has splits."""
    return (folder / DATASET_DICT).is_file()


@dataclass
class SavedDataset:
    """A dataset on the disk. Its shards are as many runs of rows as it has Arrow files.

    Args:
        folder: a dataset, or a DatasetDict, of which `split` is read.
    """

    folder: Path
    split: str
    text_field: str
    skip_broken: bool = False
    group_field: str | None = None
    rules: RowRules = EVERY_ROW
    skips_unread: ClassVar[bool] = True
    _dataset: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        import datasets

        try:
            saved = datasets.load_from_disk(str(self.folder))
        except Exception as error:  # datasets and pyarrow each raise their own
            message = f"{self.folder} is no whole dataset of save_to_disk ({one_line_message(error)})"
            raise UserError("data.corpus", f"{message}; save it again") from error
        if isinstance(saved, datasets.DatasetDict):
            if self.split not in saved:
                suggested = map(repr, nearest_names(self.split, map(str, saved)))
                advice = did_you_mean(suggested, otherwise="name one of them")
                known = ", ".join(map(repr, saved))
                raise UserError(
                    "data.split", f"{self.folder} has no split {self.split!r}; it has {known} ({advice})"
                )
            saved = saved[self.split]
        elif self.split not in ("train", str(saved.split)):
            message = f"{self.folder} is one dataset without splits, so it has no {self.split!r}"
            raise UserError("data.split", f"{message}; leave data.split out")
        self._size = saved.data.nbytes
        self._files = max(len(saved.cache_files), 1)
        check_columns(saved.column_names, self.text_field, self.group_field, self.rules, self.folder)
        columns = self.rules.columns(self.text_field, self.group_field)
        self._dataset = saved.select_columns(columns).with_format("arrow")

    @property
    def num_shards(self) -> int:
        return self._files

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        size = len(self._dataset)
        return range(shard * size // self._files, (shard + 1) * size // self._files)

    @property
    def is_stream(self) -> bool:
        """Whether reading all of it takes long."""
        return self._size >= STREAM_BYTES

    def cuts(self, shard: int) -> Sequence[int]:
        rows = len(self.rows(shard))
        return [*range(0, rows, PART_ROWS), rows] if rows else (0, 0)

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        return self.read_part(Part(shard), start)

    def read_part(self, part: Part, start: Position) -> Iterator[Document]:
        rows = self.rows(part.shard)
        begin, end = part.within or (0, len(rows))
        wanted = list(filter(part.has, range(max(begin, start.index), end)))
        with convert_read_errors(self.folder):
            for number in range(0, len(wanted), BATCH_ROWS):
                indices = wanted[number : number + BATCH_ROWS]
                table = self._dataset[[rows.start + index for index in indices]]
                for index, row in zip(indices, table_rows(table), strict=True):
                    name = f"{self.folder}[{rows.start + index}]"
                    yield row_document(
                        row, name, index, self.text_field, self.group_field, self.rules, self.skip_broken
                    )

    def hint(self) -> None:
        return None


def table_rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow table as dictionaries. Strings that are not UTF-8 are bytes."""
    for number in range(len(table)):
        yield {name: python_value(table.column(name)[number]) for name in table.column_names}
