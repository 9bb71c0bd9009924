"""Remote files: URLs (s3://, gs://, hf://, https://, ...) in place of local paths.

    URL, folder or glob -> RemotePath ...      has the methods of pathlib.Path that sources use
    RemotePath.open()   -> RemoteFile          seekable, of known size
    RemoteFile.read     -> ranges of bytes     fetched with retries (outages.py), each from where it broke

Sequential reads fetch blocks, which grow from FIRST_BLOCK to LAST_BLOCK bytes. `open_exact` fetches what is
read and nothing more: parquet reads the footer and the needed column chunks.
"""

import functools
import io
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, cast

from .outages import RemoteError, RetryPolicy
from .servers import HTTP, Info, Server, server, shown_url

FIRST_BLOCK, LAST_BLOCK = 1 << 16, 1 << 22  # bytes


def is_url(corpus: str) -> bool:
    """Whether a corpus is named by a URL (s3://...) rather than by a local path or a name."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", corpus) is not None


class ShortAnswerError(ConnectionError):
    """An answer ended before all bytes of the range had come."""


@functools.total_ordering
@dataclass(eq=False)
class RemotePath:
    """A remote file or folder, in place of a `pathlib.Path`.

    Sorted and compared by its URL. As a string it is the URL without credentials.
    """

    url: str
    server: Server
    _info: Info | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return shown_url(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __lt__(self, other: "RemotePath") -> bool:
        return self.url < other.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(str(self)).name

    def is_relative_to(self, root: "RemotePath") -> bool:
        """Whether the file is in this folder or below."""
        return str(self).startswith(str(root).rstrip("/") + "/")

    def relative_to(self, root: "RemotePath") -> PurePosixPath:
        """The path from a folder to this file."""
        return PurePosixPath(str(self).removeprefix(str(root).rstrip("/") + "/"))

    @property
    def info(self) -> Info:
        """What the server says of the file.

        Raises:
            RemoteError: it cannot be asked.
        """
        if self._info is None:
            self._info = self.server.info(self.url)
        return self._info

    def stat(self) -> SimpleNamespace:
        """The size in bytes, as `st_size`.

        Raises:
            RemoteError: the server cannot be asked, or does not know it.
        """
        if self.info.size is None:
            raise RemoteError(f"{self} has no known size, so parts of it cannot be read; download the file")
        return SimpleNamespace(st_size=self.info.size)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open for reading bytes, from the beginning on or after a seek."""
        assert mode == "rb", "remote files are read only"
        return io.BufferedReader(RemoteFile(self), buffer_size=FIRST_BLOCK)

    def open_exact(self) -> "RemoteFile":
        """Open for reading ranges here and there: nothing is read ahead."""
        return RemoteFile(self, reads_ahead=False)


def path_of(name: str, policy: RetryPolicy) -> Path:
    """A local path, or a remote one for a URL. A RemotePath has the methods of Path that sources use."""
    if not is_url(name):
        return Path(name)
    return cast(Path, RemotePath(name, server(name.partition("://")[0].lower(), policy)))


class RemoteFile(io.RawIOBase):
    """A remote file for reading.

    Args:
        path: the file.
        reads_ahead: whether reads fetch whole blocks; otherwise they fetch what is asked for.
    """

    def __init__(self, path: RemotePath, reads_ahead: bool = True):
        self._path, self._reads_ahead = path, reads_ahead
        self._size = path.stat().st_size
        self._offset = 0
        self._block, self._block_start, self._block_size = b"", 0, FIRST_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        self._offset = max(base + offset, 0)
        return self._offset

    def read(self, size: int | None = -1) -> bytes:
        """`size` bytes, fewer only at the end of the file."""
        end = self._size if size is None or size < 0 else min(self._offset + size, self._size)
        pieces = []
        while self._offset < end:
            piece = self._some(end - self._offset)
            self._offset += len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        piece = self._some(min(len(buffer), self._size - self._offset))
        buffer[: len(piece)] = piece
        self._offset += len(piece)
        return len(piece)

    def _some(self, size: int) -> bytes:
        """From 1 to `size` bytes at the offset; none only for a size of 0 or less."""
        if size <= 0:
            return b""
        start = self._offset - self._block_start
        if not 0 <= start < len(self._block):
            if not self._reads_ahead:
                return self._fetch(self._offset, self._offset + size)
            follows = self._block and start == len(self._block)
            self._block_size = min(self._block_size * 2, LAST_BLOCK) if follows else FIRST_BLOCK
            end = min(self._offset + self._block_size, self._size)
            self._block, self._block_start, start = self._fetch(self._offset, end), self._offset, 0
        return self._block[start : start + size]

    def _fetch(self, start: int, end: int) -> bytes:
        """The bytes of a range. After an error the missing part is asked for, not the whole range.

        Raises:
            RemoteError: it cannot be read.
        """
        data, url, server = bytearray(), self._path.url, self._path.server
        attempts = server.attempts(url)
        while len(data) < end - start:
            try:
                for piece in server.pieces(url, start + len(data), end, self._path.info):
                    data += piece
                    attempts.succeeded()
                if len(data) < end - start:
                    raise ShortAnswerError(f"an answer ended after {len(data):,} of {end - start:,} bytes")
            except Exception as error:  # each library raises its own
                attempts.failed(error)
        return bytes(data)


@functools.lru_cache(maxsize=16)
def remote_files(url: str, policy: RetryPolicy) -> tuple[list[RemotePath], RemotePath]:
    """Files that a URL, a folder or a glob names, sorted and without hidden ones, and the folder they are in.

    They are listed once in a process, so all its readers see the same files. The list is empty if nothing
    matches a glob, or a folder is empty.

    Raises:
        UserError: the protocol is unknown, or its package is missing.
        RemoteError: the server cannot be asked, or has no such file.
    """
    protocol = url.partition("://")[0].lower()
    host = server(protocol, policy)
    wildcards = "[*[]" if protocol in HTTP else "[*?[]"  # in HTTP, a ? begins the query
    if (first := re.search(wildcards, url)) is not None:
        root, found = url[: url.rindex("/", 0, first.start())], host.glob(url)
    elif found := host.folder(url):
        root = url.rstrip("/")
    else:
        path = RemotePath(url, host)
        path.stat()  # raises if there is none
        return [path], RemotePath(url[: url.rindex("/")], host)
    folder = RemotePath(host.canonical(root), host)
    files = [RemotePath(name, host, info) for name, info in found.items()]
    hidden = re.compile(r"(^|/)\.")
    return sorted(p for p in files if not hidden.search(str(p.relative_to(folder)))), folder
