"""One long document and a model: what `minrnn long-context` and `rolling` begin with, and what they write down of both."""

import argparse
import itertools
import os
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
from ...data import BYTES, CorpusSpec, Encoder, byte_tokenizer, fingerprint, open_source
from ...data.corpus import PYTHON_STDLIB
from ...data.joined import PACKAGE, join_documents
from ...data.sources import Document, Position, Source, TextFiles
from ...models import MinRNNConfig, MinRNNForCausalLM
from ...pipeline.loading import load
from ...pipeline.options import add_device, add_dtype, add_trust
from ...pipeline.public import public_value
from ..output import out_errors
from ..record import command_line, commit, machine, versions

NONE = "none"  # --join: documents as they are
SHORTEST = 256  # tokens of a document that something can be said about
NUM_NAMES = 10_000  # of documents, kept to find those nearest to a name that none has


@dataclass
class LongDocument:
    """A text and where it comes from."""

    corpus: str
    name: str
    text: str
    num_documents: int
    """In the corpus, joined."""

    def described(self) -> dict[str, Any]:
        """For the results."""
        return {
            "corpus": public_value(self.corpus),
            "name": self.name,
            "bytes": len(self.text.encode()),
            "documents_in_corpus": self.num_documents,
        }


def make_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """With the arguments that both commands have: the model, the document, and where they are computed."""
    parser = argparse.ArgumentParser(
        command,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        type=os.path.expanduser,
        metavar="MODEL",
        help="a run's folder, an export, or a model of the hub",
    )
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
        help="part of the document's name (default: the longest of all; of several, the longest of them)",
    )
    parser.add_argument(
        "--piece",
        type=int,
        default=8192,
        help="tokens of a forward pass, over all rows (default: %(default)s)",
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
    """What is wrong with arguments that both commands have, and with these counts."""
    minimums = dict.fromkeys(("piece", *counts), 1)
    return option_minimum_errors(arguments, **minimums) + out_errors(arguments.out)


def _open(arguments: argparse.Namespace) -> Source:
    join = None if arguments.join == NONE else arguments.join
    spec = CorpusSpec(arguments.corpus, text_field=arguments.text_field, skip_broken=True, join=join)
    source = open_source(spec, "validation" if arguments.corpus == PYTHON_STDLIB else "all")
    return (
        join_documents(source, PACKAGE)
        if arguments.join is None and isinstance(source, TextFiles)
        else source
    )


def _longest(records: Iterable[Document], wanted: str) -> tuple[Document | None, list[str], int, int]:
    """The longest document whose name holds `wanted`, names of documents, and how many there are, whole and broken. One is held at a time."""
    longest, size, names, num_documents, num_skipped = None, -1, [], 0, 0
    for record in records:
        num_skipped += record.num_skipped
        if record.text is None:
            continue
        num_documents += 1
        if len(names) < NUM_NAMES:
            names.append(record.name)
        if wanted in record.name and len(record.text) > size:
            longest, size = record, len(record.text)
    return longest, names, num_documents, num_skipped


def find_document(arguments: argparse.Namespace) -> LongDocument:
    """The document that the arguments name; all of the corpus is read to find the longest.

    Raises:
        UserError: no such corpus or way of joining, or no document of that name (with those nearest to it).
    """
    try:
        source = _open(arguments)
        records = itertools.chain.from_iterable(
            source.read(shard, Position()) for shard in range(source.num_shards)
        )
        longest, names, num_documents, num_skipped = _longest(records, arguments.document or "")
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


def encoder_of(tokenizer: Any) -> Encoder:
    """Text to `<bos> text <eos>`, as in training."""
    return Encoder.from_tokenizer(
        tokenizer,
        BYTES if fingerprint(tokenizer) == fingerprint(byte_tokenizer()) else tokenizer.name_or_path,
    )


def tokens_of(document: LongDocument, encoder: Encoder, limit: int | None = None) -> np.ndarray:
    """`<bos> text <eos>`, int32 [1 + n], the first n scored tokens of it at most `limit`.

    Raises:
        UserError: too short a document.
    """
    tokens = encoder(document.text)
    if limit is not None:
        tokens = tokens[: limit + 1]
    if len(tokens) <= SHORTEST:
        raise UserError(
            "--document",
            f"{document.name} gives {len(tokens) - 1} tokens; nothing can be said about fewer than {SHORTEST}",
        )
    return tokens


def load_model(arguments: argparse.Namespace) -> tuple[MinRNNForCausalLM, Any]:
    """Model, on its device, and tokenizer.

    Raises:
        UserError: they cannot be loaded, or there is no such device.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return load(arguments.model, arguments.dtype, arguments.device, arguments.trust_remote_code)


def what_was_run(
    command: str, argv: Sequence[str], model: MinRNNForCausalLM, document: LongDocument
) -> dict[str, Any]:
    """The head of the results: what was typed, by which code, on what, with which model and document."""
    config = {name: getattr(model.config, name) for name in MinRNNConfig.__annotations__}
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
        "document": document.described(),
    }
