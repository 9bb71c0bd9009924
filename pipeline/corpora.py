"""The texts of a run: what they are, that they stay what they were, and what is held out of them."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..common.errors import StorageError, UserError
from ..common.names import counted
from ..common.output import warn
from ..data import (
    AnyCorpus,
    CorpusSpec,
    Encoder,
    HeldOut,
    MixtureSpec,
    ReaderSpec,
    RowRules,
    check_mixture,
    check_same_text,
    corpus_fingerprint,
    is_hub_dataset,
    load_held_out,
    made_from,
    mixture_fingerprint,
    open_shares,
    resolve_commit,
    save_held_out,
    source_specs,
)
from . import processes
from .classification import open_labelled
from .config import Recipe
from .evaluation import make_held_out, validation_budgets, validation_errors, validation_spec
from .folder import RunFolder
from .folder_checks import FILES, FOLDERS
from .source_settings import INHERITED
from .tracking_store import SQLITE_SUFFIXES, absolute_uri, sqlite_file
from .watchdog import Watchdog


def corpus_spec(recipe: Recipe) -> AnyCorpus:
    """The corpus that the recipe trains on."""
    data = recipe.data
    excluded = _output_paths(recipe)

    def spec(source: Mapping[str, Any], commit: str | None, reads_passages: bool) -> CorpusSpec:
        settings = {name: source.get(name, getattr(data, name)) for name in INHERITED}
        return CorpusSpec(
            corpus=source["corpus"],
            subset=settings["subset"],
            split=settings["split"],
            revision=commit or settings["revision"],
            text_field=settings["text_field"],
            skip_broken=data.skip_broken,
            held_out=0.0 if data.validation is not None else data.validation_fraction,
            join=settings["join"],
            excluded=excluded,
            hold_out=settings["hold_out"],
            rules=RowRules.from_settings(settings["template"], settings["filter"]),
            network=data.network(),
            passages=reads_passages,
        )

    if isinstance(data.corpus, str):
        return spec({"corpus": data.corpus}, data.commit, reads_passages=data.order == "continuous")
    total = sum(source["weight"] for source in data.corpus)
    return MixtureSpec(
        tuple(spec(source, source.get("commit"), source["order"] == "passages") for source in data.corpus),
        tuple(source["weight"] / total for source in data.corpus),
    )


def reader_spec(recipe: Recipe, encoder: Encoder) -> ReaderSpec:
    """What the recipe's readers share.

    Args:
        recipe: with its order (`data_order.with_order`).

    Raises:
        UserError: the examples of its task cannot be made.
    """
    data, batch = recipe.data, recipe.batch
    return ReaderSpec(
        corpus=corpus_spec(recipe),
        order="documents" if data.order == "auto" else data.order,  # auto remains for tasks only
        encoder=encoder,
        num_readers=batch.readers,
        lanes=batch.lanes,
        chunk=batch.chunk,
        window=data.shuffle_window,
        seed=recipe.run.seed,
        task=open_labelled(recipe) or recipe.synthetic_task(),
        num_chunks=batch.backprop_chunks,
    )


def single_corpus_spec(recipe: Recipe) -> CorpusSpec:
    """The corpus of a recipe that has only one.

    Raises:
        UserError: the recipe has a mixture.
    """
    spec = corpus_spec(recipe)
    if isinstance(spec, MixtureSpec):
        message = f"is a mixture ({recipe.data.name}), and this command reads one corpus"
        raise UserError("data.corpus", f"{message}; name one of them")
    return spec


def _output_paths(recipe: Recipe) -> tuple[str, ...]:
    """Absolute paths, links resolved, of what the run writes: never part of a corpus that contains them.

    They are its folder and its own names there, MLflow's database if that is a file, and the artifacts that
    MLflow puts beside it.
    """
    folder, database = Path(recipe.run.dir), sqlite_file(absolute_uri(recipe.tracking.resolved_uri() or ""))
    paths = [folder, *(folder / name for name in (*FILES, *FOLDERS))]
    if database is not None:
        paths.append(Path("mlruns"))
        paths += [database.with_name(database.name + suffix) for suffix in ("", *SQLITE_SUFFIXES)]
    return tuple(map(os.path.realpath, paths))


def with_commits(recipe: Recipe) -> Recipe:
    """The recipe with the commits of its hub datasets, unless it has them already.

    Raises:
        UserError: a dataset or a revision does not exist, or the hub does not answer.
    """
    data = recipe.data
    commits: dict[str, Any] = {}
    if isinstance(data.corpus, list):
        commits["corpus"] = [
            {**source, "commit": resolve_commit(source["corpus"], source.get("revision", data.revision))}
            if "commit" not in source and is_hub_dataset(source["corpus"])
            else source
            for source in data.corpus
        ]
    elif recipe.task() is None and data.commit is None and is_hub_dataset(data.corpus):
        commits["commit"] = resolve_commit(data.corpus, data.revision)
    if data.validation is not None and data.validation_commit is None and is_hub_dataset(data.validation):
        with validation_errors(recipe):
            commits["validation_commit"] = resolve_commit(data.validation, data.validation_revision)
    return dataclasses.replace(recipe, data=data.model_copy(update=commits))


def is_first_of_node() -> bool:
    """Whether this process is the first of those that the launcher started on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def identify_corpus(
    recipe: Recipe, folder: RunFolder, accelerator: Accelerator, watchdog: Watchdog
) -> dict[str, Any] | None:
    """The fingerprint of the corpus, equal on all machines and compared with the checkpoint's (which old
    checkpoints lack); that of a separate validation corpus is its `validation`.

    Labelled examples that the cache lacks are made here.

    Raises:
        UserError: it is not the corpus that the run began with, or machines have different files.
    """
    if recipe.task() is not None:
        return processes.run_on_all_ranks(accelerator, lambda: _labelled_examples(recipe, folder, watchdog))
    is_main = accelerator.is_main_process
    own = processes.run_on_all_ranks(
        accelerator, lambda: _fingerprint(recipe, folder, is_main) if is_first_of_node() else None
    )
    fingerprints = [each for each in processes.all_gather_objects(accelerator, [own]) if each is not None]
    if any(each != fingerprints[0] for each in fingerprints):
        message = f"{recipe.data.name} (or data.validation) has other files on one machine than on another"
        raise UserError("data.corpus", f"{message}; copy the same files to all of them")
    return fingerprints[0] or None


