"""Servers of remote files: how files are listed, and how ranges of their bytes are read.

HTTP is read with `requests`: fsspec's client loses the received part of a broken answer, and reports every
error of a HEAD as a missing file. All other protocols are fsspec's.
"""

import functools
import html.parser
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import urljoin, urlsplit, urlunsplit

from ..common.errors import UserError
from ..common.names import did_you_mean, nearest_names
from .outages import Announcements, Attempts, RemoteError, RetryPolicy

T = TypeVar("T")
HTTP = ("http", "https")
PAGE_SUFFIXES = (".html", ".htm", ".xhtml")
PIECE = 1 << 16  # bytes


def shown_url(url: str) -> str:
    """A URL for messages: without a password, and without a query, which may be a signature."""
    parts = urlsplit(url)
    if parts.scheme not in HTTP:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True)
class Info:
    """What a server says of a file."""

    size: int | None
    version: str | None = None
    """Changes if the file's content changes (an ETag, a checksum, a time); None if the server gives none."""


class Server:
    """Files of one protocol: how they are listed and how ranges of them are read.

    Args:
        protocol: of fsspec.
        policy: how long an outage is waited for.
    """

    def __init__(self, protocol: str, policy: RetryPolicy):
        self.protocol, self.policy = protocol, policy
        self.fs = _file_system(protocol)
        self._announcements: dict[str, Announcements] = {}

    def attempts(self, url: str) -> Attempts:
        """The tries of a read of this URL."""
        host = urlsplit(url).netloc
        return Attempts(shown_url(url), self.policy, self._announcements.setdefault(host, Announcements()))

    def call(self, url: str, function: Callable[[], T]) -> T:
        """Return `function()`, retried during an outage.

        Raises:
            RemoteError: it cannot be read.
        """
        attempts = self.attempts(url)
        while True:
            try:
                return function()
            except Exception as error:  # each library raises its own
                attempts.failed(error)

    def glob(self, url: str) -> dict[str, Info | None]:
        """The files that a glob matches; None for what must be asked of each file."""
        found = self.call(url, lambda: self.fs.glob(url, detail=True))
        return self._infos(cast(dict[str, Any], found))

    def folder(self, url: str) -> dict[str, Info | None]:
        """The files in a folder and the folders in it; empty if the URL is not a folder."""
        found = self.call(url, lambda: self.fs.find(url, detail=True) if self.fs.isdir(url) else {})
        return self._infos(cast(dict[str, Any], found))

    def _infos(self, found: dict[str, Any]) -> dict[str, Info | None]:
        return {
            self.fs.unstrip_protocol(name): _info(entry) if entry.get("size") is not None else None
            for name, entry in found.items()
            if entry["type"] != "directory"
        }

    def canonical(self, url: str) -> str:
        """The URL in the form in which the file system lists it."""
        return self.fs.unstrip_protocol(self.fs._strip_protocol(url))

    def info(self, url: str) -> Info:
        """Size and version of a file."""
        return self.call(url, lambda: _info(self.fs.info(url)))

    def pieces(self, url: str, start: int, end: int, expected: Info) -> Iterator[bytes]:
        """The bytes of a range, in pieces as they come. It may end early.

        Raises:
            RemoteError: the file is not the `expected` one any more.
        """
        import fsspec.asyn

        if isinstance(self.fs, fsspec.asyn.AsyncFileSystem):
            path = self.fs._strip_protocol(url)
            yield cast(
                bytes,
                fsspec.asyn.sync(
                    self.fs.loop, self.fs._cat_file, path, start=start, end=end, timeout=self.policy.timeout
                ),
            )
        else:
            yield self.fs.cat_file(url, start=start, end=end)


class _LinkParser(html.parser.HTMLParser):
    """Collects the targets of the links of a page."""

    def __init__(self):
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]


