"""The cut between processes: one sequence over several of them, exact, and with gradients.

    process c of C holds slice c of the tokens; all hold the state before the first token, and get the state after the last one

The recurrence. A slice does h -> A_c h + s_c to the state, A_c the product of its decays and s_c its last state from zero. So every process
computes its (A, s), all exchange them, each folds those before its own into the state h_c that enters its slice, and scans from there:

    h_{c+1} = A_c h_c + s_c        forward, from h_0, the state before the whole
    g_c = A_c g_{c+1} + d_c        backward, from g_C, the gradient of the state after the whole

g_c is the whole gradient of h_c, d_c that part of it which comes through the outputs of slice c alone: a backward pass with nothing entering at
the end gives d_c, and after the exchange a second one, with g_{c+1} entering, all other gradients. Forward and backward cost two scans each.

The convolution. Slice c begins where the last K-1 inputs of slice c-1 end. While these travel, a slice is convolved as if nothing came before
it, which leaves only its first K-1 outputs to do; and its gradients are computed while those of the K-1 inputs travel back.

What is replicated. States at the edges of the whole are the same bits on every process, and each process holds the whole of their gradients:
these are never summed. The gradients of parameters are each slice's share, to be summed over the processes, as DDP and ZeRO do.

What is sent. Per layer, to each other process (B batch, R recurrent_size, H hidden_size, K conv_kernel, w bytes of an activation):

    forward     8 B R + w B (K-1) H        (A, s) in one message, the last inputs in another
    backward    4 B R + w B (K-1) H        d in one, the gradients of the last inputs in another

in fp32 or bf16; for fp64, 16 B R and 8 B R. The length of the sequence does not matter. Recomputation sends the forward's messages again. All
processes send in the same order whatever their data are, so a slice may have documents that start in it while another has none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .cell_scan import scan_gradients, scan_without_graph, summarize
from .conv import causal_conv, conv_gradients
from .scan import default_backend


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share one sequence."""

    process_group: "torch.distributed.ProcessGroup"
    rank: int
    """Which slice is this process's: 0 is the first. The rank in `process_group`."""
    size: int
    """Number of slices: the processes in `process_group`."""


def use_context_parallel(model: nn.Module, group: ContextGroup | None) -> None:
    """Have a model read its own slice of each sequence from now on, together with the other processes of `group`; None ends this.

    Then every process calls the model with its slice, [batch, time / size] of input_ids, shift_labels and document_starts, and the same
    past_key_values; what comes back there is the state after the whole sequence, the same everywhere.

    Raises:
        ValueError: the model has nothing that could be cut, torch.distributed is not initialised, or `group` is not what it says.
    """
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "context_group")]
    if not parts:
        raise ValueError(
            f"{type(model).__name__} has no MinRNNMixer: only models of type minrnn can be cut between processes."
        )
    if group is not None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(
                "A ContextGroup needs torch.distributed: call init_process_group first (accelerate launch and torchrun prepare it)."
            )
        found = (
            torch.distributed.get_rank(group.process_group),
            torch.distributed.get_world_size(group.process_group),
        )
        if found != (group.rank, group.size):
            raise ValueError(
                f"This process is rank {found[0]} of {found[1]} in the process group, but ContextGroup says {group.rank} of {group.size}."
            )
    for part in parts:
        part.context_group = group


def start_gather(own: Tensor, group: ContextGroup) -> Callable[[], Tensor]:
    """Send `own` to all processes of the group; the function returned waits for theirs, [size, *shape] in order of rank.

    It travels as bytes: gloo knows no bfloat16.
    """
    message = own.contiguous().flatten().view(torch.uint8)
    gathered = message.new_empty(group.size, message.numel())
    work: Any = torch.distributed.all_gather(
        list(gathered), message, group=group.process_group, async_op=True
    )

    def wait() -> Tensor:
        work.wait()
        return gathered.view(own.dtype).view(group.size, *own.shape)

    return wait


def fold(decays: Tensor, terms: Tensor, start: Tensor) -> list[Tensor]:
    """The recurrence over slices: x_0 = start, x_{c+1} = decays_c x_c + terms_c; [size, batch, width] twice -> size + 1 of [batch, width]."""
    states = [start]
    for decay, term in zip(decays, terms, strict=True):
        states.append(term + decay * states[-1])
    return states


