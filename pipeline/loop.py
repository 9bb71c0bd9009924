"""The training loop, top to bottom.

    train         set up (run.py) -> steps -> finish
    one step      for each of my readers: chunk -> forward with that reader's state -> backward;  clip, step
    between them  log, save, validate; leave if asked to

The loss of a step is one mean over all scored tokens of the global batch, whatever the number of readers, processes and accumulations.
"""

import contextlib
import hashlib
import math
import signal
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from ..common.errors import NonFiniteError, StorageError, UserError
from ..common.output import warn
from ..data import Chunk, fingerprint, is_synthetic
from ..models import MinRNNForCausalLM
from . import checkpoint, processes
from .config import Recipe
from .evaluation import validate, validation_summary
from .export import export_model, kept_card, load_checkpoint, sample
from .folder import open_folder
from .forecast import Forecast
from .interrupt import Interrupt, leave
from .launch_checks import check_launch, check_same_recipe
from .launcher_engines import check_engine
from .machine import keep_freed_memory, training_flops_per_token
from .optim import learning_rate
from .pictures import draw_accuracy, draw_loss
from .recipe import resolved
from .run import Run, collective_timeout, set_up
from .saving import snapshot
from .tracking import send_missed
from .watchdog import Watchdog

SPIKE_WINDOW = 100  # steps whose median loss says what is usual
POLL_SECONDS = 0.5  # without data until signals are looked for


def train(recipe: Recipe) -> None:
    """Run a recipe to its end, from wherever its folder says.

    Raises:
        UserError: something the user can mend.
        NonFiniteError: the loss or gradient is not finite; the last checkpoint is as it was.
        SystemExit: after a signal of `interrupt.SIGNALS`, with 128 + the signal, everything saved.
        StorageError: a checkpoint cannot be read, or the last one not be written.
    """
    check_launch(recipe)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = processes.connect(collective_timeout(recipe), processes.local_device(recipe.train.device))
    check_engine(accelerator.distributed_type)
    with Watchdog.of(accelerator, recipe.train.peer_timeout) as watchdog, contextlib.ExitStack() as stack:
        watchdog.enter("comparing recipes", is_set_up=True)
        check_same_recipe(recipe, accelerator)
        watchdog.enter("opening the run's folder", is_set_up=True)
        if not accelerator.is_main_process:  # the main one opens it for all, and is behind while it does
            watchdog.enter("waiting for the run's folder", is_set_up=True)
        folder = stack.enter_context(contextlib.closing(open_folder(recipe, accelerator)))
        if accelerator.is_main_process:
            watchdog.enter("handing the run's folder on", is_set_up=True)
        if folder.is_finished:
            watchdog.stop()
            if accelerator.is_main_process:
                done = f"{folder.path} is finished: step {folder.manifest['step']} of {recipe.train.steps}"
                print(f"{done}, model in {folder.path / 'model'}. Raise train.steps to go on.")
                send_missed(folder.path, recipe, folder.manifest["step"], warn)
            return
        run = set_up(recipe, accelerator, folder, watchdog)
        status, signal_number = "FAILED", None
        try:
            with Interrupt() as interrupt:
                signal_number = take_steps(run, interrupt)
                if signal_number is None:
                    _finish(run)
            status = "FINISHED" if signal_number is None else "KILLED"
        except Exception as error:
            error.add_note(f"after step {run.step}")  # whether it is the same again after a restart
            raise
        finally:
            watchdog.stop()
            run.close(status)
        if run.is_main and signal_number is None:
            folder.mark_finished(run.step)
        if signal_number is not None:
            saved = f"Saved step {run.step} of {recipe.train.steps}" if run.step else "Nothing to save yet"
            message = f"{saved} in {folder.path}; the same command goes on from there."
            leave(signal_number, message, run.is_main)


