"""Documents, read and tokenized ahead of the reader that cuts them into chunks.

    windows of a stream -> groups of documents -> tokens        (one group ahead for each tokenizing process)

A group is a part of one window: its documents are tokenized in one call. While a group is emitted, a thread
reads and tokenizes the next one, so a reader holds the texts of about one window, and the tokens of a few
groups of GROUP_CHARACTERS. With `helpers`, group k is tokenized by process k mod (1 + helpers); the windows
are still read by this process alone, one after the other, and the groups come in order.
"""

import collections
import contextlib
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .document_stream import DocumentStream, Window, WindowAddress
from .files import convert_read_errors
from .prepared.table import Table
from .sources import Document
from .tokenizer import Encoder
from .worker_process import ADVICE, Job, WorkerProcess

GROUP_CHARACTERS = 2**21  # of a group's documents together, at least one document


def encode_documents(encoder: Encoder, documents: Sequence[Document]) -> list[np.ndarray]:
    """The tokens of each document, `<bos> text <eos>`, of the encoder's dtype; without `<eos>` if the text
    goes on after it.

    Raises:
        UserError: the tokenizer fails, or a document does not fit into memory; the message names the
            document.
    """
    if isinstance(documents, Table):
        return encoder.with_bounds(documents.tokens)
    encoded = iter(_encode_texts(encoder, [document for document in documents if document.prepared is None]))
    prepared = iter(
        encoder.with_bounds([document.prepared.tokens for document in documents if document.prepared])
    )
    return [
        next(encoded)[: -1 if document.is_cut else None] if document.prepared is None else next(prepared)
        for document in documents
    ]


def encode_document(encoder: Encoder, document: Document) -> np.ndarray:
    """The tokens of a document, `<bos> text <eos>`, without `<eos>` if the text goes on after it.

    Raises:
        UserError: as `encode_documents`.
    """
    return encode_documents(encoder, [document])[0]


def _encode_texts(encoder: Encoder, documents: Sequence[Document]) -> list[np.ndarray]:
    try:
        return encoder.documents([document.text or "" for document in documents])
    except BaseException as error:  # a panic of a tokenizer (Rust) is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        for document in documents:  # which one is it?
            with convert_read_errors(document.name):
                encoder(document.text or "")
        raise


Documents = collections.deque[Document] | Table


def _divide(documents: Documents) -> tuple[list[Document] | Table, Documents]:
    """The first group of some documents, and the others."""
    if isinstance(documents, Table):
        sizes = np.cumsum([len(tokens) for tokens in documents.tokens])
        count = max(int(np.searchsorted(sizes, GROUP_CHARACTERS)), 1)
        return documents[:count], documents[count:]
    group, size = [], 0
    while documents and (not group or size + len(documents[0].text or "") < GROUP_CHARACTERS):
        group.append(documents.popleft())
        size += len(group[-1].text or "")
    return group, documents


@dataclass
class Group:
    """Consecutive documents of a window, tokenized."""

    window: WindowAddress
    position: dict[str, Any]
    """The window's address; JSON."""
    first: int
    """Index of the first document in the window."""
    names: list[str]
    documents: list[np.ndarray]
    """Each `<bos> text <eos>`"""
    is_last: bool
    """Whether the window ends with this group."""
    next_address: WindowAddress
    num_skipped: int
    """Broken documents of the window, counted in its first group."""
    num_filtered: int
    """Documents of the window that `data.filter` leaves out, counted likewise."""

    @property
    def end(self) -> int:
        """Index in the window of the document after this group."""
        return self.first + len(self.documents)


def call_in_thread(function: Callable[..., Any], *arguments: Any) -> Future:
    """Call a function in a thread of its own. The thread does not keep the interpreter from ending."""
    future: Future = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="read ahead", daemon=True).start()
    return future


