"""Context parallelism: one sequence over several processes, exact, with gradients.

Process c of C holds slice c of the tokens. All processes hold the state before the first token, and all
return the state after the last one.

The recurrence: context_scan.py.

The convolution. Slice c needs the last K-1 inputs of slice c-1. While they are sent, the slice is convolved
with zeros before it; then only its first K-1 outputs are computed again. In the backward pass, the slice's
gradients are computed while the gradients of the K-1 inputs are sent back. Attention waits for the keys and
values of the window before its slice.

Replicated values. The states before and after the sequence have the same bits on every process, and each
process holds their total gradients, which are never summed. The gradients of parameters are each slice's
share, to be summed over the processes, as DDP and ZeRO do.

Messages per layer, to each other process, in bytes (B batch; S numbers of the state of a scan, A of its
decays; H hidden_size, R recurrent_size, K conv_kernel, w bytes of an activation):

                       forward          backward
    convolution        w B (K-1) H      w B (K-1) H       the last inputs; their gradients
    two taps           w B R            w B R             the last input of the cell
    attention          w B (W-1) (2 H + 1), both ways         keys and values of a window of W tokens
    each scan          4 B (A + S)      4 B S             (A, s); d
    running maximum    8 B S            -                 how far it falls in the slice; the slice's own

A is S, but for a state matrix its number of rows, in all heads. The length of the sequence does not matter.
In fp64, scans and maxima send twice as much. Recomputation sends the forward's messages again.
docs/context-parallel.md lists the scans of each cell. All processes send in the same order whatever their
data are, so documents may start in one slice and not in another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .conv import causal_conv, conv_gradients
from .scan import default_backend


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share one sequence."""

    process_group: "torch.distributed.ProcessGroup"
    rank: int
    """Rank in `process_group`, and index of this process's slice."""
    size: int
    """Number of processes in `process_group`, and of slices."""


def use_context_parallel(model: nn.Module, group: ContextGroup | None) -> None:
    """Switch a model to context parallelism over the processes of `group`; None switches it off.

    Every process then calls the model with its own slice, [batch, time / size] of input_ids, shift_labels and
    document_starts, and the same past_key_values. The model returns the state after the whole sequence, the
    same on every process.

    Raises:
        ValueError: the model has no MinRNNMixer, torch.distributed is not initialised, or `group` does not
            match the process group.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "context_group")]
    # By attributes, since a mixer may be of a remote-code copy's class.
    if not any(hasattr(module, "convolve_slice") for module in modules):
        raise ValueError(
            f"{type(model).__name__} has no MinRNNMixer: "
            "only models of type minrnn can be cut between processes."
        )
    if group is not None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(
                "A ContextGroup needs torch.distributed: call init_process_group first "
                "(accelerate launch and torchrun prepare it)."
            )
        rank = torch.distributed.get_rank(group.process_group)
        size = torch.distributed.get_world_size(group.process_group)
        if (rank, size) != (group.rank, group.size):
            raise ValueError(
                f"This process is rank {rank} of {size} in the process group, "
                f"but ContextGroup says {group.rank} of {group.size}."
            )
    for module in modules:
        module.context_group = group


def all_gather_async(tensor: Tensor, group: ContextGroup) -> Callable[[], Tensor]:
    """Start an all-gather; the returned function waits for it and returns [size, *shape] in order of rank.

    Tensors are sent as bytes, because gloo does not support bfloat16.
    """
    message = tensor.contiguous().flatten().view(torch.uint8)
    received = message.new_empty(group.size, message.numel())
    work: Any = torch.distributed.all_gather(
        list(received), message, group=group.process_group, async_op=True
    )

    def wait() -> Tensor:
        work.wait()
        return received.view(tensor.dtype).view(group.size, *tensor.shape)

    return wait


def _mask_earlier_documents(tail: Tensor, reach: Tensor | None) -> Tensor:
    """The last inputs of a slice [batch, kernel-1, width], or their gradients; 0 for earlier documents."""
    if reach is None:
        return tail
    distance = torch.arange(tail.shape[1] - 1, -1, -1, device=tail.device)
    return tail.masked_fill((distance > reach[:, -1:]).unsqueeze(-1), 0)


class _Conv(torch.autograd.Function):
    """`causal_conv` of this process's slice, and the state after the sequence."""

    @staticmethod
    def forward(ctx, x, weight, state, reach, group, backend):
        taps = weight.shape[1] - 1
        wait = all_gather_async(_mask_earlier_documents(x[:, x.shape[1] - taps :], reach), group)
        y = causal_conv(x, weight, None, reach, backend)
        tails = wait()
        state = state if group.rank == 0 else tails[group.rank - 1]
        y[:, :taps] = causal_conv(x[:, :taps], weight, state, _head(reach, taps), backend)
        ctx.save_for_backward(x, weight, state, reach)
        ctx.group, ctx.backend = group, backend
        return y, tails[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y, grad_last), group = grads, ctx.group
        x, weight, state, reach = ctx.saved_tensors
        taps = weight.shape[1] - 1
        *_, d_state = conv_gradients(
            x[:, :taps], weight, state, _head(reach, taps), grad_y[:, :taps], ctx.backend
        )
        wait = all_gather_async(d_state, group)
        dx, d_weight, _ = conv_gradients(x, weight, state, reach, grad_y, ctx.backend)
        d_states = wait()
        dx[:, x.shape[1] - taps :] += _mask_earlier_documents(
            grad_last if group.rank + 1 == group.size else d_states[group.rank + 1], reach
        )
        return dx, d_weight, d_states[0], None, None, None


