"""The training loop, top to bottom.

    train         set up (run.py) -> steps -> finish
    one step      for each of my readers: chunk -> forward with that reader's state -> backward;  clip, step
    between them  log, validate, save; leave if asked to

The loss of a step is one mean over all scored tokens of the global batch, whatever the number of readers, processes and accumulations.
"""

import contextlib
import hashlib
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from ..data import Chunk, UserError
from . import checkpoint, processes
from .config import Recipe
from .errors import NonFiniteError
from .evaluation import validate
from .export import export_model, sample
from .folder import open_folder, warn
from .interrupt import Interrupt, leave
from .machine import keep_freed_memory, training_flops_per_token
from .metrics import append_metrics, draw_loss
from .optim import learning_rate
from .recipe import resolved
from .run import Run, set_up


def train(recipe: Recipe) -> None:
    """Run a recipe to its end, from wherever its folder says.

    Raises:
        UserError: something the user can mend.
        NonFiniteError: the loss or gradient is not finite; the last checkpoint is as it was.
        SystemExit: after SIGINT or SIGTERM, with 128 + the signal, everything saved.
    """
    processes.check_readers(recipe.batch.readers)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = processes.start(recipe.train.precision)
    with contextlib.closing(open_folder(recipe, accelerator)) as folder:
        if folder.manifest.get("step", 0) >= recipe.train.steps and folder.finished_step() == folder.manifest["step"]:
            if accelerator.is_main_process:
                done = f"{folder.path} is finished: step {folder.manifest['step']} of {recipe.train.steps}"
                print(f"{done}, model in {folder.path / 'model'}. Raise train.steps to go on.")
            return
        run = set_up(recipe, accelerator, folder)
        status, signal_number = "FAILED", None
        try:
            with Interrupt() as interrupt:
                signal_number = _steps(run, interrupt)
                if signal_number is None:
                    _finish(run)
            status = "FINISHED" if signal_number is None else "KILLED"
        finally:
            run.close(status)
        if signal_number is not None:
            message = f"Saved step {run.step} of {recipe.train.steps} in {folder.path}; the same command goes on from there."
            leave(signal_number, message, run.is_main)


def _steps(run: Run, interrupt: Interrupt) -> int | None:
    """Take all steps; returns the signal that stopped them, on all processes, if one did."""
    recipe, chunks = run.recipe, iter(run.loader)
    clock, tokens_at_clock = time.perf_counter(), run.tokens
    while run.step < recipe.train.steps:
        batch, problems = _next_batch(chunks)
        counts = [sum(chunk.num_scored for chunk in batch), interrupt.requested is not None, len(problems)]
        num_scored, stop, failed = processes.total(run.accelerator, counts)
        if (stop or failed) and run.step > 0:
            _save(run)
        if failed:
            raise UserError(*dict.fromkeys(processes.gathered(run.accelerator, problems)))
        if stop:
            return interrupt.requested or signal.SIGTERM
        step = run.step + 1
        lr = learning_rate(recipe.optim, step, recipe.train.steps)
        loss, grad_norm = _one_step(run, step, batch, num_scored, lr)
        run.step, run.tokens = step, run.tokens + recipe.batch.readers * recipe.batch.lanes * recipe.batch.chunk
        is_last = step == recipe.train.steps

        if step % recipe.train.log_every == 0 or is_last:
            now = time.perf_counter()
            rate = (run.tokens - tokens_at_clock) / (now - clock)
            clock, tokens_at_clock = now, run.tokens
            reached = rate * training_flops_per_token(run.plain_model.num_parameters()) / (run.matmul_rate * run.accelerator.num_processes)
            entry = {"kind": "train", "step": step, "tokens": run.tokens, "loss": loss, "grad_norm": grad_norm, "lr": lr}
            entry |= {"tokens_per_second": round(rate, 1), "matmul_fraction": round(reached, 4)}
            if recipe.data.skip_broken and recipe.data.order == "documents":
                skipped = sum(reader.position["num_skipped"] for reader in run.readers.values() if reader.position)
                entry["documents_skipped"] = int(processes.total(run.accelerator, [skipped])[0])
            _record(run, entry)
            if run.bar is not None:
                run.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        if run.bar is not None:
            run.bar.update()
        paused = time.perf_counter()
        if is_last or _is_due(step, recipe.train.eval_every):
            _validate(run)
        if is_last or _is_due(step, recipe.train.save_every):
            _save(run)
        clock += time.perf_counter() - paused
    return None


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _next_batch(chunks: Iterator[list[Chunk]]) -> tuple[list[Chunk], list[tuple[str, str]]]:
    """The next chunk of each of this process's readers, or what is wrong with them: all processes must hear of it before one leaves."""
    try:
        return next(chunks), []
    except UserError as error:
        return [], error.problems
    except RuntimeError as error:  # a worker that died
        return [], [("data.workers", str(error))]


