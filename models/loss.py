"""Next-token loss from hidden states, a block of tokens at a time.

The logits of a long sequence over a large vocabulary are the largest tensor of a training step: 65,536 tokens
x 50,000 symbols in fp32 are 13 GB, and their gradient is as large. Here each block of tokens is projected,
scored and differentiated before the next: with p = softmax(logits),

    loss = sum over scored tokens of  Z - logits[target] + z_loss Z^2,        Z = logsumexp(logits)
    d logits = (1 + 2 z_loss Z) p - onehot(target)
    d hidden = d logits @ W          d W = sum over blocks of  d logits^T @ hidden

The backward pass needs only d hidden and d W. This takes three matrix products, as the usual way does, and
nothing is computed twice. Sums are in fp32 (fp64 in fp64), whatever the dtype of the products. torch's own
chunked `linear_cross_entropy` (2.13) returns the loss in bf16 under autocast, with an error of 1 %.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .dtypes import at_least_fp32, compute_dtype

IGNORE_INDEX = -100  # a target that is not scored, as everywhere in transformers
BLOCK_ELEMENTS = 2**25  # logits held at once: 128 MB in fp32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        block: int,
        num_tokens: int | None,
        softcap: float | None,
        z_loss: float,
    ) -> Tensor:
        dtype = compute_dtype(hidden)
        cast_hidden, cast_weight = hidden.to(dtype), weight.to(dtype)
        loss = scale.new_zeros(())
        needs_grad = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(cast_hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=scale.dtype) if needs_grad else None
        hidden_blocks, target_blocks = cast_hidden.split(block), targets.split(block)
        grad_blocks = (None,) * len(hidden_blocks) if grad_hidden is None else grad_hidden.split(block)
        for rows, labels, grad_rows in zip(hidden_blocks, target_blocks, grad_blocks, strict=True):
            logits = softcapped(rows @ cast_weight.t(), softcap)
            # The slope is that of tanh; padding would overflow in it.
            slope = None if softcap is None or grad_rows is None else 1 - (logits / softcap).square()
            logits = without_padding(logits, num_tokens)
            log_probabilities = F.log_softmax(logits, dim=-1, dtype=scale.dtype)
            loss += F.nll_loss(log_probabilities, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            log_z = logits.to(scale.dtype).logsumexp(-1, keepdim=True) if z_loss else None
            if log_z is not None:
                loss += z_loss * log_z.square()[labels != IGNORE_INDEX].sum()
            if grad_rows is not None and grad_weight is not None:
                scored = (labels != IGNORE_INDEX).unsqueeze(1)
                p = log_probabilities.exp_()
                p = p if log_z is None else p.mul_(1 + 2 * z_loss * log_z)
                difference = p.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), -scored.to(scale.dtype))
                difference = difference.masked_fill_(~scored, 0).mul_(scale)
                difference = (difference if slope is None else difference.mul_(slope)).to(dtype)
                torch.mm(difference, cast_weight, out=grad_rows)
                grad_weight += difference.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        d_hidden, d_weight = grad_hidden * grad_loss, grad_weight * grad_loss
        return d_hidden.to(hidden_dtype), d_weight.to(weight_dtype), *(None,) * 6


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(logits / softcap) in at least fp32; the logits themselves without a bound.

    Source: Gemma Team, "Gemma 2", arXiv 2408.00118, section 2.
    """
    return logits if softcap is None else softcap * torch.tanh(at_least_fp32(logits) / softcap)


def without_padding(logits: Tensor, num_tokens: int | None) -> Tensor:
    """Logits [..., vocab_size] in which ids from `num_tokens` on have the lowest number, changed in place.

    Their probability is exactly 0. The number is finite, so that p log p is 0 for them and not NaN.
    """
    if num_tokens is not None and num_tokens < logits.shape[-1]:
        logits[..., num_tokens:] = torch.finfo(logits.dtype).min
    return logits


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items: int | float | Tensor | None = None,
    block: int | None = None,
    num_tokens: int | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy in nats of `hidden @ weight.T` against `targets`, without the logits.

    Args:
        hidden: [..., hidden_size].
        weight: [vocab_size, hidden_size].
        targets: int64 [...], -100 where nothing is scored.
        num_items: what the summed loss is divided by; the number of scored tokens if None.
        block: tokens whose logits are held at once; by default as many as make 2^25 logits.
        num_tokens: rows of the weight from this one on are padding and have no probability; None: none are.
        softcap: bound of the logits (`softcapped`); None for none.
        z_loss: weight of the square of logsumexp(logits), which is added to each token's loss and keeps the
            logits near 0 (Chowdhery et al., "PaLM", arXiv 2204.02311, section 5).

    Returns:
        A scalar in fp32 (fp64 if hidden is).

    Raises:
        ValueError: a z_loss that is negative or not finite.
    """
    rows, labels = hidden.flatten(0, -2), targets.to(hidden.device).flatten()
    count = (
        (labels != IGNORE_INDEX).sum()
        if num_items is None
        else torch.as_tensor(num_items, device=hidden.device)
    )
    scale = count.to(torch.promote_types(hidden.dtype, torch.float32)).reciprocal()
    _check_z_loss(z_loss)
    block = block or max(1, BLOCK_ELEMENTS // len(weight))
    return _LinearCrossEntropy.apply(rows, weight, labels, scale, block, num_tokens, softcap, z_loss)


def next_token_loss(
    logits: Tensor,
    targets: Tensor,
    num_items: int | float | Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """The same from logits [..., vocab_size].

    As transformers' ForCausalLMLoss, which however rounds fp64 to fp32.
    """
    _check_z_loss(z_loss)
    logits, targets = at_least_fp32(logits).flatten(0, -2), targets.to(logits.device).flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    scored = targets != IGNORE_INDEX
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square().masked_fill(~scored, 0).sum()
    return loss / (scored.sum() if num_items is None else torch.as_tensor(num_items, device=logits.device))


def _check_z_loss(z_loss: float) -> None:
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be at least 0 and finite, not {z_loss}.")


def loss_of_module_head(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    num_items: int | float | Tensor | None = None,
    block: int = 1024,
    z_loss: float = 0.0,
) -> Tensor:
    """`linear_cross_entropy` for a head that is not just a matrix, such as one with an adapter.

    Logits of `block` tokens are held at once and recomputed in the backward pass.

    Args:
        head: [..., hidden_size] -> logits [..., vocab_size].
        hidden, targets, num_items, z_loss: As in `linear_cross_entropy`.
    """
    rows, labels = hidden.flatten(0, -2), targets.to(hidden.device).flatten()

    def summed_loss(rows: Tensor, labels: Tensor) -> Tensor:
        return next_token_loss(head(rows), labels, num_items=1, z_loss=z_loss)

    parts = zip(rows.split(block), labels.split(block), strict=True)
    losses = [checkpoint(summed_loss, part, targets, use_reentrant=False) for part, targets in parts]
    return torch.stack(losses).sum() / ((labels != IGNORE_INDEX).sum() if num_items is None else num_items)


class LMHead(nn.Linear):
    """Hidden states to logits, or directly to the loss.

    The loss is computed inside the module because engines that shard parameters (ZeRO-3) gather them around a
    module's forward.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        targets: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        num_tokens: int | None = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size], unbounded, also those of padding; or the loss of
        `linear_cross_entropy` if `targets` is given."""
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(
            x, self.weight, targets, num_items, num_tokens=num_tokens, softcap=softcap, z_loss=z_loss
        )
