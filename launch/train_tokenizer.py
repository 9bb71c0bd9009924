"""`minrnn tokenizer train`: a byte-level BPE tokenizer of one's own text."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.checks import option_minimum_errors
from ..common.errors import UserError
from ..common.files import user_path
from ..common.names import did_you_mean, nearest_names
from ..pipeline.options import new_parser
from .prepare import split_recipe

DESCRIPTION = """Train a byte-level BPE tokenizer on a corpus: a file, a folder, a glob, a dataset of the hub,
python-stdlib, or the corpus of a recipe. Settings of a recipe may follow, e.g. --data.text_field content.
Documents that are held out for validation are left out. It has <bos>, <eos> and <pad>, and any text can be
encoded and restored exactly. The same corpus gives the same tokenizer."""
EPILOG = """examples:
  minrnn tokenizer train python-stdlib --vocab-size 8192 --out my-tokenizer
  minrnn train --config quickstart --data.tokenizer my-tokenizer

  minrnn tokenizer train 'books/*.txt' --out my-tokenizer
  minrnn tokenizer train fineweb-350m --max-bytes 500000000 --out my-tokenizer

A larger vocabulary gives fewer tokens and more parameters (vocabulary x hidden_size). It is padded to a
multiple of 64 in the model; the padding is never generated. With this tokenizer, minrnn prepare writes 2
bytes for each token up to a vocabulary of 65536."""
MAX_BYTES = 200_000_000


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn tokenizer train", DESCRIPTION, EPILOG)
    parser.usage = (
        "minrnn tokenizer train CORPUS|RECIPE --out DIR [--vocab-size N] [--max-bytes N] "
        "[--section.field VALUE ...]\n\n"
        "CORPUS is as data.corpus; RECIPE is the name of a recipe that comes with minrnn, or a YAML file."
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32768,
        help="number of tokens, with the 256 bytes and 3 special tokens (default: %(default)s)",
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=MAX_BYTES,
        help="bytes of text to learn from: documents of 16 shards spread over the corpus, in turn "
        "(default: %(default)s, which need a few GB of memory)",
    )
    return parser


def recipe_arguments(name: str, overrides: list[str]) -> list[str]:
    """The arguments of a recipe that reads a corpus, named by itself or by a recipe."""
    from ..pipeline.recipe import shipped_recipes

    is_recipe = name in shipped_recipes() or (name.endswith((".yaml", ".yml")) and Path(name).is_file())
    return ["--config" if is_recipe else "--data.corpus", name, *overrides]


def main(argv: list[str]) -> None:
    """Train a tokenizer and save it, with progress bars.

    Raises:
        UserError: an option or the recipe is wrong, the corpus cannot be read or has too few words, or the
            folder cannot be used.
    """
    if not argv or argv[0] in ("--help", "-h"):
        _parser().parse_args(["--help"])
    if argv[0] != "train":
        advice = did_you_mean(nearest_names(argv[0], ["train"]), otherwise="there is minrnn tokenizer train")
        raise UserError("tokenizer", f"unknown command {argv[0]} ({advice})")
    name, others = split_recipe(argv[1:])
    arguments, overrides = _parser().parse_known_args(others)
    if name is None:
        example = "minrnn tokenizer train python-stdlib --out DIR"
        raise UserError("CORPUS", f"name a corpus or a recipe first: {example}")
    from ..data.train_tokenizer import check_vocab_size, sample_texts, train_tokenizer
    from ..pipeline.corpora import single_corpus_spec
    from ..pipeline.recipe import read_recipe

    errors = option_minimum_errors(arguments, max_bytes=1)
    recipe = read_recipe(recipe_arguments(name, overrides))
    if recipe.task() is not None:
        errors.append(("data.corpus", f"{recipe.data.corpus} is a task with its own vocabulary"))
    errors += _out_errors(arguments.out)
    try:
        check_vocab_size(arguments.vocab_size)
    except UserError as error:
        errors += error.errors
    if errors:
        raise UserError.from_list(errors)
    sizes: list[int] = []  # a bar that is switched off (TQDM_DISABLE) does not count
    with _reading_bar(arguments.max_bytes) as bar:

        def count(size: int) -> None:
            sizes.append(size)
            bar.update(size)

        texts = sample_texts(single_corpus_spec(recipe), arguments.max_bytes, count)
        tokenizer = train_tokenizer(texts, arguments.vocab_size, show_progress=True)
    try:
        tokenizer.save_pretrained(arguments.out)
    except OSError as error:
        raise UserError("--out", f"{arguments.out} cannot be written ({error.strerror or error})") from None
    print(f"{len(tokenizer):,} tokens, learned from {sum(sizes):,} bytes, are in {arguments.out}")
    print(f"train with them with --data.tokenizer {arguments.out}")


def _out_errors(out: Path) -> list[tuple[str, str]]:
    """A tokenizer that is there is replaced; other folders that hold files are refused."""
    if out.exists() and not out.is_dir():
        return [("--out", f"{out} is a file; name a folder")]
    if out.is_dir() and any(out.iterdir()) and not (out / "tokenizer.json").exists():
        return [("--out", f"{out} holds other files; name a new folder")]
    return []


@contextlib.contextmanager
def _reading_bar(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, desc="read", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        yield bar