def _one_step(run: Run, step: int, batch: list[Chunk], num_scored: float, lr: float) -> tuple[float, float]:
    """Forward and backward for each reader, then the update; returns the loss and the norm of the gradient."""
    recipe, accelerator = run.recipe, run.accelerator
    losses = []
    for i, chunk in enumerate(batch):
        reader = run.readers[chunk.reader]
        _seed(recipe.run.seed, step, chunk.reader)
        is_last = i == len(batch) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(run.model):
            output = run.model(
                input_ids=processes.to_device(chunk.input_ids, accelerator),
                shift_labels=processes.to_device(chunk.shift_labels, accelerator),
                document_starts=processes.to_device(chunk.document_starts, accelerator) if chunk.document_starts.any() else None,
                past_key_values=reader.cache,
                use_cache=recipe.batch.carry_state,
                skip_logits=True,
                num_items_in_batch=num_scored / accelerator.num_processes,  # DDP divides the sum of gradients by the number of processes
            )
            accelerator.backward(output.loss)
        losses.append(output.loss.detach().double() / accelerator.num_processes)
        reader.cache = output.past_key_values.detach_() if recipe.batch.carry_state else None
        reader.position = chunk.state
    norm = accelerator.clip_grad_norm_(run.model.parameters(), recipe.optim.clip or math.inf)
    *mine, grad_norm = torch.stack([*losses, torch.as_tensor(norm).double()]).tolist()
    (loss,) = processes.total(accelerator, [sum(mine)])
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        _stop_non_finite(run, step, batch, mine, loss, grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss, grad_norm


def _seed(seed: int, step: int, reader: int) -> None:
    """Dropout depends on (seed, step, reader) alone: nothing to save, and no layout changes it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{reader}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))


def _stop_non_finite(run: Run, step: int, batch: list[Chunk], losses: list[float], loss: float, grad_norm: float) -> None:
    """Say which step, reader and documents; nothing has been updated or saved."""
    mine = [
        f"reader {chunk.reader}: {', '.join(sorted({name for lane in chunk.documents for name in lane}))}"
        for chunk, value in zip(batch, losses, strict=True)
        if not math.isfinite(value)
    ]
    where = processes.gathered(run.accelerator, mine) or ["every reader's loss is finite, the gradient is not"]
    latest = checkpoint.steps_in(run.folder.path / "checkpoints")
    kept = f"the last checkpoint, {latest[0]}, is as it was" if latest else "there is no checkpoint yet"
    raise NonFiniteError(f"step {step}: loss {loss}, gradient norm {grad_norm}. In {'; '.join(where)}. Nothing was saved; {kept}.")


def _record(run: Run, entry: dict[str, Any]) -> None:
    if run.is_main:
        append_metrics(run.folder.metrics, entry)
        if run.tracker is not None:
            run.tracker.log(entry)


def _validate(run: Run) -> None:
    start = time.perf_counter()
    run.latest = validate(run.plain_model, run.validation, run.accelerator, run.recipe.batch.carry_state)
    if not math.isfinite(run.latest["loss"]):
        raise NonFiniteError(f"step {run.step}: the validation loss is {run.latest['loss']}. This step was not saved.")
    seconds = round(time.perf_counter() - start, 2)
    _record(run, {"kind": "validation", "step": run.step, "tokens": run.tokens, **run.latest, "seconds": seconds})
    run.say(f"step {run.step}: held-out loss {run.latest['loss']:.4f} nats/token, {run.latest['bits_per_byte']:.4f} bits/byte")
    if run.is_main:
        try:
            draw_loss(run.folder.metrics, run.folder.path / "loss.png", run.folder.path.name)
        except Exception as error:  # a picture is not worth a run
            warn(f"loss.png could not be drawn: {error}")


def _save(run: Run) -> None:
    folder = run.folder.path / "checkpoints"
    if run.step == run.saved_step:
        return  # nothing happened since
    info = {
        "tokens": run.tokens,
        "vocab_size": run.plain_model.config.vocab_size,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    keep, config = run.recipe.train.keep_checkpoints, resolved(run.recipe)
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    checkpoint.save(folder, run.step, run.accelerator, run.plain_model, optimizer, run.readers, config, info, keep)
    run.saved_step = run.step


def _finish(run: Run) -> None:
    """Samples and the exported model."""
    if run.is_main:
        folder, recipe = run.folder.path, run.recipe
        score = f", {run.latest['bits_per_byte']:.3f} bits per byte on held-out documents" if run.latest else ""
        export_model(run.plain_model, run.tokenizer, folder / "model", resolved(recipe), run.tokens, score)
        if recipe.train.sample_tokens and recipe.train.prompts:
            texts = sample(run.plain_model, run.tokenizer, recipe.train.prompts, recipe.train.sample_tokens, recipe.run.seed)
            (folder / "samples.txt").write_text("".join(f"=== prompt {p!r}\n{t}\n\n" for p, t in zip(recipe.train.prompts, texts, strict=True)))
        run.folder.mark_finished(run.step)
        if run.tracker is not None:
            for name in ("config.yaml", "loss.png", "samples.txt"):
                if (folder / name).exists():
                    run.tracker.artifact(folder / name)
        run.say(f"finished: model, samples.txt and loss.png are in {folder}")
    run.accelerator.wait_for_everyone()