class GroupStream:
    """The groups of a stream from a position on, read ahead.

    Args:
        stream: used by no one else from now on.
        encoder: of this process.
        window: the window to begin in, or the address of one.
        number: index of the first document to read in the window.
        helpers: further processes that tokenize.
    """

    def __init__(
        self,
        stream: DocumentStream,
        encoder: Encoder,
        window: Window | WindowAddress,
        number: int = 0,
        helpers: int = 0,
    ):
        self._stream, self._encoder, self._window, self._number = stream, encoder, window, number
        source = stream.spec.corpus
        self._encoders: list[Callable[[list[Document]], list[np.ndarray]]] = [
            lambda documents: encode_documents(encoder, documents),
            *(TokenizingProcess(encoder, source).encode for _ in range(helpers)),
        ]
        self._waiting: Documents | None = None
        self._put_back: collections.deque[Group] = collections.deque()
        self._ahead: collections.deque[Future] = collections.deque()
        self._last_read: Future = Future()
        self._last_read.set_result(None)
        self._count = 0
        for _ in self._encoders:
            self._start_next()

    def take(self) -> Group:
        """The next group.

        Raises:
            UserError: the corpus cannot be read.
        """
        if self._put_back:
            return self._put_back.popleft()
        group = self._ahead.popleft().result()
        self._start_next()
        return group

    def put_back(self, groups: Iterable[Group]) -> None:
        """Let `take` return these groups once more."""
        self._put_back.extend(groups)

    def _start_next(self) -> None:
        encode = self._encoders[self._count % len(self._encoders)]
        before, self._last_read = self._last_read, Future()
        self._ahead.append(call_in_thread(self._make, encode, before, self._last_read))
        self._count += 1

    def _make(self, encode: Callable[..., list[np.ndarray]], before: Future, done: Future) -> Group:
        """Read a group when the one before it has been read, then tokenize it."""
        try:
            before.result()
            group, documents = self._read()
        except BaseException as error:
            done.set_exception(error)
            raise
        done.set_result(None)
        if isinstance(documents, Table):  # no work for another process
            group.documents = encode_documents(self._encoder, documents)
        else:
            group.documents = encode(documents)
        return group

    def _read(self) -> tuple[Group, list[Document] | Table]:
        """The next group, still without tokens, and its documents."""
        skipped = filtered = 0
        if self._waiting is None:
            if isinstance(self._window, WindowAddress):
                self._window = self._stream.window(self._window)
            skipped, filtered = self._window.num_skipped, self._window.num_filtered
            documents = self._window.documents[self._number :]
            self._waiting = documents if isinstance(documents, Table) else collections.deque(documents)
            self._window.documents = []  # a text is freed when it has been tokenized
        window, first = self._window, self._number
        assert isinstance(window, Window)
        documents, self._waiting = _divide(self._waiting)
        self._number += len(documents)
        is_last = not self._waiting
        if is_last:
            self._waiting, self._window, self._number = None, window.next_address, 0
        group = Group(
            window.address,
            asdict(window.address),
            first,
            documents.names if isinstance(documents, Table) else [document.name for document in documents],
            [],
            is_last,
            window.next_address,
            skipped,
            filtered,
        )
        return group, documents


def encode_requests(encoder: Encoder) -> Iterator[list[np.ndarray]]:
    """In a worker: the tokens of the documents that arrive on standard input, until it ends."""
    while True:
        try:
            documents = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        yield encode_documents(encoder, documents)


class TokenizingProcess:
    """A process that tokenizes what another reads. It ends with the process that started it."""

    def __init__(self, encoder: Encoder, source: str):
        job = Job(encode_requests, (encoder,), source, "data.workers", ADVICE)
        self._process = WorkerProcess(job, lambda _: "documents", read_ahead=1, has_input=True)

    def encode(self, documents: list[Document]) -> list[np.ndarray]:
        """As `encode_documents`."""
        with contextlib.suppress(BrokenPipeError):  # it has died: `take` raises the reason
            self._process.send(documents)
        return self._process.take()
