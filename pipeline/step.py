"""One training step: forward and backward for each reader of this process, then one update.

A reader's chunk is one micro-batch, or several of `train.micro_lanes` lanes each. Lanes are independent, so
the losses, gradients and states are the same to rounding.

The loss of a step is one mean over all scored tokens, or labels, of the global batch, for any number of
readers, processes and accumulations.
"""

import hashlib
import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    # A step of a task may fall between two answers. Then its loss and its gradient are 0.
    local_losses = _forward_backward(run, step, batch, max(num_scored, 1))
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
    losses = []
    for i, chunk in enumerate(batch):
        reader = run.data.readers[chunk.reader]
        pieces = _micro_batches(run, step, chunk, reader.cache)
        outputs = []
        for j, piece in enumerate(pieces):
            is_last = i == len(batch) - 1 and j == len(pieces) - 1
            compute = _through_chunks if len(piece.chunks) > 1 else _through_chunk
            outputs.append(compute(run, piece, num_scored, is_last))
        losses.append(torch.stack([loss for loss, _ in outputs]).sum())
        carried = [state for _, state in outputs if state is not None]
        reader.cache = MinRNNCache.of_rows(carried) if carried else None
        reader.position = chunk.state
    # Divided as Python numbers, which are fp64: not every device has fp64.
    return [loss / run.accelerator.num_processes for loss in torch.stack(losses).tolist()]


@dataclass(frozen=True)
class _MicroBatch:
    """Some lanes of what a step reads from a reader."""

    chunks: list[dict[str, np.ndarray]]
    """Arguments of the model for each chunk, in order of time."""
    state: MinRNNCache | None
    """The carried state of these lanes."""
    is_text: bool
    carries_state: bool
    seed: str
    """Of dropout."""


def _micro_batches(run: Run, step: int, batch: Batch, cache: MinRNNCache | None) -> list[_MicroBatch]:
    """What a step reads from a reader, divided into groups of train.micro_lanes lanes.

    Dropout is seeded by (run.seed, step, reader, context rank, first lane, chunk of the step). So a
    checkpoint saves no random state, and the masks are the same for any number of processes, but not for
    another `micro_lanes`, nor if processes share sequences.
    """
    num_lanes, is_text = len(batch.input_ids), isinstance(batch, Chunk)
    size = run.recipe.train.micro_lanes or num_lanes
    singles = batch.single_chunks() if isinstance(batch, Chunk) and batch.num_chunks > 1 else [batch]
    arguments = [chunk.model_inputs() for chunk in singles]
    seed = f"{run.recipe.run.seed}/{step}/{batch.reader}"
    context = f"/{run.layout.context_rank}" if run.layout.context_rank else ""
    pieces = []
    for first in range(0, num_lanes, size):
        rows = slice(first, first + size)
        lanes = f"/lane {first}" if first else ""
        pieces.append(
            _MicroBatch(
                [{name: array[rows] for name, array in arrays.items()} for arrays in arguments],
                cache if cache is None or size == num_lanes else cache.rows(rows),
                is_text,
                run.recipe.batch.carry_state and is_text,
                seed + context + lanes,
            )
        )
    return pieces


def _through_chunk(
    run: Run, piece: _MicroBatch, num_scored: float, is_last: bool
) -> tuple[Tensor, MinRNNCache | None]:
    """Add the gradient of a micro-batch of one chunk; returns its loss and its state, both detached."""
    engine = run.engine
    inputs = _to_device(run, piece, 0)
    if piece.is_text:
        inputs |= {"past_key_values": piece.state, "skip_logits": True}
    _seed(piece, 0)
    with engine.accumulating(is_last):
        output = engine.forward(
            **inputs,
            use_cache=piece.carries_state,
            # Engines average gradients over the processes; this loss makes that average the global mean.
            num_items_in_batch=num_scored / run.accelerator.num_processes,
        )
        engine.backward(output.loss)
    return output.loss.detach(), output.past_key_values.detach_() if piece.carries_state else None


def _through_chunks(
    run: Run, piece: _MicroBatch, num_scored: float, is_last: bool
) -> tuple[Tensor, MinRNNCache | None]:
    """`_through_chunk` for several chunks, with gradients through all of them (batch.backprop_chunks)."""
    engine = run.engine

    def forward(index: int, state: MinRNNCache | None, needs_loss: bool) -> Any:
        run.watchdog.move()
        inputs = _to_device(run, piece, index)
        inputs = model_inputs(inputs, num_scored / run.accelerator.num_processes, needs_loss)
        _seed(piece, index)
        return engine.forward(**inputs, past_key_values=state, use_cache=True)

    losses, state = backpropagate(
        forward,
        len(piece.chunks),
        piece.state,
        backward=engine.backward,
        around=lambda index: engine.accumulating(is_last=is_last and index == 0),
    )
    return torch.stack(losses).sum(), state


def _to_device(run: Run, piece: _MicroBatch, index: int) -> dict[str, Any]:
    """The arguments of the model for a chunk."""
    arrays = piece.chunks[index].items()
    inputs: dict[str, Any] = {name: processes.to_device(array, run.accelerator) for name, array in arrays}
    if piece.is_text and run.recipe.optim.z_loss:
        inputs["z_loss"] = run.recipe.optim.z_loss
    return inputs


def _seed(piece: _MicroBatch, index: int) -> None:
    """Seed dropout for a chunk."""
    text = piece.seed + (f"/chunk {index}" if index else "")
    torch.manual_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big"))


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
