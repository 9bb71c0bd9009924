"""A run: everything that lasts as long as it does, and how it is set up, anew or from a checkpoint."""

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..common.errors import UserError
from ..common.output import warn
from ..data import (
    ChunkLoader,
    CorpusSpec,
    Encoder,
    ReaderSpec,
    TaskValidation,
    ValidationSet,
    check_corpus,
    corpus_fingerprint,
    fingerprint,
    model_vocab_size,
    run_tokenizer,
)
from ..models import MinRNNConfig, MinRNNForCausalLM
from ..models.context_parallel import use_context_parallel
from ..models.dtypes import DTYPES
from ..models.recompute import checkpointing_options
from . import checkpoint, processes
from .checkpoint import ReaderState
from .config import OptimSection, Recipe
from .engine import Engine, build_engine
from .evaluation import validation_sets
from .export import model_config
from .folder import RunFolder
from .folder_checks import FILES, FOLDERS
from .machine import (
    CHOICES,
    PrecisionChoice,
    choose_precision,
    compile_problem,
    device_name,
    measure_rates,
)
from .optim import learning_rate
from .processes import ProcessLayout
from .recipe import schedule_steps_of, settled
from .saving import Saver
from .tracking import SQLITE_SUFFIXES, Tracker, absolute_uri, sqlite_file, tracker_of
from .watchdog import Watchdog


@dataclass
class Run:
    """Everything that lasts as long as the run."""

    recipe: Recipe
    accelerator: Accelerator
    layout: ProcessLayout
    folder: RunFolder
    tokenizer: Any
    config: MinRNNConfig
    num_parameters: int
    engine: Engine
    readers: dict[int, ReaderState]
    """This process's readers and where they are."""
    loader: ChunkLoader
    validation: Sequence[ValidationSet] | Sequence[TaskValidation]
    saver: Saver
    watchdog: Watchdog
    step: int
    tokens: int
    matmul_rate: float
    recent_losses: list[float]
    """Of the latest steps, newest last: what a spike is measured by."""
    num_skips: int = 0
    """Batches left out in a row."""
    corpus: dict[str, Any] | None = None
    """Its fingerprint, as this start met it."""
    tracker: Tracker | None = None
    bar: Any = None
    latest: dict[str, Any] = field(default_factory=dict)
    """Of the latest validation."""

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def close(self, status: str) -> None:
        """Stop what runs beside the loop."""
        self.loader.close()
        self.saver.join(timeout=60)
        if self.is_main:
            self.folder.metrics.close()
        if self.bar is not None:
            self.bar.close()
        if self.tracker is not None:
            self.tracker.close(status)

    def say(self, message: str) -> None:
        """A line above the progress bar, from the main process."""
        if self.is_main:
            tqdm.write(message, file=sys.stderr)


def collective_timeout(recipe: Recipe) -> timedelta:
    """How long collectives wait: longer than the watchdog, which knows names."""
    return timedelta(seconds=recipe.train.peer_timeout + 120)


