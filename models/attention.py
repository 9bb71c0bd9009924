"""Attention over a sliding window, in every n-th block of a hybrid model (`config.attention_every`).

    y_t = sum over s of  softmax_s(q_t . k_s / sqrt(D)) v_s        t - W < s <= t, in the document of t

Queries and keys are normed in each head and rotated by their position (RoPE: Su et al., arXiv 2104.09864),
of which only differences matter, so a sequence can be cut anywhere: the state is the keys, not yet rotated,
and the values of the last W - 1 tokens. Hybrids of a recurrence and local attention: De et al., "Griffin",
arXiv 2402.19427.

The tokens are divided into blocks of W (at least `BLOCK`), and each block reads itself and the W - 1 tokens
before it. So a query has scores for about 2 W keys, half of which are masked, and the work grows with T W and
not with T^2.

Shapes: B batch, T time, H hidden_size, W attention_window, N heads, D channels of a head.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundaries import Boundaries, reach_within_document
from .context_parallel import context_tail
from .conv import last_inputs
from .dtypes import at_least_fp32
from .mixer import MinRNNMixer, State, nearest_divisor

if TYPE_CHECKING:
    from .configuration_minrnn import MinRNNConfig

HEAD = 64  # channels of a head, if the width is a multiple of it
BLOCK = 128  # least number of tokens of a block
BASE = 10_000.0  # of the wavelengths of the rotation


class WindowAttention(MinRNNMixer):
    """Causal attention to the last `attention_window` tokens, the own one included."""

    gate_activation = None
    takes_convolution = False
    takes_output_norm = False

    def __init__(self, config: "MinRNNConfig", layer: int):
        super().__init__(config, layer)
        self.window = config.attention_window
        self.num_heads = config.hidden_size // head_width(config.hidden_size)

    @classmethod
    def projections(cls, config: "MinRNNConfig") -> dict[str, int]:
        return dict.fromkeys(["query", "key", "value"], config.hidden_size)

    @classmethod
    def output_size(cls, config: "MinRNNConfig") -> int:
        return config.hidden_size

    @classmethod
    def state_size(cls, config: "MinRNNConfig") -> int:
        return 0

    @classmethod
    def tail_shape(cls, config: "MinRNNConfig") -> tuple[int, int] | None:
        """Key, value, and whether there is a token: of each of the last W - 1 tokens."""
        return config.attention_window - 1, 2 * config.hidden_size + 1

    @classmethod
    def attention_flops(cls, config: "MinRNNConfig") -> int:
        num_keys = max(config.attention_window, BLOCK) + config.attention_window - 1
        return 4 * num_keys * config.hidden_size

    def forward(
        self, x: Tensor, state: State, boundaries: Boundaries, lower_bound: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, H] -> [B, T, H], and the state after it; `lower_bound` is for the other blocks."""
        boundaries = self.on_device(boundaries, x)
        q, k, v = self.in_proj(x).split(self.widths, dim=-1)
        q, k = self.normed(q), self.normed(k)
        tokens = torch.cat([k, v, torch.ones_like(k[..., :1])], dim=-1)
        reach = None
        if boundaries.document_starts is not None:
            reach = reach_within_document(boundaries.document_starts, self.window)
        extended, tail = self.extend(tokens, state[1], reach, boundaries)
        y = window_attention(q, extended, reach, self.window, self.num_heads)
        return self.out_proj(y), (None, tail)

    def normed(self, x: Tensor) -> Tensor:
        """x [B, T, H] with a mean square of 1 in each head."""
        heads = at_least_fp32(x).unflatten(-1, (self.num_heads, -1))
        return F.rms_norm(heads, heads.shape[-1:], eps=1e-6).flatten(-2).to(x.dtype)

    def extend(
        self, tokens: Tensor, tail: Tensor | None, reach: Tensor | None, boundaries: Boundaries
    ) -> tuple[Tensor, Tensor]:
        """`tokens` [B, T, 2 H + 1] with the W - 1 tokens before them, and the last W - 1 of all."""
        if self.context_group is not None:
            tail, last = context_tail(tokens, self.window - 1, tail, reach, self.context_group)
            return torch.cat([tail, tokens], dim=1), last
        if tail is None:
            tail = tokens.new_zeros(tokens.shape[0], self.window - 1, tokens.shape[2])
        extended = torch.cat([tail.to(tokens.dtype), tokens], dim=1)
        starts, lengths = boundaries.document_starts, boundaries.lengths
        return extended, last_inputs(extended, self.window, starts, lengths)


def window_attention(q: Tensor, tokens: Tensor, reach: Tensor | None, window: int, num_heads: int) -> Tensor:
    """Attention of each query to the last `window` tokens that it may read.

    Args:
        q: [B, T, H].
        tokens: [B, W - 1 + T, 2 H + 1]: key, value, and 1, or 0 where there is no token.
        reach: int64 [B, T], how many tokens back a query may read; None for `window` - 1.

    Returns:
        [B, T, H].
    """
    batch, time, hidden = q.shape
    if time == 0:
        return q
    size = min(max(window, BLOCK), time)  # tokens of a block
    missing = -time % size
    # Tokens that fill the last block read themselves, so that no row of the softmax is empty.
    q, tokens = F.pad(q, (0, 0, 0, missing)), F.pad(tokens, (0, 0, 0, missing), value=1.0)
    blocks = tokens.unfold(1, size + window - 1, size).transpose(-1, -2)  # [B, blocks, keys, 2 H + 1]
    num_blocks, num_keys = blocks.shape[1:3]
    positions = torch.arange(num_keys, device=q.device)
    distance = positions[window - 1 :, None] - positions
    mask = ((distance >= 0) & (distance < window)) & (blocks[..., None, :, -1] > 0.5)
    if reach is not None:
        reach = F.pad(reach, (0, missing)).view(batch, num_blocks, size, 1)
        mask = mask & (distance <= reach)

    def heads(x: Tensor) -> Tensor:
        """[B, blocks, tokens, H] -> [B blocks, N, tokens, D]."""
        return x.flatten(0, 1).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    y = F.scaled_dot_product_attention(
        rotated(heads(q.view(batch, num_blocks, size, hidden)), positions[window - 1 :]),
        rotated(heads(blocks[..., :hidden]), positions),
        heads(blocks[..., hidden : 2 * hidden]),
        attn_mask=mask.flatten(0, 1).unsqueeze(1),
    )
    return y.transpose(1, 2).reshape(batch, num_blocks * size, hidden)[:, :time]


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x [..., tokens, D], in which channels r and r + D / 2 are rotated by positions / BASE^(2 r / D); an odd
    last channel is left as it is."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequencies = BASE ** -(torch.arange(half, device=x.device, dtype=dtype) / max(half, 1))
    angles = positions.to(dtype).unsqueeze(-1) * frequencies
    first, second, rest = x.to(dtype).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1).to(x.dtype)


def head_width(hidden_size: int) -> int:
    """Channels of a head."""
    return nearest_divisor(hidden_size, HEAD)
