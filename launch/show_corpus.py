"""`minrnn data show RECIPE`: what the model will see, from a bounded part of the corpus.

recipe -> corpora -> shards and sizes; counts of a sample; what validation holds
       -> reader 0 -> its first chunk, by lanes, with document boundaries
"""

import argparse
import contextlib
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..common.checks import option_minimum_errors
from ..common.errors import UserError
from ..data import (
    Chunk,
    CorpusSpec,
    Encoder,
    MixtureSpec,
    PreparedCorpus,
    is_labelled,
    open_shares,
    run_tokenizer,
)
from ..data.corpus import has_fixed_parts
from ..data.loader import Share, open_readers
from ..data.parquet import Parquet, metadata_of
from ..data.parts import Shares, units_of
from ..data.sample import Counts, count, sample_documents
from ..data.sources import Part, TextFiles
from ..pipeline.config import Recipe
from ..pipeline.corpora import corpus_spec, reader_spec
from ..pipeline.data_order import with_order
from ..pipeline.evaluation import validation_errors, validation_spec
from ..pipeline.options import new_parser
from ..pipeline.recipe import read_recipe
from .estimates import batch_shape
from .prepare import split_recipe
from .train_tokenizer import recipe_arguments

DESCRIPTION = """Print what the model will see: shards and their sizes, counts of documents and tokens, what
is left out, what validation holds, and the first lanes of the first chunk. At most --documents documents are
counted, for at most --seconds; counts of larger corpora are estimates, and are marked as such. Settings of
the recipe may follow, as for minrnn train."""
EPILOG = """examples:
  minrnn data show quickstart
  minrnn data show quickstart --data.corpus one.txt
  minrnn data show fineweb-350m --lanes 2 --data.tokenizer bytes
  minrnn data show my-recipe.yaml --documents 100000 --seconds 60"""
COLORS, BOUNDARY, PLAIN = ("\x1b[0m", "\x1b[36m"), "\x1b[1;32m", "\x1b[0m"
INDENT = " " * 12


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn data show", DESCRIPTION, EPILOG)
    parser.usage = (
        "minrnn data show RECIPE [--documents N] [--seconds S] [--lanes N] [--section.field VALUE ...]\n\n"
        "RECIPE is the name of a recipe that comes with minrnn, a YAML file, or a corpus (as data.corpus)."
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--documents", default=2000, help="documents to count, at most (default: %(default)s)", **number
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds to count, at most (default: %(default)s)",
    )
    parser.add_argument("--lanes", default=4, help="lanes to print (default: %(default)s)", **number)
    text = "tokens to print of each lane (default: %(default)s)"
    parser.add_argument("--tokens", default=200, help=text, **number)
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal"
    )
    return parser


def shard_sizes(source: Any) -> list[tuple[str, int]] | None:
    """Name and bytes of each file of a source; None if they are unknown."""
    source = getattr(source, "files", getattr(source, "rows", source))  # of joined documents
    if isinstance(source, PreparedCorpus):
        files = source.manifest["files"]
        return [(name, file["size"]) for name, file in files.items() if name.endswith(".arrow")]
    paths = getattr(source, "paths", None)
    if paths is None or not all(isinstance(path, Path) for path in paths):
        return None
    return [(path.name, path.stat().st_size) for path in paths]


