"""How a run is set up, from the beginning or from a checkpoint.

precision, matmul rate -> layout -> corpus -> data and model -> engine -> folder, saver, tracker -> Run
"""

import contextlib
import dataclasses
import socket
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator

from ..common.errors import UserError
from ..common.output import warn
from ..data import (
    ChunkLoader,
    Encoder,
    HeldOut,
    has_fingerprint,
    model_vocab_size,
    run_tokenizer,
)
from ..models.context_parallel import use_context_parallel
from . import checkpoint, processes
from .announce import announce
from .build_model import TrainedModel, build_model
from .checkpoint import ReaderState
from .classification import classifier_fields, test_sets
from .config import Recipe
from .corpora import corpus_spec, identify_corpus, prepare_held_out, reader_spec, warn_of_shares, with_commits
from .data_order import with_order
from .engine import build_engine
from .evaluation import validation_sets
from .export import model_config
from .families.adapter import FamilyModel
from .family_settings import with_sizes
from .folder import RunFolder
from .machine import CHOICES, PrecisionChoice, choose_precision, device_name, measure_rates
from .other_trackers import OtherTrackers
from .processes import ProcessLayout
from .push.beside import build_pusher
from .recipe_on_resume import with_saved_settings
from .run import Progress, Run, RunData, RunOutput
from .run_log import RunLog, Verbosity, reporter
from .saving import Saver
from .task_evaluation import open_tasks
from .tracking import build_tracker
from .tracking_details import run_details
from .watchdog import Watchdog


def collective_timeout(recipe: Recipe) -> timedelta:
    """How long collectives wait: longer than the watchdog, whose message names the process that hangs."""
    return timedelta(seconds=recipe.train.peer_timeout + 120)


def set_up(
    recipe: Recipe,
    accelerator: Accelerator,
    folder: RunFolder,
    watchdog: Watchdog,
    verbosity: Verbosity = "normal",
) -> Run:
    """A run ready for its next step: readers, model and optimizer as saved, tracking started.

    Raises:
        UserError: in every process, if data, a checkpoint or an export cannot be used in one of them.
    """
    watchdog.enter("measuring the machine", is_set_up=True)
    precision, matmul_rate = _decide_precision(recipe, accelerator, folder)  # before other work disturbs it
    recipe = _with_precision(with_saved_settings(recipe, folder.saved), precision.precision)
    watchdog.enter("resolving datasets", is_set_up=True)
    recipe = processes.run_on_main(accelerator, lambda: with_commits(recipe))
    layout = processes.build_layout(accelerator, recipe.parallel.context, collective_timeout(recipe))
    recipe = processes.run_on_all_ranks(
        accelerator, lambda: with_order(_with_sizes(recipe, folder), corpus_spec(recipe))
    )
    data, model = _open_on_all_ranks(recipe, accelerator, folder, layout, watchdog, verbosity)
    recipe = _with_limits(recipe, model)
    if layout.group is not None:
        use_context_parallel(model, layout.group)
    watchdog.enter("loading the tasks of lm-eval", is_set_up=True)
    tasks = open_tasks(recipe, accelerator)
    watchdog.enter("building the engine", is_set_up=True)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(data.loader.close)
        engine = build_engine(recipe, accelerator, model, folder.checkpoint)
        processes.run_on_main(accelerator, lambda: folder.begin(recipe))
        on_failure.pop_all()
    progress = Progress.from_manifest(folder.manifest)
    output = _open_output(recipe, accelerator, folder, data.corpus, progress.step, verbosity)
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        layout=layout,
        data=data,
        engine=engine,
        output=output,
        watchdog=watchdog,
        matmul_rate=matmul_rate,
        progress=progress,
        tasks=tasks,
    )
    if run.is_main:
        announce(run, precision)
    return run


def _decide_precision(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder
) -> tuple[PrecisionChoice, float]:
    """The precision of all processes, chosen by rank 0, and the rate of its matrix products in FLOP/s.

    Raises:
        UserError: a device does not support it.
    """
    requested, current = recipe.train.precision, with_saved_settings(recipe, folder.saved).train.precision
    rates = measure_rates(accelerator.device, CHOICES if current == "auto" else [*CHOICES, current])
    supported = set.intersection(*processes.all_gather_objects(accelerator, [set(rates)]))
    rates = {name: rate for name, rate in rates.items() if name in supported}
    rates = processes.broadcast_from_main(accelerator, rates)
    current = None if current == "auto" else current
    choice = choose_precision(requested, current, rates, device_name(accelerator.device))
    return choice, rates[choice.precision]


def _with_precision(recipe: Recipe, precision: str) -> Recipe:
    return dataclasses.replace(recipe, train=recipe.train.model_copy(update={"precision": precision}))


