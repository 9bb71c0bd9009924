"""The texts and the tokenizer of `minrnn bench data`."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...common.files import make_folder
from ...data import CorpusSpec, DocumentStream
from ...data.tokenizer import document_tokenizer

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


def train_bpe(cache: Path) -> Any:
    """A byte-level BPE of 32,000 tokens with GPT-2's words, trained on the standard library.

    Args:
        cache: folder in which it is kept for the next time.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    version = ".".join(map(str, sys.version_info[:3]))
    file = cache / f"bench-bpe-{VOCABULARY}-python-{version}.json"
    if not file.exists():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=alphabet,
            special_tokens=["<bos>", "<eos>", "<pad>"],
            show_progress=False,
        )
        backend.train_from_iterator(corpus_texts("python-stdlib", 32), trainer)
        make_folder(cache)
        unfinished = file.with_suffix(".unfinished")
        backend.save(str(unfinished))
        unfinished.rename(file)
    loaded = PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    return document_tokenizer(loaded, "bpe")
