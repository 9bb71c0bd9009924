"""Rows of a labelled data set: parquet files as on the hub, or the tab-separated files of Long Range Arena.

Each row comes with its name, file and number, for messages.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ..files import convert_read_errors

NamedRow = tuple[str, dict[str, Any]]
KEY = "data.task"


def split_files(folder: Path, patterns: list[str]) -> list[Path]:
    """The files of a split in a folder, sorted.

    Raises:
        UserError: there is no such folder, or no file matches any of the patterns.
    """
    if not folder.is_dir():
        raise UserError(KEY, f"folder: {folder} is no folder")
    for pattern in patterns:
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(KEY, f"folder: {folder} has no file {' or '.join(patterns)}")


def parquet_rows(path: Path, columns: list[str]) -> Iterator[NamedRow]:
    """The rows of a parquet file.

    Raises:
        UserError: it cannot be read, or lacks one of the columns.
    """
    import pyarrow.parquet

    with convert_read_errors(path), pyarrow.parquet.ParquetFile(path) as file:
        if missing := [column for column in columns if column not in file.schema_arrow.names]:
            found = ", ".join(file.schema_arrow.names)
            raise UserError(KEY, f"{path} has no column {' and no '.join(missing)}; its columns: {found}")
        number = 0
        for batch in file.iter_batches(256, columns=columns):
            for row in batch.to_pylist():
                yield f"{path}[{number}]", row
                number += 1


def tsv_rows(path: Path, columns: list[str], has_header: bool) -> Iterator[NamedRow]:
    """The rows of a tab-separated file; names count lines from 1.

    Raises:
        UserError: it cannot be read, or a row has another number of columns.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with convert_read_errors(path), path.open(newline="", encoding="utf-8") as file:
        quoting = csv.QUOTE_MINIMAL if has_header else csv.QUOTE_NONE
        for number, fields in enumerate(csv.reader(file, delimiter="\t", quoting=quoting), start=1):
            if has_header and number == 1:
                if fields != columns:
                    raise UserError(KEY, f"{path}: its first line must be {' '.join(columns)}")
                continue
            if len(fields) != len(columns):
                problem = f"has {len(fields)} columns, not {len(columns)} ({', '.join(columns)})"
                raise UserError(KEY, f"{path}:{number} {problem}")
            yield f"{path}:{number}", dict(zip(columns, fields, strict=True))


def hub_rows(name: str, split: str, columns: list[str], revision: str) -> Iterator[NamedRow]:
    """The rows of a dataset of the hub; images stay encoded.

    Raises:
        UserError: it cannot be loaded or read.
    """
    import datasets

    with convert_read_errors(f"{name} of the hub"):
        rows: Any = datasets.load_dataset(name, split=split, revision=revision, streaming=True)
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        for number, row in enumerate(rows):
            yield f"{name} {split}[{number}]", {column: row[column] for column in columns}


def hub_file(repository: str, name: str, revision: str) -> Path:
    """A file of a dataset of the hub, downloaded.

    Raises:
        UserError: it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    with convert_read_errors(f"{repository} of the hub"):
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
