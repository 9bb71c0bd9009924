"""Scores between the tokens of a chunk: s_ij = sum over channels of q_i a(i, j) k_j for j <= i, else 0.

a(i, j) is the product of the decays after token j up to token i. It is computed from these decays alone,
never as a quotient, and never as exp of a difference. So it is at most 1, its error is relative to it, and
nothing overflows or loses digits, also with a = e^-50 at every token or a = 0.

A matrix of a(i, j) for each key channel would hold [C, C, K]. Instead, blocks of tokens are divided into
halves, the halves into halves, and so on: for i in the second half of a block and j in the first,

    a(i, j) = a(i, middle) a(middle, j)

so the scores between the halves of a block are one matrix product over the key channels. (GLA, Yang et al.,
arXiv 2312.06635, section 4.3, divides once and computes the blocks on the diagonal channel by channel.) With
one decay per head, the matrix of a(i, j) is a cumulative product, and s_ij = (q_i . k_j) a(i, j).

Backward: the gradient for the logarithm of a product is the product times its gradient, and the logarithm of
each decay receives it from every product that contains the decay.

Shapes: X chunks of C tokens (a power of two), K key channels, G decays per token: K, or 1 for a whole head.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def from_start(decay: Tensor) -> Tensor:
    """Product of the decays up to each token: [X, C, G] -> [X, C, G]."""
    return decay.cumprod(1)


def to_end(decay: Tensor) -> Tensor:
    """Product of the decays after each token: [X, C, G] -> [X, C, G]."""
    return F.pad(decay[:, 1:].flip(1).cumprod(1).flip(1), (0, 0, 0, 1), value=1.0)


def log_gradient_from_start(grad: Tensor) -> Tensor:
    """Gradient for each log decay from that for the logarithms of `from_start`: [X, C, G] -> [X, C, G]."""
    return grad.flip(1).cumsum(1).flip(1)


def log_gradient_to_end(grad: Tensor) -> Tensor:
    """Gradient for each log decay from that for the logarithms of `to_end`: [X, C, G] -> [X, C, G]."""
    return F.pad(grad[:, :-1].cumsum(1), (0, 0, 1, 0))


def scores(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """q, k [X, C, K], decay [X, C, G] -> [X, C, C], lower triangular."""
    if decay.shape[-1] == k.shape[-1]:
        return _channel_scores(q, k, decay)
    return torch.bmm(q, k.mT).mul_(head_decays(decay))


def scores_and_gradients(
    q: Tensor, k: Tensor, decay: Tensor, d_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`scores`, and the gradients for q, k and log(decay) from theirs, d_scores [X, C, C]."""
    if decay.shape[-1] == k.shape[-1]:
        return _channel_scores_and_gradients(q, k, decay, d_scores)
    decays, products = head_decays(decay), torch.bmm(q, k.mT)
    d_products = decays * d_scores
    d_log = _head_log_gradient(products * d_products)
    return products.mul_(decays), torch.bmm(d_products, k), torch.bmm(d_products.mT, q), d_log


def head_decays(decay: Tensor) -> Tensor:
    """a(i, j) for j <= i, else 0: [X, C, 1] -> [X, C, C]."""
    length = decay.shape[1]
    is_after = decay.new_ones(length, length, dtype=torch.bool).tril(-1)
    return torch.where(is_after, decay, 1).cumprod(1).tril_()


def _head_log_gradient(grad: Tensor) -> Tensor:
    """Gradient for log(decay) [X, C, 1] from that for log a(i, j) [X, C, C]: a_t is in it if j < t <= i."""
    from_token = grad.new_ones(grad.shape[1:]).triu()  # i >= t
    return (from_token @ grad).tril_(-1).sum(-1, keepdim=True)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves of blocks of 2 * half tokens: [X, C, D] -> two views [blocks, half, D]."""
    first, second = x.view(x.shape[0] * x.shape[1] // (2 * half), 2, half, x.shape[2]).unbind(1)
    return first, second


def _levels(decay: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For half = 1, 2, 4, ..., C / 2: half, a(i, middle) and a(middle, j), each [blocks, half, G].

    The tensors are views of memory that the next level changes.
    """
    up_to, after, half = decay.clone(), torch.ones_like(decay), 1  # inside of each half
    while half < decay.shape[1]:
        (_, from_middle), (to_middle, _) = _halves(up_to, half), _halves(after, half)
        yield half, from_middle, to_middle
        first, second = (x[:, -1:].clone() for x in _halves(up_to, half))
        from_middle.mul_(first)
        to_middle.mul_(second)
        half *= 2


def _between_halves(scores: Tensor, half: int) -> Tensor:
    """Scores of the second half of each block with its first: a view [X, blocks of a chunk, half, half]."""
    blocks = scores.unflatten(2, (-1, 2 * half)).unflatten(1, (-1, 2 * half)).diagonal(dim1=1, dim2=3)
    return blocks.movedim(-1, 1)[:, :, half:, :half]


def _diagonal_scores(q: Tensor, k: Tensor) -> Tensor:
    scores = q.new_zeros(q.shape[0], q.shape[1], q.shape[1])
    scores.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
    return scores


def _fill_between_halves(scores: Tensor, half: int, rows: Tensor, columns: Tensor) -> None:
    block = _between_halves(scores, half)
    block.copy_(torch.bmm(rows, columns.mT).view(block.shape))


def _channel_scores(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    scores = _diagonal_scores(q, k)
    for half, from_middle, to_middle in _levels(decay):
        rows, columns = _halves(q, half)[1] * from_middle, _halves(k, half)[0] * to_middle
        _fill_between_halves(scores, half, rows, columns)
    return scores


def _channel_scores_and_gradients(
    q: Tensor, k: Tensor, decay: Tensor, d_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, d_diagonal = _diagonal_scores(q, k), d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    dq, dk, d_log = d_diagonal * k, d_diagonal * q, torch.zeros_like(decay)
    for half, from_middle, to_middle in _levels(decay):
        rows, columns = _halves(q, half)[1] * from_middle, _halves(k, half)[0] * to_middle
        _fill_between_halves(scores, half, rows, columns)
        d_block = _between_halves(d_scores, half).flatten(0, 1)
        d_rows, d_columns = torch.bmm(d_block, columns), torch.bmm(d_block.mT, rows)
        _halves(dq, half)[1].addcmul_(d_rows, from_middle)
        _halves(dk, half)[0].addcmul_(d_columns, to_middle)
        d_log_first, d_log_second = _halves(d_log, half)
        d_log_first.add_(log_gradient_to_end(d_columns.mul_(columns)))
        d_log_second.add_(log_gradient_from_start(d_rows.mul_(rows)))
    return scores, dq, dk, d_log