class _Scan(torch.autograd.Function):
    """`cell_scan` of this process's slice, from and to the states around the whole."""

    @staticmethod
    def forward(ctx, projected, gate_bias, h0, document_starts, group, options):
        own = torch.stack(summarize(projected, gate_bias, document_starts, **options))
        decays, lasts = start_gather(own, group)().unbind(1)
        states = fold(decays, lasts, h0)
        y, h = scan_without_graph(projected, gate_bias, states[group.rank], document_starts, **options)
        ctx.save_for_backward(projected, gate_bias, states[group.rank], document_starts, h, decays)
        ctx.group, ctx.options = group, options
        return y, states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_y, grad_last), last_rank = grads, ctx.group.size - 1
        projected, gate_bias, h0, document_starts, h, decays = ctx.saved_tensors
        backward = partial(
            scan_gradients, projected, gate_bias, h0, document_starts, h, grad_y, **ctx.options
        )
        *_, own = backward(grad_last=torch.zeros_like(grad_last))
        through_outputs = start_gather(own, ctx.group)()
        entering = fold(decays.flip(0), through_outputs.flip(0), grad_last)
        d_projected, d_gate_bias, _ = backward(grad_last=entering[last_rank - ctx.group.rank])
        return d_projected, d_gate_bias.to(gate_bias.dtype), entering[-1], None, None, None


_slice_scan: Any = torch.compiler.disable(_Scan.apply)  # no messages inside of compiled code


def context_cell_scan(
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    document_starts: Tensor | None,
    group: ContextGroup,
    *,
    cell: str,
    activation: str,
    output_gate: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`cell_scan` of a sequence that is cut between processes.

    Args:
        projected: [batch, time, (num_gates + 1 + output_gate) * width], this process's slice.
        h0: state before the whole sequence, [batch, width], the same on every process; zeros when not given.
        document_starts: bool [batch, time] of this slice, or None if no document starts in it.
        gate_bias, cell, activation, output_gate, backend: as in `cell_scan`.

    Returns:
        y [batch, time, width] of this slice, and the state after the whole sequence, [batch, width], the same on every process.
    """
    dtype = torch.promote_types(projected.dtype, torch.float32)
    h0 = projected.new_zeros(len(projected), gate_bias.shape[1], dtype=dtype) if h0 is None else h0.to(dtype)
    backend = backend or default_backend(projected.device, projected.dtype)
    options = {"cell": cell, "activation": activation, "output_gate": output_gate, "backend": backend}
    return _slice_scan(projected, gate_bias, h0, document_starts, group, options)


def _of_last_document(tail: Tensor, reach: Tensor | None) -> Tensor:
    """The last inputs of a slice [batch, kernel-1, width], or their gradients, zero where they belong to a document that has ended."""
    if reach is None:
        return tail
    distance = torch.arange(tail.shape[1] - 1, -1, -1, device=tail.device)
    return tail.masked_fill((distance > reach[:, -1:]).unsqueeze(-1), 0)


class _Conv(torch.autograd.Function):
    """`causal_conv` of this process's slice, and its state after the whole."""

    @staticmethod
    def forward(ctx, x, weight, state, reach, group, backend):
        taps = weight.shape[1] - 1
        tails = start_gather(_of_last_document(x[:, x.shape[1] - taps :], reach), group)
        y = causal_conv(x, weight, None, reach, backend)
        tails = tails()
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
        *_, own = conv_gradients(
            x[:, :taps], weight, state, _head(reach, taps), grad_y[:, :taps], ctx.backend
        )
        d_states = start_gather(own, group)
        dx, d_weight, _ = conv_gradients(x, weight, state, reach, grad_y, ctx.backend)
        d_states = d_states()
        dx[:, x.shape[1] - taps :] += _of_last_document(
            grad_last if group.rank + 1 == group.size else d_states[group.rank + 1], reach
        )
        return dx, d_weight, d_states[0], None, None, None


def _head(reach: Tensor | None, taps: int) -> Tensor | None:
    return None if reach is None else reach[:, :taps]


_slice_conv: Any = torch.compiler.disable(_Conv.apply)


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
        state: the kernel-1 inputs before the whole sequence, [batch, kernel-1, width], the same on every process; zeros when not given.
        reach: `reach_within_document` of this slice, or None if no document starts in it.
        backend: as in `causal_conv`.

    Returns:
        y [batch, time, width] of this slice, and the state after the whole sequence, the same on every process.

    Raises:
        ValueError: the slice is shorter than kernel-1 tokens, and so would not hold the state of the next one.
    """
    (batch, time, width), taps = x.shape, weight.shape[1] - 1
    if time < taps:
        raise ValueError(
            f"A slice must hold conv_kernel - 1 = {taps} tokens, but this one has {time}: use longer chunks, or fewer processes for a sequence."
        )
    state = x.new_zeros(batch, taps, width) if state is None else state.to(x.dtype)
    return _slice_conv(x, weight, state, reach, group, backend or default_backend(x.device, x.dtype))
