"""The texts and the tokenizer of `minrnn bench data`."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...data import CorpusSpec, DocumentStream, load_tokenizer
from ...data.train_tokenizer import train_tokenizer

DOCUMENTS = {"short": 1000, "long": 1_000_000}
"""Lengths of documents, in characters."""
VOCABULARY = 32_000


def corpus_texts(corpus: str, megabytes: int) -> Iterator[str]:
    """The documents of a corpus, up to so many million characters."""
    size = 0
    for document in DocumentStream(CorpusSpec(corpus), "train", 0, 1, window=256, seed=None).one_epoch():
        if size >= 1e6 * megabytes:
            return
        size += len(document.text or "")
        yield document.text or ""


def texts_of(corpus: str, documents: str, megabytes: int) -> list[str]:
    """The text of a corpus as documents: `own`, or of a length of DOCUMENTS, cut at line ends."""
    texts = corpus_texts(corpus, megabytes)
    if documents == "own":
        return list(texts)
    lines = itertools.chain.from_iterable(text.splitlines(keepends=True) for text in texts)
    made, parts, size = [], [], 0
    for line in lines:
        parts.append(line)
        size += len(line)
        if size >= DOCUMENTS[documents]:
            made.append("".join(parts))
            parts, size = [], 0
    return [*made, "".join(parts)] if parts else made


def trained_bpe(cache: Path) -> Any:
    """A byte-level BPE of VOCABULARY tokens, trained on the standard library.

    Args:
        cache: folder in which it is kept for the next time.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    folder = cache / f"bench-bpe-{VOCABULARY}-python-{version}"
    if not folder.exists():
        unfinished = cache / f".{folder.name}.unfinished"
        train_tokenizer(corpus_texts("python-stdlib", 32), VOCABULARY).save_pretrained(unfinished)
        unfinished.rename(folder)
    return load_tokenizer(str(folder))