def set_up(recipe: Recipe, accelerator: Accelerator, folder: RunFolder, watchdog: Watchdog) -> Run:
    """A run ready for its next step: readers where they stopped, model and optimizer as saved, tracking begun.

    Raises:
        UserError: data, a checkpoint or an export that cannot be used, from whichever process met it.
    """
    watchdog.enter("measuring the machine", is_set_up=True)
    choice, rate = _decide_precision(recipe, accelerator, folder)  # before anything runs beside it
    recipe = settled(recipe, folder.saved)
    recipe = dataclasses.replace(
        recipe, train=recipe.train.model_copy(update={"precision": choice.precision})
    )
    layout = processes.build_layout(accelerator, recipe.parallel.context, collective_timeout(recipe))
    mine = layout.readers(recipe.batch.readers)
    corpus, errors = processes.run_on_all_ranks(
        accelerator, lambda: _describe_corpus(recipe, folder, accelerator.is_main_process)
    )
    if errors:
        raise UserError.from_list(errors)
    loader, validation, readers, tokenizer, model = _open_everywhere(
        recipe, accelerator, folder, mine, watchdog
    )
    config, num_parameters = model.config, model.num_parameters()
    if layout.group is not None:
        use_context_parallel(model, layout.group)
    watchdog.enter("building the engine", is_set_up=True)
    with contextlib.ExitStack() as if_it_fails:
        if_it_fails.callback(loader.close)
        engine = build_engine(recipe, accelerator, model, folder.checkpoint)
        processes.run_on_main(accelerator, lambda: folder.begin(recipe))
        if_it_fails.pop_all()
    manifest, train = folder.manifest, recipe.train
    step = manifest.get("step", 0)
    run = Run(
        recipe,
        accelerator,
        layout,
        folder,
        tokenizer,
        config,
        num_parameters,
        engine,
        readers,
        loader,
        validation,
        Saver(
            folder.path / "checkpoints",
            accelerator,
            train.keep_checkpoints,
            train.save_in_background,
            step or None,
            collective_timeout(recipe),
            warn,
            folder.metrics.sync,
        ),
        watchdog,
        step,
        manifest.get("tokens", 0),
        rate,
        manifest.get("recent_losses", []),
        manifest.get("num_skips", 0),
        corpus,
    )
    if run.is_main:
        run.tracker = tracker_of(folder.path, recipe, warn)
        run.bar = tqdm(total=recipe.train.steps, initial=step, unit="step", dynamic_ncols=True)
        _announce(run, choice)
    return run


def _announce(run: Run, choice: PrecisionChoice) -> None:
    """The lines that a run begins with: what is trained, on what, from which step."""
    recipe, layout, batch, saved = run.recipe, run.layout, run.recipe.batch, run.folder.saved
    size = f"{run.config.cell}, {run.num_parameters:,} parameters, {batch.readers} x {batch.lanes} x {batch.chunk} tokens a step"
    sharing = f"{run.engine.name}, " * (layout.num_processes > 1) + f"{layout.context} to a sequence, " * (
        layout.context > 1
    )
    engine_and_precision = (
        f"{layout.num_processes} process(es) on {run.accelerator.device.type}, {sharing}{choice.precision}"
    )
    reason = f" ({choice.reason})" if choice.reason else ""
    if choice.warning:
        warn(choice.warning)
    if layout.context > 1 and recipe.train.compile and recipe.train.recompute != "none":
        warn(
            "with parallel.context, train.compile does nothing for blocks that train.recompute runs again; they stay as they are"
        )
    run.say(
        f"{run.folder.path}: {size}, {engine_and_precision}{reason}; {f'going on from step {run.step}' if run.step else 'from the beginning'}"
    )
    if saved and (note := _learning_rate_note(recipe, saved, run.step)):
        run.say(note)


def _learning_rate_note(recipe: Recipe, saved: dict[str, Any], step: int) -> str | None:
    """What the learning rate does from here on, where the run is longer or shorter than it was, or its schedule another."""
    before, steps, schedule = (
        saved["train"]["steps"],
        recipe.train.steps,
        recipe.optim.schedule_steps or recipe.train.steps,
    )
    if (steps, schedule) == (before, schedule_steps_of(saved)) or step >= steps:
        return None
    was = learning_rate(OptimSection.model_construct(**saved["optim"]), step, schedule_steps_of(saved))
    first, last = (learning_rate(recipe.optim, at, schedule) for at in (step + 1, steps))
    does = (
        f"stays at {first:.3g}"
        if first == last
        else f"{'falls' if last < first else 'rises'} from {first:.3g} to {last:.3g}"
    )
    note = f"train.steps is {steps}, it was {before}: the learning rate, {was:.3g} at step {step}, {does} until step {steps}"
    if schedule < steps and recipe.optim.schedule != "constant":
        note += f"; its schedule ends at step {schedule}. --optim.schedule_steps {steps} --run.change [optim.schedule_steps] draws it anew"
    return note


