"""The data path: from text to chunks of tokens, from a position that can be saved and restored."""

from .chunk import IGNORE_INDEX, Chunk
from .corpus import CorpusSpec, has_fewer_texts, has_splits, is_hub_dataset, open_source
from .document_stream import DocumentStream, open_shares
from .fingerprint import check_corpus, check_same_text, corpus_fingerprint
from .hub import resolve_commit
from .loader import Batch, ChunkLoader
from .lra import LabelledBatch, LabelledData, LabelledSet, LabelledTask, cache_folder, open_data
from .mixture import AnyCorpus, MixtureSpec, check_mixture, mixture_fingerprint, source_specs
from .outages import RetryPolicy
from .prepared import PreparedCorpus, is_prepared, prepared_corpora, prepared_tokenizer
from .prompts import TextStream, prompt_batch, prompt_tokens, read_prompt
from .reader import DocumentReader, ReaderSpec, WindowReader, corpus_tokens
from .row_filter import RowRules
from .synthetic import Task, TaskValidation
from .tasks import build_task, is_labelled, is_task, run_tokenizer
from .tokenizer import (
    BYTES,
    Encoder,
    byte_tokenizer,
    has_fingerprint,
    load_tokenizer,
    model_vocab_size,
    num_token_ids,
    tokenizer_fingerprint,
)
from .validation import HeldOut, ValidationSet, concatenated, held_out_documents, held_out_text
from .validation_file import is_held_out_folder, load_held_out, made_from, save_held_out

__all__ = [
    "BYTES",
    "IGNORE_INDEX",
    "AnyCorpus",
    "Batch",
    "Chunk",
    "ChunkLoader",
    "CorpusSpec",
    "DocumentReader",
    "DocumentStream",
    "Encoder",
    "HeldOut",
    "LabelledBatch",
    "LabelledData",
    "LabelledSet",
    "LabelledTask",
    "MixtureSpec",
    "PreparedCorpus",
    "ReaderSpec",
    "RetryPolicy",
    "RowRules",
    "Task",
    "TaskValidation",
    "TextStream",
    "ValidationSet",
    "WindowReader",
    "build_task",
    "byte_tokenizer",
    "cache_folder",
    "check_corpus",
    "check_mixture",
    "check_same_text",
    "concatenated",
    "corpus_fingerprint",
    "corpus_tokens",
    "has_fewer_texts",
    "has_fingerprint",
    "has_splits",
    "held_out_documents",
    "held_out_text",
    "is_held_out_folder",
    "is_hub_dataset",
    "is_labelled",
    "is_prepared",
    "is_task",
    "load_held_out",
    "load_tokenizer",
    "made_from",
    "mixture_fingerprint",
    "model_vocab_size",
    "num_token_ids",
    "open_data",
    "open_shares",
    "open_source",
    "prepared_corpora",
    "prepared_tokenizer",
    "prompt_batch",
    "prompt_tokens",
    "read_prompt",
    "resolve_commit",
    "run_tokenizer",
    "save_held_out",
    "source_specs",
    "tokenizer_fingerprint",
]