def take_steps(run: Run, interrupt: Interrupt) -> int | None:
    """Take all steps; returns the signal that stopped them, on all processes, if one did."""
    recipe = run.recipe
    if _validation_is_missing(run):
        _validate(run)
    clock, tokens_at_clock = time.perf_counter(), run.tokens
    saved_at, forecast = time.monotonic(), Forecast()
    while run.step < recipe.train.steps:
        minutes = recipe.train.save_minutes
        save_is_due = (
            run.is_main and minutes is not None and time.monotonic() - saved_at >= 60 * minutes
        )  # one clock decides for all
        step = _next_step(run, interrupt, save_is_due)
        if (step.is_stopped or step.is_failed) and run.step > 0:
            _save(run, is_last=True)
        if step.is_failed:
            raise UserError.from_list(
                dict.fromkeys(processes.all_gather_objects(run.accelerator, step.errors))
            )
        if step.is_stopped:
            return interrupt.requested or signal.SIGTERM
        entry = _one_step(run, run.step + 1, step.batch, step.num_scored)
        run.step, run.tokens = (
            run.step + 1,
            run.tokens + recipe.batch.readers * recipe.batch.lanes * recipe.batch.chunk,
        )
        is_last = run.step == recipe.train.steps

        is_logged = run.step % recipe.train.log_every == 0 or is_last or "skipped" in entry
        if is_logged:
            now = time.perf_counter()
            rate = (run.tokens - tokens_at_clock) / (now - clock)
            clock, tokens_at_clock = now, run.tokens
            _log(run, entry, rate)
        if run.bar is not None:
            run.bar.update()
        forecast.after_step(run, is_logged)
        paused = time.perf_counter()
        if is_last or step.save_is_due or _is_due(run.step, recipe.train.save_every):
            _save(run, is_last)
            saved_at = time.monotonic()
        if is_last or _is_due(run.step, recipe.train.eval_every):
            _validate(run)  # after saving: it can fail
        clock += time.perf_counter() - paused
    return None


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _validation_is_missing(run: Run) -> bool:
    """Whether the run goes on from a step that was saved, but ended before that step's validation did."""
    if run.step == 0 or not (
        run.step == run.recipe.train.steps or _is_due(run.step, run.recipe.train.eval_every)
    ):
        return False
    validations = run.folder.metrics.history.update().validations if run.is_main else []
    return processes.broadcast_from_main(
        run.accelerator, not any(entry["step"] == run.step for entry in validations)
    )


@dataclass
class NextStep:
    """What all processes have agreed on before a step."""

    batch: list[Chunk]
    """This process's part of the next chunk of each of its readers."""
    num_scored: float
    """Scored tokens of the global batch."""
    is_stopped: bool
    """A signal has come to one of them."""
    is_failed: bool
    """One of them cannot read."""
    save_is_due: bool
    errors: list[tuple[str, str]]
    """Why this one cannot."""


def _next_step(run: Run, interrupt: Interrupt, save_is_due: bool) -> NextStep:
    """Wait until every process has its data, or one has to leave.

    They ask each other as soon as each has its data, and every POLL_SECONDS where one still waits for it: so none is deaf to a
    signal, its own or another's, however long a disk or a network stalls.
    """
    run.watchdog.enter(f"step {run.step + 1}: reading")
    batch: list[Chunk] | None = None
    errors: list[tuple[str, str]] = []
    while True:
        if batch is None:
            batch, errors = _read(run)
            if batch is not None:
                run.watchdog.enter(f"step {run.step + 1}: computing")
        counts = [
            sum(chunk.num_scored for chunk in batch or []),
            interrupt.requested is not None,
            len(errors),
            batch is None,
            save_is_due,
        ]
        num_scored, stopped, failed, num_waiting, due = processes.all_reduce_sum(run.accelerator, counts)
        if stopped or failed or not num_waiting:
            if batch is None:
                run.watchdog.enter(f"step {run.step + 1}: leaving")
            return NextStep(batch or [], num_scored, bool(stopped), bool(failed), bool(due), errors)


def _read(run: Run) -> tuple[list[Chunk] | None, list[tuple[str, str]]]:
    """This process's part of the next chunks, None if they are not there yet, or what is wrong: all must hear of it before one leaves."""
    try:
        chunks = run.loader.take(POLL_SECONDS)
        return None if chunks is None else [run.layout.piece(chunk) for chunk in chunks], []
    except UserError as error:
        return [], error.errors
    except Exception as error:  # a worker that died, a network, a broken file: the others must not wait
        return [], [("data.corpus", f"{type(error).__name__}: {error}")]


