"""Prepared corpora: the tokens of a corpus on disk, made once by `minrnn prepare`, read by memory-mapping.

corpus -> shards of tokens, in parallel (make.py, write.py)    prepared folder -> documents (source.py)
"""

from .manifest import (
    MANIFEST,
    check_prepared_tokenizer,
    is_prepared,
    prepared_corpora,
    prepared_tokenizer,
    read_manifest,
)
from .source import PreparedCorpus

__all__ = [
    "MANIFEST",
    "PreparedCorpus",
    "check_prepared_tokenizer",
    "is_prepared",
    "prepared_corpora",
    "prepared_tokenizer",
    "read_manifest",
]
