"""One training step: forward and backward for each reader of this process, then one update.

The loss of a step is one mean over all scored tokens, or labels, of the global batch, for any number of
readers, processes and accumulations.
"""

import hashlib
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from ..common.errors import NonFiniteError
from ..data import Batch, Chunk
from ..models import MinRNNCache
from ..models.backprop import backpropagate, model_inputs
from . import checkpoint, processes
from .optim import learning_rate
from .run import Run

SPIKE_WINDOW = 100  # steps whose median loss is the reference for spikes
MIN_SPIKE_WINDOW = 10  # steps that the median needs


def take_step(run: Run, step: int, batch: list[Batch], num_scored: float) -> dict[str, Any]:
    """Forward, backward and update.

    Args:
        step: number of this step, from 1.
        batch: one chunk for each reader of this process, or several as one (batch.backprop_chunks).
        num_scored: scored tokens of the global batch.

    Returns:
        The fields of this step's line in metrics.jsonl.

    Raises:
        NonFiniteError: in every process, if the loss or the gradient is not finite; nothing was updated.
    """
    recipe, accelerator, engine, progress = run.recipe, run.accelerator, run.engine, run.progress
    local_losses = _forward_backward(run, step, batch, num_scored)
    (loss,) = processes.all_reduce_sum(accelerator, [sum(local_losses)])
    lr = learning_rate(recipe.optim, step, recipe.optim.schedule_steps or recipe.train.steps)
    entry: dict[str, Any] = {"loss": loss, "lr": lr}
    if recipe.train.skip_spikes is not None and (reason := _spike(run, loss)):
        engine.discard()
        _skip(run, step, batch, local_losses, reason)
        return {**entry, "grad_norm": None, "skipped": reason}
    if not math.isfinite(loss):
        _stop_non_finite(run, step, batch, local_losses, f"loss {loss}")
    grad_norm = engine.update(lr)
    if not math.isfinite(grad_norm):
        _stop_non_finite(run, step, batch, local_losses, f"loss {loss}, gradient norm {grad_norm}")
    progress.num_skips = 0
    progress.recent_losses = [*progress.recent_losses, loss][-SPIKE_WINDOW:]
    return {**entry, "grad_norm": grad_norm}


def _forward_backward(run: Run, step: int, batch: list[Batch], num_scored: float) -> list[float]:
    """Add the gradients of all chunks and move their readers on; returns each chunk's share of the step's
    loss."""
    recipe, accelerator, engine = run.recipe, run.accelerator, run.engine
    losses = []
    for i, chunk in enumerate(batch):
        if isinstance(chunk, Chunk) and chunk.num_chunks > 1:
            losses.append(_through_chunks(run, step, chunk, num_scored, is_last=i == len(batch) - 1))
            continue
        reader = run.data.readers[chunk.reader]
        inputs: dict[str, Any] = {
            name: processes.to_device(array, accelerator) for name, array in chunk.model_inputs().items()
        }
        carries_state = recipe.batch.carry_state and isinstance(chunk, Chunk)
        if isinstance(chunk, Chunk):
            inputs |= {"past_key_values": reader.cache, "skip_logits": True}
        _seed(recipe.run.seed, step, chunk.reader, run.layout.context_rank)
        with engine.accumulating(is_last=i == len(batch) - 1):
            output = engine.forward(
                **inputs,
                use_cache=carries_state,
                # Engines average gradients over the processes; this loss makes that average the global mean.
                num_items_in_batch=num_scored / accelerator.num_processes,
            )
            engine.backward(output.loss)
        losses.append(output.loss.detach())
        reader.cache = output.past_key_values.detach_() if carries_state else None
        reader.position = chunk.state
    # Divided as Python numbers, which are fp64: not every device has fp64.
    return [loss / accelerator.num_processes for loss in torch.stack(losses).tolist()]


def _through_chunks(run: Run, step: int, chunks: Chunk, num_scored: float, *, is_last: bool) -> Tensor:
    """Add the gradients through several chunks of a reader and move it on; returns its share of the loss.

    Args:
        is_last: whether gradients are reduced after this reader.
    """
    engine, reader, singles = run.engine, run.data.readers[chunks.reader], chunks.single_chunks()

    def forward(index: int, state: MinRNNCache | None, needs_loss: bool) -> Any:
        run.watchdog.move()
        arrays = singles[index].model_inputs()
        inputs = {name: processes.to_device(array, run.accelerator) for name, array in arrays.items()}
        _seed(run.recipe.run.seed, step, chunks.reader, run.layout.context_rank, index)
        inputs = model_inputs(inputs, num_scored / run.accelerator.num_processes, needs_loss)
        return engine.forward(**inputs, past_key_values=state, use_cache=True)

    losses, reader.cache = backpropagate(
        forward,
        len(singles),
        reader.cache,
        backward=engine.backward,
        around=lambda index: engine.accumulating(is_last=is_last and index == 0),
    )
    reader.position = chunks.state
    return torch.stack(losses).sum()


def _seed(seed: int, step: int, reader: int, context_rank: int, chunk: int = 0) -> None:
    """Seed dropout by (seed, step, reader, context rank, chunk of the step).

    So a checkpoint saves no random state, and the masks are the same for any number of processes, unless
    processes share sequences.
    """
    part = f"/{context_rank}" if context_rank else ""
    part += f"/chunk {chunk}" if chunk else ""
    digest = hashlib.blake2b(f"{seed}/{step}/{reader}{part}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))


def _spike(run: Run, loss: float) -> str | None:
    """Why a loss is a spike, or None."""
    if not math.isfinite(loss):
        return f"loss {loss}"
    factor, recent = run.recipe.train.skip_spikes, run.progress.recent_losses
    if (
        factor is None
        or len(recent) < MIN_SPIKE_WINDOW
        or loss <= factor * (median := statistics.median(recent))
    ):
        return None
    return f"loss {loss:.4g}, {factor} times the median {median:.4g} is the limit"


def _skip(run: Run, step: int, batch: list[Batch], losses: list[float], reason: str) -> None:
    """Report a skipped batch, reset states that are not finite, and stop after too many skips in a row."""
    run.progress.num_skips += 1
    run.report(f"step {step} is left out: {reason}")
    for reader in run.data.readers.values():
        if reader.cache is not None:
            reader.cache.zero_non_finite_rows_()
    limit = run.recipe.train.max_skips
    if run.progress.num_skips > limit:
        reason = f"{reason}; {limit} batches in a row were left out before (train.max_skips)"
        _stop_non_finite(run, step, batch, losses, reason)


def _stop_non_finite(run: Run, step: int, batch: list[Batch], losses: list[float], reason: str) -> None:
    """Raise NonFiniteError with the readers and documents whose loss is not finite. Nothing of this step is
    saved."""
    local = [
        f"reader {chunk.reader}: {', '.join(sorted({name for lane in chunk.documents for name in lane}))}"
        for chunk, loss in zip(batch, losses, strict=True)
        if not math.isfinite(loss)
    ]
    sources = list(dict.fromkeys(processes.all_gather_objects(run.accelerator, local)))
    sources = sources or ["every reader's loss is finite"]
    run.output.saver.join()
    saved = checkpoint.checkpoint_paths(run.output.folder.path / "checkpoints")
    last = f"the last checkpoint, {saved[0]}, is as it was" if saved else "there is no checkpoint yet"
    raise NonFiniteError(f"step {step}: {reason}. In {'; '.join(sources)}. Nothing was saved; {last}.")
