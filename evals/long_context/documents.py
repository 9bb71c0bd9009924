"""The document and the model of `minrnn long-context` and `minrnn rolling`: arguments, loading, head of the
results.
"""

import argparse
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...common.checks import option_minimum_errors
from ...common.errors import UserError
from ...common.files import user_path
from ...common.names import did_you_mean, nearest_names
from ...common.output import warn
from ...data import (
    BYTES,
    CorpusSpec,
    Encoder,
    byte_tokenizer,
    is_prepared,
    open_source,
    tokenizer_fingerprint,
)
from ...data.corpus import PYTHON_STDLIB, SPLIT_BY_FILE
from ...data.joined import PACKAGE, join_documents
from ...data.sources import Document, Position, Source, TextFiles
from ...models import MinRNNForCausalLM
from ...pipeline.loading import load, require_state
from ...pipeline.options import add_device, add_dtype, add_model, add_trust, new_parser
from ...pipeline.public import public_value
from ..output import out_errors
from ..record import command_line, commit, machine, versions

NONE = "none"  # for --join: documents as they are
SHORTEST = 256  # tokens that a document must have
NUM_NAMES = 10_000  # names of documents that are kept for suggestions


@dataclass
class LongDocument:
    """A text and its origin."""

    corpus: str
    name: str
    text: str
    num_documents: int
    """Number of documents in the corpus, after joining."""

    def summary(self) -> dict[str, Any]:
        """The description for the results."""
        return {
            "corpus": public_value(self.corpus),
            "name": self.name,
            "bytes": len(self.text.encode()),
            "documents_in_corpus": self.num_documents,
        }


def make_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the arguments that both commands share: model, document, device, output."""
    parser = new_parser(command, description, examples)
    add_model(parser)
    parser.add_argument(
        "--corpus",
        default=PYTHON_STDLIB,
        help="name, file, folder, glob or hub id, as data.corpus (default: python-stdlib, held out)",
    )
    parser.add_argument(
        "--join",
        help="folder, package, the name of a column, or none (default: package for files, none for rows)",
    )
    parser.add_argument(
        "--text-field", default="text", help="column or key that holds a row's text (default: %(default)s)"
    )
    parser.add_argument(
        "--document",
        help="part of the document's name; the longest match is taken (default: the longest document)",
    )
    parser.add_argument(
        "--piece",
        type=int,
        default=8192,
        help="tokens per forward pass, over all rows (default: %(default)s)",
    )
    add_device(parser)
    add_trust(parser)
    add_dtype(parser)
    parser.add_argument(
        "--out",
        type=user_path,
        help="JSON file to write (default: in RUN/evals/, or evals/results/ without a run)",
    )
    return parser


def argument_errors(arguments: argparse.Namespace, counts: Sequence[str]) -> list[tuple[str, str]]:
    """Errors in the arguments that both commands share, and in these counts."""
    minimums = dict.fromkeys(("piece", *counts), 1)
    return option_minimum_errors(arguments, **minimums) + out_errors(arguments.out)


def _open(arguments: argparse.Namespace) -> Source:
    if is_prepared(arguments.corpus):
        message = f"{arguments.corpus} holds tokens and no text; name the corpus that it was made of"
        raise UserError("data.corpus", message)
    join = None if arguments.join == NONE else arguments.join
    spec = CorpusSpec(arguments.corpus, text_field=arguments.text_field, skip_broken=True, join=join)
    source = open_source(spec, "validation" if arguments.corpus in SPLIT_BY_FILE else "all")
    if arguments.join is None and isinstance(source, TextFiles):
        return join_documents(source, PACKAGE)
    return source


def _longest(candidates: Iterable[Document], name_part: str) -> tuple[Document | None, list[str], int, int]:
    """The longest document whose name contains `name_part`, names of documents, number of documents and of
    broken ones.

    One document is in memory at a time.
    """
    longest, size, names, num_documents, num_skipped = None, -1, [], 0, 0
    for document in candidates:
        num_skipped += document.num_skipped
        if document.text is None:
            continue
        num_documents += 1
        if len(names) < NUM_NAMES:
            names.append(document.name)
        if name_part in document.name and len(document.text) > size:
            longest, size = document, len(document.text)
    return longest, names, num_documents, num_skipped


def find_document(arguments: argparse.Namespace) -> LongDocument:
    """The document that the arguments select. The whole corpus is read to find the longest.

    Raises:
        UserError: the corpus, the way of joining or the document does not exist (with suggestions).
    """
    try:
        source = _open(arguments)
        documents = itertools.chain.from_iterable(
            source.read(shard, Position()) for shard in range(source.num_shards)
        )
        longest, names, num_documents, num_skipped = _longest(documents, arguments.document or "")
    except UserError as error:
        options = {"data.corpus": "--corpus", "data.join": "--join", "data.text_field": "--text-field"}
        raise UserError.from_list(
            ((options.get(key, key), message) for key, message in error.errors)
        ) from None
    if not num_documents:
        raise UserError(
            "--corpus",
            f"{arguments.corpus} holds no documents"
            + (f" but {num_skipped} broken ones" if num_skipped else ""),
        )
    if num_skipped:
        warn(f"{num_skipped} files or rows of {arguments.corpus} are broken and left out")
    if longest is None or longest.text is None:
        short = {name.split(" (")[0].rstrip("/"): name for name in names}
        near = [short[name] for name in nearest_names(arguments.document, short, count=3)]
        known = f"there are {', '.join(map(repr, names[:3]))}, ..."
        advice = did_you_mean(map(repr, near), otherwise=known)
        raise UserError("--document", f"no document's name holds {arguments.document!r} ({advice})")
    return LongDocument(arguments.corpus, longest.name, longest.text, num_documents)


def document_encoder(tokenizer: Any) -> Encoder:
    """Encodes `<bos> text <eos>`, as in training."""
    is_bytes = tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(byte_tokenizer())
    return Encoder.from_tokenizer(tokenizer, BYTES if is_bytes else tokenizer.name_or_path)


def document_tokens(document: LongDocument, encoder: Encoder, limit: int | None = None) -> np.ndarray:
    """`<bos> text <eos>`, int32 [1 + n], truncated to n = `limit` scored tokens.

    Raises:
        UserError: the document is too short.
    """
    tokens = encoder(document.text)
    if limit is not None:
        tokens = tokens[: limit + 1]
    if len(tokens) <= SHORTEST:
        raise UserError(
            "--document",
            f"{document.name} gives {len(tokens) - 1} tokens; "
            f"nothing can be said about fewer than {SHORTEST}",
        )
    return tokens


def load_model(arguments: argparse.Namespace, spells_text: bool = True) -> tuple[MinRNNForCausalLM, Any]:
    """Load the model, on its device, and the tokenizer.

    Args:
        spells_text: refuse the vocabulary of a synthetic task.

    Raises:
        UserError: they cannot be loaded, the device does not exist, or the model has no state to carry.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = (arguments.dtype, arguments.device, arguments.trust_remote_code)
    model, tokenizer = load(arguments.model, *options, spells_text=spells_text)
    return require_state(model), tokenizer


def result_header(
    command: str, argv: Sequence[str], model: MinRNNForCausalLM, text: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The head of the results: command, code, machine and model, then what is read: "document" or "task"."""
    config = {name: getattr(model.config, name) for name in type(model.config).__annotations__}
    device: torch.device = model.device
    return {
        "command": command_line(command, argv),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(device),
        "versions": versions(),
        "model": {
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "config": config,
        },
        **text,
    }
