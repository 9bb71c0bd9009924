"""The training loop, top to bottom.

train         set up (set_up.py) -> steps -> finish (finish.py)
take_steps    agree on the next step -> take it (step.py) -> log (step_log.py), save, evaluate (pauses.py)
"""

import contextlib
import signal
import sys
import time
from dataclasses import dataclass

import datasets
import torch
import transformers
from huggingface_hub.utils import disable_progress_bars

from ..common.errors import StorageError, UserError
from ..common.output import warn
from ..data import Batch, tokenizer_fingerprint
from . import processes
from .config import Recipe
from .export import masks_padding
from .finish import finish
from .folder import RunFolder, open_folder
from .forecast import Forecast
from .interrupt import Interrupt, exit_after_signal
from .launch_checks import check_launch, check_same_recipe
from .launcher_engines import check_engine
from .machine import keep_freed_memory
from .pauses import catch_up, evaluate_due, is_due
from .push.beside import check_push, push_missed
from .recipe import resolved_config
from .run import Run
from .run_log import SetUpPhases, Verbosity
from .saving import snapshot
from .set_up import collective_timeout, set_up
from .step import take_step
from .step_log import log_step
from .throughput import Throughput
from .tracking import send_missed
from .watchdog import Watchdog

POLL_SECONDS = 0.5  # how long to wait for data before looking for signals


def train(recipe: Recipe, verbosity: Verbosity = "normal") -> None:
    """Train a recipe to its end, from the newest checkpoint in its folder if there is one.

    Args:
        verbosity: of the log (run_log.py).

    Raises:
        UserError: something that the user can correct.
        NonFiniteError: the loss or gradient is not finite; the last checkpoint is unchanged.
        SystemExit: after a signal of `interrupt.SIGNALS`, with 128 + the signal, everything saved.
        StorageError: a checkpoint cannot be read, or the last one cannot be written.
    """
    check_launch(recipe)
    keep_freed_memory()
    _configure_libraries(verbosity)
    accelerator = processes.connect(collective_timeout(recipe), processes.local_device(recipe.train.device))
    check_engine(accelerator.distributed_type)
    with (
        Watchdog.from_accelerator(accelerator, recipe.train.peer_timeout) as watchdog,
        contextlib.ExitStack() as stack,
    ):
        if verbosity == "verbose" and accelerator.is_main_process:
            watchdog.on_phase = SetUpPhases()
        watchdog.enter("comparing recipes", is_set_up=True)
        check_same_recipe(recipe, accelerator)
        watchdog.enter("opening the run's folder", is_set_up=True)
        if not accelerator.is_main_process:  # the main process opens it, and is a phase behind meanwhile
            watchdog.enter("waiting for the run's folder", is_set_up=True)
        folder = stack.enter_context(contextlib.closing(open_folder(recipe, accelerator)))
        if accelerator.is_main_process:
            watchdog.enter("handing the run's folder on", is_set_up=True)
        if folder.is_finished:
            watchdog.stop()
            if accelerator.is_main_process:
                _report_finished(recipe, folder)
            return
        watchdog.enter("asking the hub", is_set_up=True)
        is_resumed = folder.checkpoint is not None
        processes.run_on_main(accelerator, lambda: check_push(recipe, folder.run_id, is_resumed, warn))
        run = set_up(recipe, accelerator, folder, watchdog, verbosity)
        signal_number = _steps_and_finish(run)
        if signal_number is not None:
            saved = f"Saved step {run.step} of {recipe.train.steps}" if run.step else "Nothing to save yet"
            message = f"{saved} in {folder.path}; the same command goes on from there."
            exit_after_signal(signal_number, message, run.is_main)
        if run.is_main:
            folder.mark_finished(run.step)
            if run.output.pusher is not None:
                run.output.pusher.push_last(run.step)


def _configure_libraries(verbosity: Verbosity) -> None:
    """Silence the warnings of transformers unless verbose, and progress bars where stderr is no terminal."""
    if verbosity != "verbose":
        transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()  # of huggingface_hub


def _report_finished(recipe: Recipe, folder: RunFolder) -> None:
    step = folder.manifest["step"]
    print(
        f"{folder.path} is finished: step {step} of {recipe.train.steps}, model in {folder.path / 'model'}. "
        "Raise train.steps to go on."
    )
    send_missed(folder.path, recipe, step, warn)
    push_missed(recipe, folder.path, step, warn, print)


def _steps_and_finish(run: Run) -> int | None:
    """Take all steps and finish the run; returns the signal that stopped it, if one did. The run is
    closed."""
    status = "FAILED"
    try:
        with Interrupt() as interrupt:
            signal_number = take_steps(run, interrupt)
            if signal_number is None:
                finish(run)
        status = "FINISHED" if signal_number is None else "KILLED"
        return signal_number
    except Exception as error:
        error.add_note(f"after step {run.step}")  # for restarts.py, which compares errors and steps
        raise
    finally:
        run.watchdog.stop()
        run.close(status)


