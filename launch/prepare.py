"""`minrnn prepare`: the tokens of a corpus on disk, so that training starts at once and tokenizes nothing."""

import argparse
from pathlib import Path

from ..common.checks import option_minimum_errors
from ..common.errors import UserError
from ..common.files import user_path
from ..pipeline.options import new_parser

DESCRIPTION = """Write the tokens of a recipe's corpus to a folder, one file for each shard of the corpus.
Train from it with --data.corpus DIR: the documents, their order, what is held out and the losses are those
of the original corpus, but nothing is parsed or tokenized. Settings of the recipe may follow, as for minrnn
train; those that decide the tokens are fixed by this command (data.corpus, subset, split, revision,
text_field, skip_broken, join, tokenizer). The same command goes on after an interruption."""
EPILOG = """examples:
  minrnn prepare quickstart --out prepared/stdlib
  minrnn train --config quickstart --data.corpus prepared/stdlib

  minrnn prepare fineweb-350m --out /data/fineweb-10BT --workers 16
  minrnn train --config fineweb-350m --data.corpus /data/fineweb-10BT --data.subset null

  minrnn prepare quickstart --data.corpus 'books/*.txt' --data.tokenizer my-tokenizer --out prepared/books

The folder holds manifest.json (what it was made of, sizes and SHA-256 of all files), tokenizer/, and
shard-*.arrow, which pandas (read_feather) and polars also read. Tokens take 1, 2 or 4 bytes each."""


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn prepare", DESCRIPTION, EPILOG)
    parser.usage = (
        "minrnn prepare RECIPE [--out DIR] [--workers N] [--verify] [--section.field VALUE ...]\n\n"
        "RECIPE is a YAML file, or the name of a recipe that comes with minrnn."
    )
    parser.add_argument("--config", metavar="RECIPE", help="another way to name it, as for minrnn train")
    parser.add_argument(
        "--out", type=user_path, metavar="DIR", help="folder to write (default: prepared/RECIPE)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes, each of which writes whole shards; 0 writes in this one (default: one per core)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read what is finished, and make anew files whose SHA-256 is wrong",
    )
    return parser


def split_recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    """The recipe named first in a command line, if any, and the other words.

    argparse would take the value of an option that it does not know (--data.corpus VALUE) for the recipe.
    """
    return (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)


def main(argv: list[str]) -> None:
    """Prepare a recipe's corpus, with a progress bar.

    Raises:
        UserError: the recipe or an option is wrong, the corpus cannot be read, or the folder cannot be used.
    """
    from tqdm import tqdm

    recipe_name, others = split_recipe(argv)
    arguments, overrides = _parser().parse_known_args(others)
    name = recipe_name or arguments.config
    if recipe_name is not None and arguments.config is not None:
        raise UserError("--config", "names a second recipe; leave one of them out")

    from ..data import load_tokenizer
    from ..data.prepared.make import Progress, prepare
    from ..pipeline.corpora import corpus_spec, single_corpus_spec
    from ..pipeline.data_order import with_order
    from ..pipeline.recipe import read_recipe

    recipe = read_recipe([*(["--config", name] if name else []), *overrides])
    errors = option_minimum_errors(arguments, workers=0)
    if recipe.task() is not None:
        message = f"{recipe.data.corpus} makes its own examples, which need no preparation"
        errors.append(("data.corpus", message))
    if not isinstance(recipe.data.corpus, str):
        message = "is a mixture: prepare each of its corpora, and name their folders in the mixture"
        errors.append(("data.corpus", message))
    elif recipe.task() is None and with_order(recipe, corpus_spec(recipe)).data.order == "continuous":
        message = f"{recipe.data.corpus} is read with order continuous, from the text files themselves"
        errors.append(("data.order", f"{message}; set it to documents to prepare it"))
    if errors:
        raise UserError.from_list(errors)
    out: Path = arguments.out or Path("prepared") / Path(name or "default").stem
    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.data.trust_remote_code)
    with tqdm(unit="shard", dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.num_shards
            bar.n = progress.shards
            bar.set_postfix_str(f"{progress.tokens / 1e6:,.1f}M tokens, {progress.name[-40:]}", refresh=False)
            bar.refresh()

        manifest = prepare(
            single_corpus_spec(recipe),
            tokenizer,
            recipe.data.tokenizer,
            out,
            arguments.workers,
            show,
            arguments.verify,
        )
    print("\n".join(summary_lines(manifest, out)))


def summary_lines(manifest: dict, out: Path) -> list[str]:
    """Counts of a prepared corpus, and how to train from it."""
    shards = manifest["shards"]
    documents, skipped, tokens, size, disk = (
        sum(shard[key] for shard in shards) for key in ("documents", "skipped", "tokens", "bytes", "size")
    )
    filtered = sum(shard.get("filtered", 0) for shard in shards)  # earlier versions did not count them
    left_out = f", {skipped:,} broken parts left out" if skipped else ""
    left_out += f", {filtered:,} that do not pass data.filter" if filtered else ""
    return [
        f"{documents:,} documents{left_out}, {size:,} bytes of text, {tokens:,} tokens "
        f"({size / max(tokens, 1):.2f} bytes a token)",
        f"{len(shards):,} shards in {out}, {disk / 1e6:,.1f} MB, {manifest['dtype']} tokens",
        f"train from it with --data.corpus {out}",
    ]