class _Tail(torch.autograd.Function):
    """The inputs before this process's slice, and the last inputs of the sequence."""

    @staticmethod
    def forward(ctx, x, state, reach, group):
        taps = state.shape[1]
        tails = all_gather_async(_mask_earlier_documents(x[:, x.shape[1] - taps :], reach), group)()
        ctx.save_for_backward(x, reach)
        ctx.group, ctx.taps = group, taps
        return (state if group.rank == 0 else tails[group.rank - 1]).clone(), tails[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_entering, grad_last), group = grads, ctx.group
        x, reach = ctx.saved_tensors
        d_states = all_gather_async(grad_entering, group)()
        dx = torch.zeros_like(x)
        dx[:, x.shape[1] - ctx.taps :] = _mask_earlier_documents(
            grad_last if group.rank + 1 == group.size else d_states[group.rank + 1], reach
        )
        return dx, d_states[0], None, None


def _head(reach: Tensor | None, taps: int) -> Tensor | None:
    return None if reach is None else reach[:, :taps]


_slice_conv: Any = torch.compiler.disable(_Conv.apply)
_slice_tail: Any = torch.compiler.disable(_Tail.apply)


def context_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reach: Tensor | None,
    group: ContextGroup,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv` of a sequence that is cut between processes.

    Args:
        x: [batch, time, width], this process's slice; at least kernel-1 tokens.
        weight: [width, kernel].
        state: the kernel-1 inputs before the whole sequence, [batch, kernel-1, width], the same on every
            process; zeros if None.
        reach: `reach_within_document` of this slice, or None if no document starts in it.
        backend: as in `causal_conv`.

    Returns:
        y [batch, time, width] of this slice, and the state after the whole sequence, the same on every
        process.

    Raises:
        ValueError: the slice has fewer than kernel-1 tokens, the inputs that the next slice needs.
    """
    state = _checked_state(x, state, weight.shape[1] - 1)
    return _slice_conv(x, weight, state, reach, group, backend or default_backend(x.device, x.dtype))


def context_tail(
    x: Tensor, taps: int, state: Tensor | None, reach: Tensor | None, group: ContextGroup
) -> tuple[Tensor, Tensor]:
    """The `taps` inputs before this process's slice x, and the last ones of the sequence.

    Args:
        x, state, reach, group: as in `context_conv`, with taps = kernel - 1.

    Returns:
        Two tensors [batch, taps, width]; the second is the same on every process.
    """
    return _slice_tail(x, _checked_state(x, state, taps), reach, group)


def _checked_state(x: Tensor, state: Tensor | None, taps: int) -> Tensor:
    """The inputs before the whole sequence. Raises ValueError if the slice is shorter than them."""
    batch, time, width = x.shape
    if time < taps:
        raise ValueError(
            f"A slice must hold the {taps} tokens that the next one reads (conv_kernel - 1, or "
            f"attention_window - 1; two taps read 1), but this one has {time}: "
            "use longer chunks, or fewer processes for a sequence."
        )
    return x.new_zeros(batch, taps, width) if state is None else state.to(x.dtype)