def _decide_precision(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder
) -> tuple[PrecisionChoice, float]:
    """What all processes compute in, as rank 0 chooses, and the rate of its matrix products in FLOP/s.

    Raises:
        UserError: a device that does not support it.
    """
    asked, kept = recipe.train.precision, settled(recipe, folder.saved).train.precision
    rates = measure_rates(accelerator.device, CHOICES if kept == "auto" else [*CHOICES, kept])
    everywhere = set.intersection(*processes.all_gather_objects(accelerator, [set(rates)]))
    rates = processes.broadcast_from_main(
        accelerator, {name: rate for name, rate in rates.items() if name in everywhere}
    )
    choice = choose_precision(asked, None if kept == "auto" else kept, rates, device_name(accelerator.device))
    return choice, rates[choice.precision]


def _describe_corpus(recipe: Recipe, folder: RunFolder, is_main: bool) -> dict[str, Any] | None:
    """The corpus's fingerprint, after comparing it with the one in the checkpoint, which older ones lack.

    Raises:
        UserError: it is not the corpus that the run began with.
    """
    if recipe.synthetic_task() is not None:
        return None
    spec, before = corpus_of(recipe), folder.manifest.get("corpus")
    note = None if before is None else check_corpus(before, spec, recipe.data.order, recipe.batch.readers)
    if note is not None and is_main:
        warn(f"data.corpus: {note}")
    return corpus_fingerprint(spec)


Opened = tuple[
    ChunkLoader,
    Sequence[ValidationSet] | Sequence[TaskValidation],
    dict[int, ReaderState],
    Any,
    MinRNNForCausalLM,
]


def _open_everywhere(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder, mine: range, watchdog: Watchdog
) -> Opened:
    """What this process opens, once all have opened theirs.

    Raises:
        UserError, StorageError: in every process, what any of them met.
    """
    watchdog.enter("opening data and model", is_set_up=True)

    def open_own() -> Opened:
        try:
            opened = _open(recipe, folder, mine, accelerator.device)
        finally:
            watchdog.enter(
                "meeting the others, data and model open", is_set_up=True
            )  # ahead of who has not opened them yet
        if_it_fails.callback(opened[0].close)
        return opened

    with contextlib.ExitStack() as if_it_fails:
        opened, errors = processes.run_on_all_ranks(accelerator, open_own)
        if errors or opened is None:
            raise UserError.from_list(errors)
        if_it_fails.pop_all()
    return opened


def _open(recipe: Recipe, folder: RunFolder, mine: range, device: torch.device) -> Opened:
    """What this process reads and trains, before it has to do with others: data under way, its share of what is held out, tokenizer, model."""
    tokenizer = run_tokenizer(
        recipe.data.corpus, recipe.data.tokenizer, recipe.data.task, recipe.data.trust_remote_code
    )
    if folder.manifest.get("tokenizer", fingerprint(tokenizer)) != fingerprint(tokenizer):
        name = recipe.data.tokenizer
        raise UserError(
            "data.tokenizer",
            f"{name} is not the tokenizer that the run began with: its vocabulary has changed; another run.dir",
        )
    encoder = Encoder.from_tokenizer(tokenizer, recipe.data.tokenizer)
    vocab_size = folder.manifest.get("vocab_size") or model_vocab_size(tokenizer)
    config = model_config(recipe.model_fields_resolved(), tokenizer, vocab_size)
    readers = {reader: ReaderState(None, None) for reader in mine}
    if folder.checkpoint is not None:
        if not folder.checkpoint.is_dir():
            advice = "run.dir must be on a file system that all machines share"
            raise UserError(
                "run.dir",
                f"rank 0 goes on from {folder.checkpoint}, which {socket.gethostname()} does not have; {advice}",
            )
        load = checkpoint.load_reader
        readers = {
            reader: load(folder.checkpoint, reader, config.num_hidden_layers, device) for reader in mine
        }
    data, batch = recipe.data, recipe.batch
    shape = (batch.readers, batch.lanes, batch.chunk)
    spec = ReaderSpec(
        corpus_of(recipe),
        data.order,
        encoder,
        *shape,
        data.shuffle_window,
        recipe.run.seed,
        recipe.synthetic_task(),
    )
    loader = ChunkLoader(spec, list(mine), [reader.position for reader in readers.values()], data.workers)
    try:
        return (
            loader,
            validation_sets(recipe, corpus_of(recipe), encoder, mine),
            readers,
            tokenizer,
            _build_model(recipe, config, folder, device),
        )
    except BaseException:
        loader.close()
        raise


