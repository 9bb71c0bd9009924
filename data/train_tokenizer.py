"""Trains a byte-level BPE tokenizer on the documents of a corpus.

    documents of all shards in turn, up to a number of bytes -> byte-level BPE -> PreTrainedTokenizerFast

Any text can be encoded, since every byte is a token, and decoding restores it exactly. The vocabulary is
<bos>, <eos>, <pad>, the 256 bytes, and merges. Training is deterministic: ties are broken by the order of the
tokens, and the sample depends on the corpus only.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..common.errors import UserError
from .corpus import CorpusSpec
from .sample import sample_documents
from .tokenizer import SAVED_SETTINGS, SPECIAL_TOKENS, num_bytes

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_TOKEN_CHARACTERS = 128  # a longer one would be a run of spaces or a copied line


def sample_texts(
    spec: CorpusSpec, max_bytes: int, on_progress: Callable[[int], object] = lambda size: None
) -> Iterator[str]:
    """Training documents, up to `max_bytes` bytes, spread over the corpus (`sample_documents`).

    Args:
        on_progress: called with the bytes of each text.

    Raises:
        UserError: the corpus cannot be read, or is a prepared one.
    """
    size = 0
    for document, is_in_part in sample_documents(spec, "train"):
        if not is_in_part:
            continue
        if document.text is None:
            message = f"{spec.corpus} is prepared and has no text; name the corpus that it was made of"
            raise UserError("data.corpus", message)
        text = document.text[: max_bytes - size]
        size += num_bytes(text)
        on_progress(num_bytes(text))
        yield text
        if size >= max_bytes:
            return


def check_vocab_size(vocab_size: int) -> None:
    """Check that a vocabulary holds the bytes and the special tokens.

    Raises:
        UserError: it is smaller.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        message = f"must be at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        raise UserError("--vocab-size", f"{message}, not {vocab_size}")


def train_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Any:
    """A byte-level BPE tokenizer of `vocab_size` tokens, special ones included.

    Args:
        texts: the documents.
        show_progress: show the library's bars for counting words and for merges.

    Returns:
        A `PreTrainedTokenizerFast` with bos, eos and pad, which writes bos before a text.

    Raises:
        UserError: the vocabulary is smaller than the bytes and special tokens, or the texts have too few
            different words for it.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=show_progress,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=MAX_TOKEN_CHARACTERS,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        message = f"{vocab_size} tokens cannot be learned from this text, which has words for {reached}"
        raise UserError("--vocab-size", f"{message}; use at most {reached}, or more text (--max-bytes)")
    bos, eos, pad = SPECIAL_TOKENS
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, backend.token_to_id(bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, **SAVED_SETTINGS
    )