def _one_step(run: Run, step: int, batch: list[Chunk], num_scored: float) -> dict[str, Any]:
    """Forward and backward for each reader, then the update; returns what metrics.jsonl says about it."""
    recipe, accelerator, engine = run.recipe, run.accelerator, run.engine
    losses = []
    for i, chunk in enumerate(batch):
        reader = run.readers[chunk.reader]
        _seed(recipe.run.seed, step, chunk.reader, run.layout.context_rank)
        with engine.accumulating(is_last=i == len(batch) - 1):
            output = engine.forward(
                input_ids=processes.to_device(chunk.input_ids, accelerator),
                shift_labels=processes.to_device(chunk.shift_labels, accelerator),
                document_starts=processes.to_device(chunk.document_starts, accelerator)
                if chunk.document_starts.any()
                else None,
                past_key_values=reader.cache,
                use_cache=recipe.batch.carry_state,
                skip_logits=True,
                num_items_in_batch=num_scored
                / accelerator.num_processes,  # engines divide the sum of gradients by the number of processes
            )
            engine.backward(output.loss)
        losses.append(output.loss.detach())
        reader.cache = output.past_key_values.detach_() if recipe.batch.carry_state else None
        reader.position = chunk.state
    # Python's numbers are fp64, which not every device has.
    mine: list[float] = [loss / accelerator.num_processes for loss in torch.stack(losses).tolist()]
    (loss,) = processes.all_reduce_sum(accelerator, [sum(mine)])
    lr = learning_rate(recipe.optim, step, recipe.optim.schedule_steps or recipe.train.steps)
    entry: dict[str, Any] = {"loss": loss, "lr": lr}
    if recipe.train.skip_spikes is not None and (why := _spike(run, loss)):
        engine.discard()
        _after_skip(run, step, batch, mine, why)
        return {**entry, "grad_norm": None, "skipped": why}
    if not math.isfinite(loss):
        _stop_non_finite(run, step, batch, mine, f"loss {loss}")
    grad_norm = engine.update(lr)
    if not math.isfinite(grad_norm):
        _stop_non_finite(run, step, batch, mine, f"loss {loss}, gradient norm {grad_norm}")
    run.num_skips = 0
    run.recent_losses = [*run.recent_losses, loss][-SPIKE_WINDOW:]
    return {**entry, "grad_norm": grad_norm}