def _build_model(
    recipe: Recipe, config: MinRNNConfig, folder: RunFolder, device: torch.device
) -> MinRNNForCausalLM:
    """On the CPU, with a checkpoint's weights, an export's, or new ones."""
    torch.manual_seed(recipe.run.seed)
    model = MinRNNForCausalLM(config)
    if recipe.model.init_from and folder.checkpoint is None:
        _warm_start(model, recipe.model.init_from)
    nn.Module.to(model, DTYPES["fp64" if recipe.train.precision == "fp64" else "fp32"])
    if (options := checkpointing_options(recipe.train.recompute)) is not None:
        model.activation_checkpointing_enable(options)
    problem = compile_problem(device) if recipe.train.compile else None
    if problem is not None:
        warn(
            f"train.compile: torch.compile cannot run on {device.type}: {problem}; blocks run as they are, slower"
        )
    elif recipe.train.compile:
        for block in model.model.layers:
            block.compile()
    if folder.checkpoint is not None:
        try:
            checkpoint.load_parameters(folder.checkpoint, model)
        except ValueError as error:
            raise UserError("run.dir", str(error)) from None
    return model


def corpus_of(recipe: Recipe) -> CorpusSpec:
    """What the recipe reads."""
    data = recipe.data
    held_out = 0.0 if data.validation is not None else data.validation_fraction
    return CorpusSpec(
        data.corpus,
        data.subset,
        data.split,
        data.revision,
        data.text_field,
        data.skip_broken,
        held_out,
        data.join,
        _written_by(recipe),
    )


def _written_by(recipe: Recipe) -> tuple[str, ...]:
    """Where the run writes, as absolute paths without links: no part of a corpus that holds it.

    Its folder, and its own names in that; MLflow's database, if that is a file, and the artifacts that MLflow puts beside it.
    """
    folder, database = Path(recipe.run.dir), sqlite_file(absolute_uri(recipe.tracking.place() or ""))
    places = [folder, *(folder / name for name in (*FILES, *FOLDERS))]
    if database is not None:
        places += [
            Path("mlruns"),
            *(database.with_name(database.name + suffix) for suffix in ("", *SQLITE_SUFFIXES)),
        ]
    return tuple(map(os.path.realpath, places))


def _warm_start(model: MinRNNForCausalLM, name: str) -> None:
    """Take the weights of an export of the same shape."""
    unset_hf_deepspeed_config()  # under ZeRO-3, from_pretrained would give this process its share of them only
    try:
        source = MinRNNForCausalLM.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError("model.init_from", f"cannot load {name}: {str(error).splitlines()[0]}") from None
    theirs, ours = source.config.to_dict(), model.config.to_dict()
    shaping = (
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "cell",
        "expansion_factor",
        "output_gate",
        "conv_kernel",
        "intermediate_size",
        "gated_mlp",
        "candidate_activation",
        "hidden_act",
        "rms_norm_eps",
    )
    if different := [key for key in shaping if theirs[key] != ours[key]]:
        raise UserError.from_list(
            (f"model.{key}", f"is {ours[key]!r}, but {name} (model.init_from) has {theirs[key]!r}")
            for key in different
        )
    model.load_state_dict(source.state_dict())