def size_text(num_bytes: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def shard_lines(source: Any) -> list[str]:
    """Number of shards and files, and the sizes of the files."""
    sizes = shard_sizes(source)
    if not sizes:
        return [f"shards      {source.num_shards:,}"]
    total = sum(size for _, size in sizes)
    smallest, largest = (size_text(f(size for _, size in sizes)) for f in (min, max))
    spread = f" of {smallest} to {largest}" if len(sizes) > 1 else ""
    names = ", ".join(f"{name} {size_text(size)}" for name, size in sizes[:3])
    more = f", and {len(sizes) - 3:,} more" if len(sizes) > 3 else ""
    return [
        f"shards      {source.num_shards:,}; {len(sizes):,} files{spread}, {size_text(total)} in all",
        f"{INDENT}{names}{more}",
    ]


def num_rows(source: Any) -> int | None:
    """The number of documents of all parts that a source knows without reading them; None if it does not.

    Those that are left out are included, except in a prepared corpus.
    """
    if isinstance(source, PreparedCorpus):
        return sum(shard["documents"] for shard in source.manifest["shards"])
    if isinstance(source, TextFiles):
        return len(source.paths)
    if isinstance(source, Parquet) and len(source.paths) <= 1000 and isinstance(source.paths[0], Path):
        with contextlib.suppress(Exception):  # a damaged file is reported by reading it
            return sum(metadata_of(path).num_rows for path in source.paths)
    return None


def share_of_units(shares: Shares) -> float:
    """The part of a source's smallest units (row groups, pieces, files) that `shares` has."""
    source = shares.source
    of_all = sum(len(units_of(source, Part(shard))) for shard in range(source.num_shards))
    return sum(len(units_of(source, part)) for part in shares.owned[0]) / max(of_all, 1)


def count_lines(counts: Counts, shares: Shares) -> list[str]:
    """Documents, tokens and bytes for training: counted, or estimated from a sample."""
    if not counts.documents:
        return [f"documents   none of the first {counts.num_seen:,} is for training"]
    bytes_per_token = counts.bytes / max(counts.tokens, 1)
    lengths = (
        f"{min(counts.lengths):,} to {max(counts.lengths):,} tokens (median {median(counts.lengths):,.0f})"
    )
    if counts.is_whole:
        lines = [f"documents   {counts.documents:,} of {lengths}", f"tokens      {counts.tokens:,}"]
    elif (rows := num_rows(shares.source)) is not None:
        seen = counts.num_seen
        if isinstance(shares.source, PreparedCorpus):
            seen -= counts.filtered + counts.skipped
        documents = rows * share_of_units(shares) * counts.documents / seen
        tokens = documents * counts.tokens / counts.documents
        sample = f"estimated from {counts.documents:,}"
        lines = [
            f"documents   about {documents:,.0f}, {sample} of {lengths}",
            f"tokens      about {tokens:,.0f}",
        ]
    else:
        lines = [
            f"documents   more than the {counts.documents:,} that were read, of {lengths}",
            f"tokens      more than {counts.tokens:,}",
        ]
    return [*lines, f"bytes/token {bytes_per_token:.3f}"]


def held_out_shards(spec: CorpusSpec, num_shards: int) -> str:
    """The shards, or the part of one, that are held out."""
    parts = open_shares(spec, "validation", 1)[0].owned[0]
    num_whole = sum(part.within is None for part in parts)
    what = (
        f"{num_whole:,} of {num_shards:,} shards" if num_whole else f"the end of one of {num_shards:,} shards"
    )
    return f"{what} held out for validation (data.hold_out)"


def left_out_line(counts: Counts, shards: str | None = None) -> str:
    """What training does not read.

    Args:
        shards: what is held out, if shards are.
    """
    share = counts.others / max(counts.documents + counts.others, 1)
    parts = [f"{counts.others:,} documents held out for validation ({share:.2%})"] * (counts.others > 0)
    parts += [f"{counts.filtered:,} that do not pass data.filter"] * (counts.filtered > 0)
    parts += [f"{counts.skipped:,} broken (data.skip_broken)"] * (counts.skipped > 0)
    note = "" if counts.is_whole or not parts else ", of those that were read"
    parts = [*([shards] if shards else []), *parts]
    empty = f"; {counts.empty:,} documents are empty" if counts.empty else ""
    return f"left out    {'; '.join(parts) or 'nothing'}{note}{empty}"


def validation_lines(
    recipe: Recipe, spec: CorpusSpec, encoder: Encoder, limits: tuple[int, float]
) -> list[str]:
    """What validation reads, as far as the sample shows."""
    data = recipe.data
    most = "all of them" if data.validation_tokens is None else f"up to {data.validation_tokens:,} tokens"
    if data.order == "windows" and data.validation is None:
        return [f"validation  the last {data.validation_fraction:.1%} of the text, {most}"]
    with validation_errors(recipe):
        chosen, part = validation_spec(recipe, spec)
        assert isinstance(chosen, CorpusSpec)
        counts = count(sample_documents(chosen, part), encoder, *limits)
    name = f" of {data.validation}" if data.validation is not None else ", held out"
    amount = f"{counts.documents:,} documents of {counts.tokens:,} tokens"
    return [f"validation  {amount}{'' if counts.is_whole else ' in the sample'}{name}; {most} are read"]


def _printable(text: str) -> str:
    """The text on one line."""
    marks = {"\n": "\u23ce", "\t": "\u2192", "\r": "\u240d"}
    return "".join(marks.get(c, c if c.isprintable() else "\ufffd") for c in text)


def lane_text(chunk: Chunk, row: int, tokenizer: Any, num_tokens: int, color: bool) -> str:
    """A lane's first tokens, with the name of each document where it begins.

    On a terminal, documents have two colours in turn; elsewhere names are in brackets.
    """
    starts = np.flatnonzero(chunk.document_starts[row])
    edges = sorted({0, *starts.tolist(), chunk.input_ids.shape[1]})
    names = iter(chunk.documents[row])
    parts = []
    for number, (first, last) in enumerate(pairwise(edges)):
        if first >= num_tokens:
            break
        ids = chunk.input_ids[row, first : min(last, num_tokens)].tolist()
        text = _printable(tokenizer.decode(ids, skip_special_tokens=True))
        name = _printable(next(names))
        boundary = f"{BOUNDARY}{name}{PLAIN} " if color else f"[{name}] "
        parts.append(boundary + (f"{COLORS[number % 2]}{text}{PLAIN}" if color else text))
    return " ".join(parts)


def chunk_lines(recipe: Recipe, encoder: Encoder, tokenizer: Any, arguments: argparse.Namespace) -> list[str]:
    """The first lanes of what reader 0 reads first."""
    chunk: Any = open_readers(reader_spec(recipe, encoder), Share([0]), [None])[0].next_chunk()
    color = arguments.color == "always" or (arguments.color == "auto" and sys.stdout.isatty())
    shown = min(arguments.lanes, len(chunk.input_ids))
    tokens = min(arguments.tokens, chunk.input_ids.shape[1])
    lines = [
        "",
        f"The first {tokens:,} tokens of {shown} of {len(chunk.input_ids)} lanes, step 1 of reader 0:",
    ]
    width = shutil.get_terminal_size((100, 24)).columns
    rule = ("\u2500" if (sys.stdout.encoding or "").lower().startswith("utf") else "-") * width
    for row in range(shown):
        lines += [rule, f"lane {row}: {lane_text(chunk, row, tokenizer, tokens, color)}"]
    return lines


def corpus_lines(recipe: Recipe, spec: CorpusSpec, encoder: Encoder, limits: tuple[int, float]) -> list[str]:
    """Shards, counts and what is left out, of one corpus."""
    shares, is_by_hash = open_shares(spec, "train", 1)
    source = shares.source
    are_shards = not is_by_hash and not has_fixed_parts(spec, source)
    counts = count(sample_documents(spec, "train"), encoder, *limits)
    return [
        f"corpus      {spec.corpus}",
        *shard_lines(source),
        *count_lines(counts, shares),
        left_out_line(counts, held_out_shards(spec, source.num_shards) if are_shards else None),
        *validation_lines(recipe, spec, encoder, limits),
    ]


def _check(arguments: argparse.Namespace) -> None:
    errors = option_minimum_errors(arguments, documents=1, lanes=1, tokens=1)
    if not arguments.seconds > 0:
        errors.append(("--seconds", f"must be positive, not {arguments.seconds:g}"))
    if errors:
        raise UserError.from_list(errors)


def main(argv: list[str]) -> None:
    """Print what a recipe reads.

    Raises:
        UserError: the recipe, an option or the corpus is wrong.
    """
    name, others = split_recipe(argv)
    arguments, overrides = _parser().parse_known_args(others)
    if name is None:
        raise UserError("RECIPE", "name a recipe or a corpus first: minrnn data show quickstart")
    recipe = read_recipe(recipe_arguments(name, overrides))
    _check(arguments)
    if is_labelled(recipe.data.corpus):
        message = f"is a task; minrnn data {recipe.data.corpus} prints its examples"
        raise UserError("data.corpus", message)
    data, batch = recipe.data, recipe.batch
    tokenizer = run_tokenizer(data.corpus, data.tokenizer, data.task, data.trust_remote_code)
    encoder = Encoder.from_tokenizer(tokenizer, data.tokenizer)
    recipe = with_order(recipe, corpus_spec(recipe))
    data, spec = recipe.data, corpus_spec(recipe)
    limits = (arguments.documents, arguments.seconds)
    lines: list[str] = []
    if recipe.task() is None:
        if isinstance(spec, MixtureSpec):
            for source, weight in zip(spec.sources, spec.weights, strict=True):
                lines += corpus_lines(recipe, source, encoder, limits)
                lines.append(f"weight      {weight:.1%} of the tokens that are read")
        else:
            lines += corpus_lines(recipe, spec, encoder, limits)
        lines.append(f"tokenizer   {data.tokenizer}, {len(tokenizer):,} tokens")
    else:
        lines.append(f"corpus      {data.corpus}")
    lines.append(
        f"order       {data.order}; {batch_shape(recipe)}: "
        f"{batch.tokens_per_step:,} tokens a step, {batch.tokens_per_step * recipe.train.steps:,} in "
        f"{recipe.train.steps:,} steps"
    )
    _print(lines + chunk_lines(recipe, encoder, tokenizer, arguments))


def _print(lines: list[str]) -> None:
    """Print; characters that the terminal's encoding lacks become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    print("\n".join(lines).encode(encoding, errors="replace").decode(encoding))