def _labelled_examples(recipe: Recipe, folder: RunFolder, watchdog: Watchdog) -> dict[str, Any] | None:
    labelled = open_labelled(recipe, watchdog.move)
    if labelled is None:
        return None
    files, saved = labelled.manifest()["files"], folder.manifest.get("corpus")
    if saved is not None and saved != files:
        message = f"the examples of {recipe.data.name} are not those that the run began with"
        raise UserError("data.corpus", f"{message}; name another run.dir")
    return files


def _fingerprint(recipe: Recipe, folder: RunFolder, is_main: bool) -> dict[str, Any]:
    saved, spec = folder.manifest.get("corpus"), corpus_spec(recipe)
    if saved is None and folder.saved and folder.saved["data"]["corpus"] != recipe.data.corpus:
        message = (
            f"cannot be compared with {folder.saved['data']['corpus']}: the checkpoint has no fingerprint"
        )
        raise UserError("data.corpus", f"{message}; put the text back, or name another run.dir")
    if saved is not None:
        note = check_mixture(saved, spec, recipe.data.order, recipe.batch.readers)
        if note is not None and is_main:
            warn(f"data.corpus: {note}")
    fingerprint = mixture_fingerprint(spec) or {}
    if recipe.data.validation is not None:
        with validation_errors(recipe):
            validation, _ = validation_spec(recipe, spec)
            assert isinstance(validation, CorpusSpec)
            if saved is not None and "validation" in saved:
                check_same_text(saved["validation"], validation)
            fingerprint["validation"] = corpus_fingerprint(validation)
    return fingerprint


def prepare_held_out(
    recipe: Recipe,
    encoder: Encoder,
    fingerprint: dict[str, Any] | None,
    accelerator: Accelerator,
    watchdog: Watchdog,
    report: Callable[[str], object],
) -> HeldOut | None:
    """The text for validation, from run.dir/validation; None for a task. The main process makes it in one
    pass if it is not there, and the first process of a machine that does not see it makes its own.

    Args:
        report: called with a summary of what was made.

    Raises:
        UserError: the corpus cannot be read, or nothing is held out.
        StorageError: the files cannot be written or read.
    """
    if recipe.task() is not None:
        return None
    data, corpus, folder = recipe.data, corpus_spec(recipe), Path(recipe.run.dir, "validation")
    with validation_errors(recipe):
        spec, part = validation_spec(recipe, corpus)
    known = (fingerprint or {}).get("validation") if data.validation is not None else fingerprint
    if isinstance(spec, MixtureSpec):
        budgets = validation_budgets(spec, data.validation_tokens)
        sources = zip(spec.sources, (known or {})["sources"], budgets, strict=True)
        origin = {
            "sources": [
                made_from(source, source_fingerprint, part, data.order, encoder, budget)
                for source, source_fingerprint, budget in sources
            ]
        }
    else:
        origin = made_from(spec, known, part, data.order, encoder, data.validation_tokens)

    def make() -> None:
        if load_held_out(folder, origin) is None:
            held_out = make_held_out(recipe, corpus, encoder, watchdog.move)
            save_held_out(folder, held_out, origin)
            report(_held_out_summary(held_out, spec.corpus, folder))

    def load() -> HeldOut:
        if (held_out := load_held_out(folder, origin)) is None:
            raise StorageError(f"{folder} was written, but cannot be read")
        return held_out

    processes.run_on_main(accelerator, make)
    processes.run_on_all_ranks(accelerator, lambda: make() if is_first_of_node() else None)
    return processes.run_on_all_ranks(accelerator, load)


def _held_out_summary(held_out: HeldOut, corpus: str, folder: Path) -> str:
    count, tokens = len(held_out.lengths), len(held_out.tokens)
    return (
        f"validation: {counted(count, 'document')} of {corpus}, {tokens:,} tokens; "
        f"{counted(held_out.num_read, 'document')} read for it; kept in {folder}"
    )


def warn_of_shares(recipe: Recipe) -> None:
    """Warn if the corpus cannot be divided evenly among the readers.

    Raises:
        UserError: the corpus does not exist, or cannot be read.
    """
    if recipe.task() is None and recipe.data.order == "documents":
        spec = corpus_spec(recipe)
        for source in source_specs(spec):
            shares, _ = open_shares(source, "train", recipe.batch.readers)
            if shares.note:
                name = f"{source.corpus}: " if isinstance(spec, MixtureSpec) else ""
                warn(f"data.corpus: {name}{shares.note}")
