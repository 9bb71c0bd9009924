"""The data path: from text to chunks of tokens, from a position that can be saved and restored."""

from .corpus import CorpusSpec, DocumentStream, has_fewer_texts, open_source
from .fingerprint import check_corpus, corpus_fingerprint
from .loader import Batch, ChunkLoader
from .lra import LabelledBatch, LabelledData, LabelledSet, LabelledTask, cache_folder, open_data
from .mixture import AnyCorpus, MixtureSpec, check_mixture, mixture_fingerprint, source_specs
from .prompts import TextStream, prompt_batch, prompt_tokens, read_prompt
from .reader import IGNORE_INDEX, Chunk, DocumentReader, ReaderSpec, WindowReader, corpus_tokens
from .synthetic import Task, TaskValidation
from .tasks import build_task, is_labelled, is_task, run_tokenizer
from .tokenizer import BYTES, Encoder, byte_tokenizer, load_tokenizer, model_vocab_size, tokenizer_fingerprint
from .validation import ValidationSet, document_validation, window_validation

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
    "LabelledBatch",
    "LabelledData",
    "LabelledSet",
    "LabelledTask",
    "MixtureSpec",
    "ReaderSpec",
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
    "corpus_fingerprint",
    "corpus_tokens",
    "document_validation",
    "has_fewer_texts",
    "is_labelled",
    "is_task",
    "load_tokenizer",
    "mixture_fingerprint",
    "model_vocab_size",
    "open_data",
    "open_source",
    "prompt_batch",
    "prompt_tokens",
    "read_prompt",
    "run_tokenizer",
    "source_specs",
    "tokenizer_fingerprint",
    "window_validation",
]