def _with_sizes(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with the sizes of model.num_parameters, for the tokenizer's vocabulary. A run that resumes
    keeps its own."""
    is_saved = recipe.model.sizes == folder.saved.get("model", {}).get("sizes")
    if recipe.model.num_parameters is None or is_saved:
        return recipe
    return with_sizes(recipe, model_vocab_size(_open_tokenizer(recipe, folder)))


def _with_limits(recipe: Recipe, model: TrainedModel) -> Recipe:
    """The recipe with what its family cannot do, for config.yaml and the results made of it."""
    limits = model.limits if isinstance(model, FamilyModel) else []
    return dataclasses.replace(recipe, model=recipe.model.model_copy(update={"limits": limits}))


def _open_on_all_ranks(
    recipe: Recipe,
    accelerator: Accelerator,
    folder: RunFolder,
    layout: ProcessLayout,
    watchdog: Watchdog,
    verbosity: Verbosity,
) -> tuple[RunData, TrainedModel]:
    """Data and model of this process, returned when every process has opened its own.

    Raises:
        UserError, StorageError: in every process, the errors of all of them.
    """
    tokenizer = processes.run_on_all_ranks(accelerator, lambda: _open_tokenizer(recipe, folder))
    corpus = identify_corpus(recipe, folder, accelerator, watchdog)
    watchdog.enter("reading the text for validation", is_set_up=True)
    processes.run_on_main(accelerator, lambda: warn_of_shares(recipe))
    encoder = Encoder.from_tokenizer(tokenizer, recipe.data.tokenizer)
    held_out = prepare_held_out(recipe, encoder, corpus, accelerator, watchdog, reporter(verbosity))
    watchdog.enter("opening data and model", is_set_up=True)

    def open_own() -> tuple[RunData, TrainedModel]:
        try:
            data, model = _open(recipe, folder, layout, accelerator.device, tokenizer, held_out)
        finally:  # this process is now a phase ahead of those that are still opening
            watchdog.enter("meeting the others, data and model open", is_set_up=True)
        on_failure.callback(data.loader.close)
        return dataclasses.replace(data, corpus=corpus), model

    with contextlib.ExitStack() as on_failure:
        opened = processes.run_on_all_ranks(accelerator, open_own)
        on_failure.pop_all()
    return opened


def _open(
    recipe: Recipe,
    folder: RunFolder,
    layout: ProcessLayout,
    device: torch.device,
    tokenizer: Any,
    held_out: HeldOut | None,
) -> tuple[RunData, TrainedModel]:
    """Open data and model without communication: loader, readers' states, validation sets."""
    encoder = Encoder.from_tokenizer(tokenizer, recipe.data.tokenizer)
    vocab_size = folder.manifest.get("vocab_size") or model_vocab_size(tokenizer)
    fields, family = recipe.resolved_model_fields(), recipe.model.family
    fields |= classifier_fields(recipe.data.corpus, recipe.data.task)
    mask = folder.checkpoint is None or folder.manifest.get("masks_padding", False)
    config = model_config(fields, tokenizer, vocab_size, family, mask)
    local_readers = layout.readers(recipe.batch.readers)
    num_layers = getattr(config, "num_hidden_layers", 0)  # of a carried state
    readers = _load_readers(folder, local_readers, num_layers, device)
    loader = _start_loader(recipe, encoder, readers)
    try:
        validation = validation_sets(recipe, held_out, local_readers)
        model = build_model(recipe, config, folder, device)
    except BaseException:
        loader.close()
        raise
    test = test_sets(recipe, local_readers)
    return RunData(tokenizer, None, loader, readers, validation, test), model


def _open_tokenizer(recipe: Recipe, folder: RunFolder) -> Any:
    """The tokenizer, which must be the one that the run began with."""
    data = recipe.data
    tokenizer = run_tokenizer(data.corpus, data.tokenizer, data.task, data.trust_remote_code)
    saved = folder.manifest.get("tokenizer")
    if saved is not None and not has_fingerprint(tokenizer, saved):
        message = (
            f"{data.tokenizer} is not the tokenizer that the run began with: its vocabulary, merges, "
            "normalizer or pre-tokenizer have changed; name another run.dir"
        )
        raise UserError("data.tokenizer", message)
    return tokenizer


def _load_readers(
    folder: RunFolder, readers: range, num_layers: int, device: torch.device
) -> dict[int, ReaderState]:
    """Position and carried state of each of these readers, from the checkpoint if there is one."""
    if folder.checkpoint is None:
        return {reader: ReaderState(None, None) for reader in readers}
    if not folder.checkpoint.is_dir():
        message = (
            f"rank 0 goes on from {folder.checkpoint}, which {socket.gethostname()} does not have; "
            "run.dir must be on a file system that all machines share"
        )
        raise UserError("run.dir", message)
    return {
        reader: checkpoint.load_reader(folder.checkpoint, reader, num_layers, device) for reader in readers
    }


def _start_loader(recipe: Recipe, encoder: Encoder, readers: dict[int, ReaderState]) -> ChunkLoader:
    positions = [reader.position for reader in readers.values()]
    return ChunkLoader(reader_spec(recipe, encoder), list(readers), positions, recipe.data.workers)


def _open_output(
    recipe: Recipe,
    accelerator: Accelerator,
    folder: RunFolder,
    corpus: dict[str, Any] | None,
    step: int,
    verbosity: Verbosity,
) -> RunOutput:
    saver = Saver(
        folder.path / "checkpoints",
        accelerator,
        keep=recipe.train.keep_checkpoints,
        in_background=recipe.train.save_in_background,
        newest=step or None,
        timeout=collective_timeout(recipe),
        warn=warn,
        before_publishing=folder.metrics.sync,
        always_keep=frozenset(recipe.train.save_at),
    )
    if not accelerator.is_main_process:
        return RunOutput(folder, saver, tracker=None, others=None, log=None)
    details = run_details(recipe, accelerator.device, accelerator.num_processes, corpus, step)
    tracker = build_tracker(folder.path, recipe, warn, details)
    others = OtherTrackers(recipe, folder.path, step, warn)
    log = RunLog(verbosity, recipe.train.steps, step)
    pusher = build_pusher(recipe, folder.path, step, warn, log.report)
    return RunOutput(folder, saver, tracker, others, log, pusher)