def _seed(seed: int, step: int, reader: int, context_rank: int) -> None:
    """Dropout depends on (seed, step, reader) alone: nothing to save, and no layout changes it, unless processes share sequences."""
    part = f"/{context_rank}" if context_rank else ""
    digest = hashlib.blake2b(f"{seed}/{step}/{reader}{part}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))


def _spike(run: Run, loss: float) -> str | None:
    """What is wrong with a loss, if anything. A median needs ten steps."""
    if not math.isfinite(loss):
        return f"loss {loss}"
    factor, recent = run.recipe.train.skip_spikes, run.recent_losses
    if factor is None or len(recent) < 10 or loss <= factor * (usual := statistics.median(recent)):
        return None
    return f"loss {loss:.4g}, {factor} times the median {usual:.4g} is the limit"


def _after_skip(run: Run, step: int, batch: list[Chunk], losses: list[float], why: str) -> None:
    """Say it, forget states that are not finite, and give up after too many in a row."""
    run.num_skips += 1
    run.say(f"step {step} is left out: {why}")
    for reader in run.readers.values():
        if reader.cache is not None:
            reader.cache.zero_non_finite_rows_()
    if run.num_skips > run.recipe.train.max_skips:
        _stop_non_finite(
            run,
            step,
            batch,
            losses,
            f"{why}; {run.recipe.train.max_skips} batches in a row were left out before (train.max_skips)",
        )


def _stop_non_finite(run: Run, step: int, batch: list[Chunk], losses: list[float], what: str) -> None:
    """Say which step, reader and documents; nothing of this step is saved."""
    mine = [
        f"reader {chunk.reader}: {', '.join(sorted({name for lane in chunk.documents for name in lane}))}"
        for chunk, value in zip(batch, losses, strict=True)
        if not math.isfinite(value)
    ]
    where = list(dict.fromkeys(processes.all_gather_objects(run.accelerator, mine))) or [
        "every reader's loss is finite"
    ]
    run.saver.join()
    latest = checkpoint.steps_in(run.folder.path / "checkpoints")
    kept = f"the last checkpoint, {latest[0]}, is as it was" if latest else "there is no checkpoint yet"
    raise NonFiniteError(f"step {step}: {what}. In {'; '.join(where)}. Nothing was saved; {kept}.")


def _log(run: Run, entry: dict[str, Any], tokens_per_second: float) -> None:
    """One line of metrics.jsonl, and the progress bar."""
    recipe = run.recipe
    reached = (
        tokens_per_second
        * training_flops_per_token(run.num_parameters)
        / (run.matmul_rate * run.accelerator.num_processes)
    )
    entry = {"kind": "train", "step": run.step, "tokens": run.tokens, **entry}
    entry |= {"tokens_per_second": round(tokens_per_second, 1), "matmul_fraction": round(reached, 4)}
    if recipe.data.skip_broken and recipe.data.order == "documents":
        skipped = sum(reader.position["num_skipped"] for reader in run.readers.values() if reader.position)
        entry["documents_skipped"] = int(
            processes.all_reduce_sum(run.accelerator, [skipped / run.layout.context])[0]
        )
    _record(run, entry)
    if run.bar is not None:
        run.bar.set_postfix_str(f"loss {entry['loss']:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)


def _record(run: Run, entry: dict[str, Any]) -> None:
    if run.is_main:
        run.folder.restore()
        run.folder.metrics.append(entry)
        if run.tracker is not None:
            run.tracker.notify()


def _validate(run: Run) -> None:
    start = time.perf_counter()
    run.watchdog.enter(f"step {run.step}: validating")
    sharing = (run.layout, run.engine.in_lockstep, run.watchdog.move)
    run.latest = validate(
        run.engine.module, run.validation, run.accelerator, run.recipe.batch.carry_state, *sharing
    )
    if not math.isfinite(run.latest["loss"]):
        raise NonFiniteError(
            f"step {run.step}: the validation loss is {run.latest['loss']}. Checkpoints are as they were."
        )
    seconds = round(time.perf_counter() - start, 2)
    _record(
        run, {"kind": "validation", "step": run.step, "tokens": run.tokens, **run.latest, "seconds": seconds}
    )
    run.say(
        f"step {run.step}: held-out loss {run.latest['loss']:.4f} nats/token, {validation_summary(run.latest)}"
    )
    if run.is_main:
        try:
            history = run.folder.metrics.history.update()
            draw_loss(history, run.folder.path / "loss.png", run.folder.path.name)
            if run.latest.get("by_length"):
                draw_accuracy(history, run.folder.path / "accuracy_by_length.png", run.folder.path.name)
        except Exception as error:  # a picture is not worth a run
            warn(f"the pictures could not be drawn: {error}")


def _save(run: Run, is_last: bool) -> None:
    """Save this step. A save that failed is told of when the next begins, and training goes on; only the last must succeed.

    Raises:
        StorageError: in every process, if the last could not be written by any.
    """
    run.watchdog.enter(f"step {run.step}: saving")
    if (failures := run.saver.join()) and run.is_main:
        warn(
            f"a checkpoint could not be written: {'; '.join(failures)}. Older ones are untouched; training goes on."
        )
    if run.saver.newest != run.step:
        info = {
            "tokens": run.tokens,
            "vocab_size": run.config.vocab_size,
            "tokenizer": fingerprint(run.tokenizer),
            "corpus": run.corpus,
            "recent_losses": run.recent_losses,
            "num_skips": run.num_skips,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if run.is_main:
            run.folder.restore()
        run.saver.start(run.step, snapshot(run.engine, run.readers, run.layout, resolved(run.recipe)), info)
    if is_last and (failures := run.saver.join()):
        raise StorageError(
            f"The checkpoint of step {run.step} could not be written: {'; '.join(failures)}. Older checkpoints are untouched."
        )


def _finish(run: Run) -> None:
    """The exported model, from the checkpoint that was just written, and what it writes itself.

    Raises:
        UserError, StorageError: in every process, if a line of metrics.jsonl or the export could not be written; the same
            command tries again.
    """
    run.watchdog.enter("exporting")
    processes.run_on_main(run.accelerator, lambda: _export(run))


def _export(run: Run) -> None:
    folder, recipe = run.folder.path, run.recipe
    path = folder / "checkpoints" / checkpoint.checkpoint_name(run.step)
    dtype, trusted = "fp64" if recipe.train.precision == "fp64" else "fp32", recipe.data.trust_remote_code
    model, tokenizer, config = load_checkpoint(path, run.config.vocab_size, dtype, trusted)
    _write_last_lines(run)
    validations = [
        entry for entry in run.folder.metrics.history.update().validations if entry["step"] == run.step
    ]
    score = f", {validation_summary(validations[-1])} on held-out data" if validations else ""
    if not export_model(model, tokenizer, (folder / "model").resolve(), config, run.tokens, score):
        warn(kept_card(folder / "model"))
    _write_samples(run, model, tokenizer)
    run.say(f"finished: model, samples.txt and loss.png are in {folder}")


def _write_last_lines(run: Run) -> None:
    try:
        run.folder.metrics.sync()
    except OSError as error:
        message = f"the last lines of {run.folder.metrics.path} could not be written ({error.strerror}); the same command tries again"
        raise StorageError(error.errno, message) from None


def _write_samples(run: Run, model: MinRNNForCausalLM, tokenizer: Any) -> None:
    recipe = run.recipe
    if not (recipe.train.sample_tokens and recipe.train.prompts) or is_synthetic(recipe.data.corpus):
        return
    try:
        if not run.engine.in_lockstep:  # what is sharded may not fit on one device
            torch.nn.Module.to(model, run.accelerator.device)
        texts = sample(model, tokenizer, recipe.train.prompts, recipe.train.sample_tokens, recipe.run.seed)
        blocks = (
            f"=== prompt {prompt!r}\n{text}\n\n"
            for prompt, text in zip(recipe.train.prompts, texts, strict=True)
        )
        (run.folder.path / "samples.txt").write_text("".join(blocks))
    except Exception as error:  # the model is trained and exported all the same
        warn(f"samples.txt could not be written: {type(error).__name__}: {error}")
