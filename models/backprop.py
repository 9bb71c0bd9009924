"""Exact gradients through several chunks of a text, in the memory of one.

    forward, no gradients:    s_0 -> chunk 0 -> s_1 -> ... -> chunk K-2 -> s_{K-1}     keeps s_1 .. s_{K-1}
    backward, from k = K-1:   s_k -> chunk k -> loss_k, s_{k+1}                        computed again
                              d s_k = d loss_k / d s_k + (d s_{k+1} / d s_k)^T d s_{k+1}

s_k is the state of all layers before chunk k (cache.py): the recurrent states and the last inputs of the
convolutions. It is all that a chunk knows of those before it, so the gradients of the parameters, summed over
the chunks, are those of one pass over all of them. What is kept is the activations of one chunk and K states;
what it costs is a second forward pass of all chunks but the last.

The gradient of the end state enters as a number: backward starts from loss_k + <s_{k+1}, d s_{k+1}>, whose
gradient is exactly the one wanted. So an engine that only takes losses (DDP, DeepSpeed) needs nothing else.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cache import MinRNNCache
from .loss import IGNORE_INDEX

Forward = Callable[[int, MinRNNCache | None, bool], Any]
"""(index of the chunk, state before it, whether the loss is needed) -> output with `loss` and
`past_key_values`, the state after it. The state may be updated in place. All chunks but the last are computed
first without the loss and then with it; both must draw the same random numbers."""


def backprop_through_chunks(
    model: nn.Module,
    chunks: Sequence[Mapping[str, Any]],
    state: MinRNNCache | None = None,
    *,
    num_items_in_batch: int | Tensor | None = None,
) -> tuple[Tensor, MinRNNCache]:
    """Add to the parameters' gradients those of the loss of consecutive chunks of a text.

    They are the gradients of one pass over the whole text, with the activations of one chunk in memory.
    Dropout draws its masks from one number of the global random generator, so they differ from chunk to
    chunk, and are the same when a chunk is computed again.

    Args:
        model: `MinRNNForCausalLM` or another model with its state and arguments, also inside DDP, which then
            reduces the gradients once.
        chunks: arguments of the model for each chunk, with `input_ids` and `shift_labels` [batch, time], and
            `document_starts` if documents start in it. The lengths may differ.
        state: before the first chunk; None for the beginning of a text. It is not changed. If its tensors
            require gradients, they receive them.
        num_items_in_batch: scored tokens that the summed loss is divided by; by default those of `chunks`.

    Returns:
        The loss of all chunks (scalar, detached) and the state after the last, detached: the next call's
        `state`.

    Raises:
        ValueError: no chunks, or a chunk without `shift_labels`.
    """
    if not chunks:
        raise ValueError("backprop_through_chunks needs at least one chunk.")
    if any(chunk.get("shift_labels") is None for chunk in chunks):
        raise ValueError(
            "Each chunk needs shift_labels, targets that were shifted before the text was cut: "
            "labels are shifted inside a chunk, and its last token would have none."
        )
    if num_items_in_batch is None:
        num_items_in_batch = int(sum((chunk["shift_labels"] != IGNORE_INDEX).sum() for chunk in chunks))
    seed = int(torch.randint(2**62, ()))

    def forward(index: int, state: MinRNNCache | None, needs_loss: bool) -> Any:
        torch.manual_seed(seed + index)
        inputs = model_inputs(chunks[index], num_items_in_batch, needs_loss)
        return model(**inputs, past_key_values=state, use_cache=True)

    def around(index: int) -> contextlib.AbstractContextManager[Any]:
        no_sync = getattr(model, "no_sync", None)
        return contextlib.nullcontext() if index == 0 or no_sync is None else no_sync()

    with _same_random_numbers_after(model):
        losses, state = backpropagate(forward, len(chunks), state, around=around)
    return torch.stack(losses).sum(), state


def backpropagate(
    forward: Forward,
    num_chunks: int,
    state: MinRNNCache | None,
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
    around: Callable[[int], contextlib.AbstractContextManager[Any]] = lambda index: contextlib.nullcontext(),
) -> tuple[list[Tensor], MinRNNCache]:
    """`backprop_through_chunks` for any way to call the model and to add gradients.

    Args:
        forward: computes a chunk.
        num_chunks: number of chunks. For one, nothing is computed twice.
        state: before the first chunk. It is not changed.
        backward: adds the gradients of a scalar.
        around: context for the forward and backward of a chunk whose gradients are added. Chunk 0 comes last.

    Returns:
        Detached losses of the chunks in their order, and the detached state after the last.
    """
    states = [state]
    with torch.no_grad():
        for index in range(num_chunks - 1):
            states.append(forward(index, _copy(states[-1]), False).past_key_values)
    losses: list[Tensor] = []
    last = state
    gradients: list[Tensor | None] | None = None
    for index in reversed(range(num_chunks)):
        # Copies of weights that autocast made without gradients, or for a graph that is gone.
        torch.clear_autocast_cache()
        # The caller's own state may have a history, through which gradients flow.
        start = _copy(states.pop(), _leaf if index else None)
        leaves = start.tensors() if start is not None else []
        with around(index):
            output = forward(index, _copy(start), True)
            objective, end = output.loss, output.past_key_values
            if gradients is not None:
                objective = objective + _product(end.tensors(), gradients)
            backward(objective)
        losses.append(output.loss.detach())
        last = end.detach_() if gradients is None else last
        gradients = [leaf.grad for leaf in leaves] if index else None
        del output, objective, end, start, leaves  # before the next chunk needs their memory
    assert last is not None
    return losses[::-1], last


def model_inputs(
    chunk: Mapping[str, Any], num_items_in_batch: float | Tensor, needs_loss: bool
) -> dict[str, Any]:
    """The arguments of the model for a chunk's loss without its logits, or for no more than its state."""
    if needs_loss:
        return {**chunk, "num_items_in_batch": num_items_in_batch, "skip_logits": True}
    # One position of the logits: the head is not computed for the others.
    return {**{key: value for key, value in chunk.items() if key != "shift_labels"}, "logits_to_keep": 1}


def _copy(
    state: MinRNNCache | None, function: Callable[[Tensor], Tensor] | None = None
) -> MinRNNCache | None:
    return None if state is None else state.mapped(function or (lambda tensor: tensor))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _product(tensors: list[Tensor], gradients: Sequence[Tensor | None]) -> Tensor | float:
    """The number whose gradients for `tensors` are `gradients`; None is a gradient of 0."""
    pairs = zip(tensors, gradients, strict=True)
    return sum((tensor * gradient).sum() for tensor, gradient in pairs if gradient is not None)


def _same_random_numbers_after(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context after which the random generators of the CPU and of the model's devices are as before."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu")}
    indices = [device.index for device in devices]
    device_type = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng(indices, device_type=device_type)


__all__ = ["backprop_through_chunks", "backpropagate"]
