"""The kind of each file of a corpus (rows or text) and its compression.

A known suffix decides the kind. Otherwise (`.json`, `part-0001`, `data.gz`) the first bytes decide.
Compression is always detected from the first bytes, so a `.jsonl.gz` that a browser has decompressed is read
too.
"""

import codecs
import errno
import io
import json
import mimetypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal, cast

from ..common.errors import StorageError, UserError, one_line_message
from .remote import RemotePath

Kind = Literal["text", "jsonl", "csv", "parquet", "binary"]

COMPRESSED = (".gz", ".zst", ".zstd")
ROWS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
HEAD_BYTES = 8192
SIGNATURES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive (or a file made of one: docx, npz, pt)",
    b"BZh": "compressed with bzip2; decompress it",
    b"\xfd7zXZ": "compressed with xz; decompress it",
    b"\x04\x22\x4d\x18": "compressed with lz4; decompress it",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x93NUMPY": "a NumPy array",
    b"ARROW1": "an Arrow file; convert it to parquet",
    b"PAR1": "a parquet file; its name should end in .parquet",
    b"SQLite format 3": "an SQLite database",
    b"\x7fELF": "a program",
    b"\xff\xfe": "UTF-16; convert it to UTF-8",
    b"\xfe\xff": "UTF-16; convert it to UTF-8",
}


def open_binary(path: Path | str) -> Any:
    """Open a file, or the file of a URL, for reading bytes at any position. Of a RemotePath, nothing is read
    ahead."""
    if isinstance(path, RemotePath):
        return path.open_exact()
    if isinstance(path, Path):
        return path.open("rb")
    from fsspec.core import url_to_fs

    system, name = url_to_fs(path)
    return system.open(name, "rb")


def compression(path: Path) -> Literal["gzip", "zstd"] | None:
    """The compression of a file, detected from its first bytes."""
    with path.open("rb") as file:
        return _codec(file.read(4))


def _codec(head: bytes) -> Literal["gzip", "zstd"] | None:
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    # parallel compressors begin with a skippable frame
    is_skippable = len(head) == 4 and 0x50 <= head[0] <= 0x5F and head[1:] == b"\x2a\x4d\x18"
    return "zstd" if head == b"\x28\xb5\x2f\xfd" or is_skippable else None


def open_decompressed(path: Path) -> io.BufferedReader:
    """Open a file for reading its decompressed bytes; compressed files may have several members.

    Damaged compressed data raises an OSError without an errno.
    """
    file = path.open("rb")
    codec = _codec(file.peek(4)[:4])
    if codec is None:
        return file
    import pyarrow

    source: Any = file
    if isinstance(path, Path):  # pyarrow reads a local file faster by itself
        file.close()
        source = str(path)
    stream = pyarrow.input_stream(source, compression=codec)
    return io.BufferedReader(cast(io.RawIOBase, stream))


def is_damage_error(error: Exception) -> bool:
    """Whether a read error means damaged content rather than a failing disk.

    Arrow raises ArrowInvalid (a ValueError) or an OSError without an errno if bytes cannot be decompressed or
    decoded.
    """
    return isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is None)


@contextmanager
def convert_read_errors(name: Path | str) -> Iterator[None]:
    """Turn every read error in the body into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        advice = (
            "cut it into smaller documents or row groups, or use fewer data.workers and a smaller "
            "data.shuffle_window"
        )
        raise UserError("data.corpus", f"{name} does not fit into memory; {advice}") from None
    except StorageError as error:  # a remote file; the message names it and says what to do
        raise UserError("data.corpus", str(error)) from None
    except FileNotFoundError as error:
        why = f"{name} cannot be read any more ({os.strerror(error.errno or errno.ENOENT)})"
        raise UserError(
            "data.corpus", f"{why}; a run can resume only with the corpus it began with"
        ) from None
    except OSError as error:  # permissions, a disk, a network
        raise UserError(
            "data.corpus",
            f"{name} cannot be read ({os.strerror(error.errno) if error.errno else one_line_message(error)})",
        ) from None
    except Exception as error:  # pyarrow, datasets and the hub's client each raise their own
        raise UserError("data.corpus", f"{name} cannot be read ({one_line_message(error)})") from error


def binary_format(head: bytes) -> str | None:
    """A description of the binary format that begins with these bytes, or None for text."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    for signature, name in SIGNATURES.items():
        if head.startswith(signature):
            return name
    return "binary: it holds NUL bytes (if it is UTF-16, convert it to UTF-8)" if b"\0" in head else None


def binary_file_error(path: Path, head: bytes | None = None) -> UserError:
    """The error for a binary file that would be read as text."""
    content = binary_format(_head(path) if head is None else head)
    advice = (
        "name the files to read with a glob such as DIR/**/*.txt, "
        "or set data.skip_broken to leave such files out"
    )
    return UserError("data.corpus", f"{path} is not text but {content}; {advice}")


def inner_suffix(path: Path) -> str:
    """The suffix before any compression suffix, in lower case: `.jsonl` for `a.JSONL.gz`."""
    suffixes = [suffix.lower() for suffix in PurePath(path.name).suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


# Python's own table. The system's table would make the corpus depend on the machine.
_types = mimetypes.MimeTypes()


def file_kind(path: Path) -> Kind | None:
    """The kind of a file; None for an empty file whose name does not tell.

    Raises:
        UserError: the file cannot be opened, or is JSON but not JSON lines.
    """
    suffix = inner_suffix(path)
    if suffix in ROWS:
        return ROWS[suffix]
    media_type = _types.types_map[True].get(suffix, "")
    if media_type.startswith("text/"):
        return "text"
    with convert_read_errors(path):
        head = _head(path)
    if not head:
        return None
    if suffix == ".json":
        check_json_lines(head, path)
        return "jsonl"
    if head.startswith(b"PAR1"):
        return "parquet"
    if binary_format(head) is not None:
        return "binary"
    has_no_type = not suffix or suffix[1:].isdigit()  # part-0001, part.0001
    return "jsonl" if has_no_type and _begins_with_object(head) else "text"


def _head(path: Path) -> bytes:
    try:
        with open_decompressed(path) as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        if not is_damage_error(error):
            raise
        with path.open("rb") as file:  # damaged compression: reading the corpus reports it
            return file.read(HEAD_BYTES)


def _begins_with_object(head: bytes) -> bool:
    line, newline, _ = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not newline and len(head) >= HEAD_BYTES:  # the line is longer than the head
        return re.match(rb'\{\s*"', line) is not None
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def check_json_lines(head: bytes, path: Path) -> None:
    """Check the first bytes of a JSON lines file.

    Raises:
        UserError: the file is an array or pretty-printed JSON; the message says how to convert it.
    """
    line, newline, _ = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    line = line.rstrip()
    advice = "write one object a line, e.g. with jq -c"
    if line.startswith(b"["):
        raise UserError(
            "data.corpus",
            f"{path} is one JSON array, not an object a line; {advice} '.[]' IN.json > OUT.jsonl",
        )
    if newline and (line == b"{" or (line.startswith(b"{") and line.endswith((b'",', b"[", b"{", b":")))):
        raise UserError(
            "data.corpus",
            f"{path} is JSON whose objects go over several lines; {advice} . IN.json > OUT.jsonl",
        )