class HttpServer(Server):
    """Files of web servers. They are listed if the server has index pages."""

    def __init__(self, policy: RetryPolicy):
        self.policy = policy
        self._announcements = {}
        self._sessions = threading.local()

    def canonical(self, url: str) -> str:
        return url

    def glob(self, url: str) -> dict[str, Info | None]:
        from fsspec.utils import glob_translate

        root = url[: url.rindex("/", 0, next(re.finditer(r"[*[]", url)).start()) + 1]
        depth = None if "**" in url else url[len(root) :].count("/")
        pattern = re.compile(glob_translate(url))
        return {name: None for name in self._files(root, depth) if pattern.match(name)}

    def folder(self, url: str) -> dict[str, Info | None]:
        return dict.fromkeys(self._files(url, None)) if url.endswith("/") else {}

    def _files(self, folder: str, depth: int | None) -> Iterator[str]:
        """The files that an index page links to, and those of the folders below it up to a depth."""
        for link in self.call(folder, lambda: self._links(folder)):
            if not link.endswith("/"):
                yield link
            elif depth is None or depth > 0:
                yield from self._files(link, None if depth is None else depth - 1)

    def _links(self, folder: str) -> list[str]:
        """What an index page links to below its own folder."""
        with self._session().get(folder, timeout=self.policy.timeout) as answer:
            answer.raise_for_status()
            if not answer.headers.get("Content-Type", "").startswith("text/html"):
                message = f"{shown_url(folder)} is not an index page, so its files cannot be listed"
                raise RemoteError(f"{message}; name each file, or a folder that the server lists")
            page = _LinkParser()
            page.feed(answer.text)
            links = {urljoin(answer.url, link) for link in page.links}
            here = answer.url
        # a page links to itself in other orders (?C=N;O=D), and the topmost one to itself as its parent
        links = {link for link in links if link.startswith(here) and not set(link) & set("?#")}
        return sorted(links - {here})

    def _session(self) -> Any:
        """This thread's session: one is not safe to share between threads."""
        import requests

        if not hasattr(self._sessions, "session"):
            self._sessions.session = requests.Session()
        return self._sessions.session

    def _get(self, url: str, start: int, end: int) -> Any:
        """The answer to a request for a range, without its body."""
        # compressed, a range would count other bytes than those of the file
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        return self._session().get(url, headers=headers, stream=True, timeout=self.policy.timeout)

    def info(self, url: str) -> Info:
        """Size and version of a file. A GET is used: signed URLs forbid HEAD, and HEAD may omit the size."""

        def ask() -> Info:
            with self._get(url, 0, 1) as answer:
                size = _total_size(answer)
                if answer.status_code == 416 and size == 0:
                    return Info(0)
                _check(answer, url)
                return Info(size, _version(answer))

        return self.call(url, ask)

    def pieces(self, url: str, start: int, end: int, expected: Info) -> Iterator[bytes]:
        with self._get(url, start, end) as answer:
            if answer.status_code != 416:
                _check(answer, url)
            now = Info(_total_size(answer), _version(answer))
            if answer.status_code == 416 or now != expected:
                raise RemoteError(f"{shown_url(url)} has changed on its server while the run read it")
            while piece := answer.raw.read1(PIECE, decode_content=False):
                yield piece


def _check(answer: Any, url: str) -> None:
    """Check that an answer holds a range of a file.

    Raises:
        requests.HTTPError: the status is an error.
        RemoteError: the answer is a web page, or the whole file.
    """
    answer.raise_for_status()
    name, path = shown_url(url), urlsplit(url).path.lower()
    if answer.headers.get("Content-Type", "").startswith("text/html") and not path.endswith(PAGE_SUFFIXES):
        head = answer.raw.read(2048, decode_content=False).decode(errors="replace")
        title = re.search(r"<title>\s*(.*?)\s*</title>", head, re.IGNORECASE | re.DOTALL)
        page = "an HTML page" + (f' ("{title[1][:80]}")' if title else "")
        message = f"{name} gives {page} instead of a file; if it is a login page, download the file"
        raise RemoteError(f"{message}, or name the address that gives the file itself")
    if answer.status_code != 206:
        message = f"{name} cannot be read in parts: its server ignores range requests"
        raise RemoteError(
            f"{message}; download the file, or serve it with one that answers them (nginx, caddy)"
        )


def _total_size(answer: Any) -> int | None:
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _version(answer: Any) -> str | None:
    """The strong ETag, or the time of the last change. A weak ETag may differ between equal copies."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified")


def _info(entry: dict[str, Any]) -> Info:
    """The information of an entry of fsspec. The keys of the version differ between protocols."""
    names = (
        "ETag",
        "etag",
        "blob_id",
        "md5Hash",
        "generation",
        "LastModified",
        "updated",
        "created",
        "mtime",
    )
    version = next((str(entry[name]) for name in names if entry.get(name)), None)
    return Info(entry.get("size"), version)


@functools.cache
def server(protocol: str, policy: RetryPolicy) -> Server:
    """The server of a protocol, one for each process, so that connections are used again.

    Raises:
        UserError: there is no such protocol, or its package is not installed.
    """
    return HttpServer(policy) if protocol in HTTP else Server(protocol, policy)


def _file_system(protocol: str) -> Any:
    import fsspec
    from fsspec.registry import known_implementations

    if protocol not in fsspec.available_protocols():
        names = (f"{name}://" for name in nearest_names(protocol, fsspec.available_protocols(), cutoff=0.6))
        advice = did_you_mean(names, otherwise="s3, gs, az, hf, http and https are some that there are")
        raise UserError("data.corpus", f"{protocol}:// is not a protocol of fsspec ({advice})")
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        if package == "fsspec":
            reason = known_implementations[protocol].get("err", str(error))
            raise UserError("data.corpus", f"{protocol}:// cannot be read: {reason}") from None
        raise UserError("data.corpus", f"{protocol}:// needs {package}: pip install {package}") from None
    except Exception as error:  # a protocol that needs options, such as a host
        raise UserError(
            "data.corpus", f"{protocol}:// cannot be read: {type(error).__name__}: {error}"
        ) from None
