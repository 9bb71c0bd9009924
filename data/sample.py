"""A bounded sample of a corpus, spread over it.

Of 16 shards at a time, spread over the corpus, one document each in turn. Nothing is read beyond what is
taken.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .corpus import CorpusSpec, Split, open_source
from .document_stream import DocumentStream
from .parts import read_part
from .read_ahead import encode_document
from .sources import Document, Position
from .tokenizer import Encoder

SHARDS_AT_ONCE = 16


def sample_documents(spec: CorpusSpec, part: Split) -> Iterator[tuple[Document, bool]]:
    """All documents, those that are left out included, and whether each is read and belongs to the part.

    Raises:
        UserError: the corpus cannot be read.
    """
    stream = DocumentStream(spec, part, 0, 1, window=1, seed=None)
    parts = stream.shares.owned[0]
    stride = -(-len(parts) // SHARDS_AT_ONCE)
    # each has its own source, which remembers where it reads
    sources = [open_source(spec, part) for _ in parts[:SHARDS_AT_ONCE]]
    for first in range(stride):
        opened = [
            read_part(source, chosen, Position())
            for source, chosen in zip(sources, parts[first::stride], strict=False)
        ]
        for document in itertools.chain.from_iterable(itertools.zip_longest(*opened)):
            if document is not None:
                yield document, not document.is_left_out and stream.is_in_part(document)


@dataclass
class Counts:
    """What was counted in a sample of a part of a corpus."""

    lengths: list[int] = field(default_factory=list)
    """Tokens of each document, `<bos>` and `<eos>` included."""
    bytes: int = 0
    """Of the texts, in UTF-8."""
    others: int = 0
    """Documents of the other part."""
    skipped: int = 0
    """Broken parts that are left out."""
    filtered: int = 0
    """Parts that `data.filter` leaves out."""
    empty: int = 0
    is_whole: bool = False
    """Whether the corpus was read to its end."""

    @property
    def documents(self) -> int:
        """Number of documents of the part."""
        return len(self.lengths)

    @property
    def num_seen(self) -> int:
        """Number of documents of both parts, those that are left out included."""
        return self.documents + self.others + self.filtered + self.skipped

    @property
    def tokens(self) -> int:
        """Number of scored tokens: those of the texts, and one `<eos>` each."""
        return sum(self.lengths) - len(self.lengths)


def count(
    documents: Iterable[tuple[Document, bool]], encoder: Encoder, max_documents: int, seconds: float
) -> Counts:
    """Count documents until there are `max_documents` of them (of both parts), or the time is over."""
    counts, end = Counts(), time.monotonic() + seconds
    for number, (document, is_in_part) in enumerate(documents, start=1):
        counts.skipped += document.num_skipped
        counts.filtered += document.num_filtered
        if is_in_part:
            counts.lengths.append(len(encode_document(encoder, document)))
            counts.bytes += document.num_bytes
            counts.empty += document.num_bytes == 0
        else:
            counts.others += not document.is_left_out
        if number == max_documents or time.monotonic() > end:
            return counts
    counts.is_whole = True
    return counts