def take_steps(run: Run, interrupt: Interrupt) -> int | None:
    """Take all steps; returns the signal that stopped them, in all processes, if one did."""
    train, progress = run.recipe.train, run.progress
    catch_up(run)
    throughput, forecast, saved_at = Throughput(progress.tokens), Forecast(), time.monotonic()
    while progress.step < train.steps:
        step = _agree_on_next_step(run, interrupt, _is_save_due(run, saved_at))
        throughput.add_wait(step.data_seconds)
        if step.has_signal or step.has_failed:
            return _stop(run, step, interrupt)
        entry = take_step(run, progress.step + 1, step.batch, step.num_scored)
        progress.step += 1
        progress.tokens += int(step.num_tokens)
        is_last = progress.step == train.steps

        is_logged = progress.step % train.log_every == 0 or is_last or "skipped" in entry
        if is_logged:
            log_step(run, entry, throughput.measure(progress.tokens))
        if run.output.log is not None:
            run.output.log.advance()
        forecast.after_step(run, is_logged)
        with throughput.paused():
            is_save_due = step.is_save_due or progress.step in train.save_at
            if is_last or is_save_due or is_due(progress.step, train.save_every):
                _save(run, is_last)
                saved_at = time.monotonic()
            evaluate_due(run)  # after saving, since it can fail
        if run.output.pusher is not None and not is_last:
            run.output.pusher.update(run.output.saver.newest)
    return None


def _is_save_due(run: Run, saved_at: float) -> bool:
    """Whether train.save_minutes have passed. Only the main process's clock counts."""
    minutes = run.recipe.train.save_minutes
    return run.is_main and minutes is not None and time.monotonic() - saved_at >= 60 * minutes


@dataclass(frozen=True)
class NextStep:
    """What all processes have agreed on before a step."""

    batch: list[Batch]
    """This process's part of the next chunk of each of its readers."""
    num_scored: float
    """Scored tokens, or labels, of the global batch."""
    num_tokens: float
    """Tokens of the global batch, without the padding of labelled examples."""
    has_signal: bool
    """A process has received a signal."""
    has_failed: bool
    """A process cannot read its data."""
    is_save_due: bool
    errors: list[tuple[str, str]]
    """Why this process cannot read."""
    data_seconds: float
    """How long this process waited for its data."""


def _agree_on_next_step(run: Run, interrupt: Interrupt, is_save_due: bool) -> NextStep:
    """Wait until every process has its data, or one has to stop.

    Processes exchange their state as soon as all have data, and every POLL_SECONDS while one still waits. So
    each reacts to a signal, its own or another's, however long a disk or a network stalls.
    """
    run.watchdog.enter(f"step {run.step + 1}: reading")
    batch: list[Batch] | None = None
    errors: list[tuple[str, str]] = []
    data_seconds = 0.0
    while True:
        if batch is None:
            start = time.perf_counter()
            batch, errors = _read(run)
            data_seconds += time.perf_counter() - start
            if batch is not None:
                run.watchdog.enter(f"step {run.step + 1}: computing")
        counts = [
            sum(chunk.num_scored for chunk in batch or []),
            sum(chunk.num_tokens for chunk in batch or []),
            interrupt.requested is not None,
            len(errors),
            batch is None,
            is_save_due,
        ]
        sums = processes.all_reduce_sum(run.accelerator, counts)
        num_scored, num_tokens, signals, failures, num_waiting, due = sums
        if signals or failures or not num_waiting:
            if batch is None:
                run.watchdog.enter(f"step {run.step + 1}: leaving")
            return NextStep(
                batch=batch or [],
                num_scored=num_scored,
                num_tokens=num_tokens,
                has_signal=bool(signals),
                has_failed=bool(failures),
                is_save_due=bool(due),
                errors=errors,
                data_seconds=data_seconds,
            )


def _read(run: Run) -> tuple[list[Batch] | None, list[tuple[str, str]]]:
    """This process's part of the next chunks (None if they are not ready yet), and errors.

    Errors are returned, since all processes must know of them before one stops.
    """
    try:
        chunks = run.data.loader.take(POLL_SECONDS)
        return None if chunks is None else [run.layout.piece(chunk) for chunk in chunks], []
    except UserError as error:
        return [], error.errors
    except Exception as error:  # a worker that died, a network, a broken file
        return [], [("data.corpus", f"{type(error).__name__}: {error}")]


def _stop(run: Run, step: NextStep, interrupt: Interrupt) -> int:
    """Save, and return the signal that stops the run.

    Raises:
        UserError: in every process, if one cannot read its data.
    """
    if run.step > 0:
        _save(run, is_last=True)
    if step.has_failed:
        raise UserError.from_list(dict.fromkeys(processes.all_gather_objects(run.accelerator, step.errors)))
    return interrupt.requested or signal.SIGTERM


def _save(run: Run, is_last: bool) -> None:
    """Save this step. A failed save is reported when the next one begins, and training goes on; the last must
    succeed.

    Raises:
        StorageError: in every process, if any of them could not write the last checkpoint.
    """
    run.watchdog.enter(f"step {run.step}: saving")
    saver, progress = run.output.saver, run.progress
    if (failures := saver.join()) and run.is_main:
        warn(
            f"a checkpoint could not be written: {'; '.join(failures)}. "
            "Older ones are untouched; training goes on."
        )
    if saver.newest != run.step:
        info = {
            "tokens": progress.tokens,
            "vocab_size": run.engine.module.config.vocab_size,
            "masks_padding": masks_padding(run.engine.module.config),
            "tokenizer": tokenizer_fingerprint(run.data.tokenizer),
            "corpus": run.data.corpus,
            "recent_losses": progress.recent_losses,
            "num_skips": progress.num_skips,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if run.is_main:
            run.output.folder.restore()
        files = snapshot(run.engine, run.data.readers, run.layout, resolved_config(run.recipe))
        saver.start(run.step, files, info)
    if is_last and (failures := saver.join()):
        raise StorageError(
            f"The checkpoint of step {run.step} could not be written: {'; '.join(failures)}. "
            "Older checkpoints are untouched."
        )
