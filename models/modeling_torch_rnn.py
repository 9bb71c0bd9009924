"""Language models on torch's nn.GRU and nn.LSTM, with the interface and the state of `MinRNNForCausalLM`.

    input_ids -> embedding -> nn.GRU or nn.LSTM (all layers) -> logits

The state of a layer is [batch, hidden] for a GRU, and h and c side by side, [batch, 2 hidden], for an LSTM.
Where documents start or rows end inside a batch, each row is split into segments, and all segments run at
once as a `PackedSequence`: a document reads nothing of its neighbours, and padding is not read at all.

Shapes: B batch, T time, H hidden_size, L layers, S segments, N real tokens.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .boundaries import Boundaries
from .configuration_torch_rnn import TorchRNNConfig
from .dtypes import at_least_fp32
from .loss import LMHead
from .mixer import State
from .modeling_minrnn import MinRNNForCausalLM, MinRNNModel, MinRNNPreTrainedModel


@dataclass(frozen=True)
class Segments:
    """The parts of rows between document starts, longest first, as a `PackedSequence` holds them."""

    order: Tensor
    """int64 [N], index into batch * time of each packed token."""
    batch_sizes: Tensor
    """int64 [longest segment] on the CPU: number of segments that have a token at each offset."""
    rows: Tensor
    """int64 [S], row of each segment."""
    continues: Tensor
    """bool [S]: the segment goes on from the row's carried state."""
    is_last: Tensor
    """bool [S]: the segment is the last of its row."""

    @classmethod
    def of(cls, shape: tuple[int, int], boundaries: Boundaries, device: torch.device) -> "Segments":
        """The segments of a batch [B, T]. Rows without real tokens have none."""
        positions = torch.arange(shape[1], device=device).expand(shape)
        lengths = boundaries.lengths
        lengths = torch.full(shape[:1], shape[1], device=device) if lengths is None else lengths.to(device)
        is_real, starts = positions < lengths.unsqueeze(1), boundaries.document_starts
        starts = torch.zeros_like(is_real) if starts is None else starts.to(device) & is_real
        rows, begins = (starts | ((positions == 0) & is_real)).nonzero(as_tuple=True)
        is_last = torch.ones_like(rows, dtype=torch.bool)
        is_last[:-1] = rows[1:] != rows[:-1]
        ends = torch.where(is_last, lengths[rows], begins.roll(-1))
        longest_first = (begins - ends).argsort(stable=True)
        rank = torch.empty_like(longest_first)
        rank[longest_first] = torch.arange(len(rank), device=device)
        tokens = is_real.flatten().nonzero().squeeze(1)
        segment = torch.repeat_interleave(ends - begins)  # [N], of each real token
        offset = positions.flatten()[tokens] - begins[segment]
        order = tokens[(offset * max(len(rank), 1) + rank[segment]).argsort()]
        continues = (begins == 0) & ~starts[rows, 0]
        parts = (part[longest_first] for part in (rows, continues, is_last))
        return cls(order, offset.bincount().cpu(), *parts)


class TorchRNNPreTrainedModel(MinRNNPreTrainedModel):
    """Initialisation, and the class attributes that transformers reads."""

    config: Any  # a TorchRNNConfig
    config_class = TorchRNNConfig
    supports_gradient_checkpointing = False
    _no_split_modules = []
    _can_record_outputs = {}
    auto_classes: ClassVar[dict[str, str]] = {"AutoModel": "modeling_torch_rnn.TorchRNNModel"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As torch does in `nn.RNNBase`, uniform within hidden_size ** -0.5; others normal."""
        std = self.config.hidden_size**-0.5
        if isinstance(module, nn.RNNBase):
            for parameter in module.parameters():
                init.uniform_(parameter, -std, std)
        elif isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range or std)


class TorchRNNModel(TorchRNNPreTrainedModel, MinRNNModel):
    """The model without its head."""

    def __init__(self, config: TorchRNNConfig):
        MinRNNPreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kind = nn.LSTM if config.cell == "lstm" else nn.GRU
        sizes = (config.hidden_size, config.hidden_size, config.num_hidden_layers)
        dropout = config.dropout if config.num_hidden_layers > 1 else 0.0  # it acts between layers only
        self.rnn = kind(*sizes, batch_first=True, dropout=dropout)
        self.norm = nn.Identity()
        self.context_group = None
        self.post_init()

    @functools.wraps(MinRNNModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:  # pyright: ignore[reportIncompatibleMethodOverride]
        if kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False)):
            raise ValueError(
                f"output_hidden_states: torch's nn.{type(self.rnn).__name__} returns its last layer only; "
                "leave it out, and read last_hidden_state of the model without its head."
            )
        return super().forward(*args, **kwargs)

    def run_layers(
        self, x: Tensor, states: list[State], boundaries: Boundaries
    ) -> tuple[Tensor, list[State]]:
        """As `MinRNNModel.run_layers`, in one call of torch's module."""
        carried = [recurrent for recurrent, _ in states if recurrent is not None]
        initial = torch.stack(carried).to(x.dtype) if carried else None
        if boundaries.document_starts is None and boundaries.lengths is None:
            y, last = self._run(x, initial)
        else:
            y, last = self._run_segments(
                x, initial, Segments.of((x.shape[0], x.shape[1]), boundaries, x.device)
            )
        return y, [(state, None) for state in at_least_fp32(last)]

    def _run(self, x: Tensor | PackedSequence, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs (of a `PackedSequence`: its data), and the state after the last token [L, rows, state]."""
        state = initial
        if initial is not None and self.config.cell == "lstm":
            state = tuple(part.contiguous() for part in initial.chunk(2, dim=-1))
        y, last = self.rnn(x, state)
        last = torch.cat(last, dim=-1) if self.config.cell == "lstm" else last
        return y.data if isinstance(y, PackedSequence) else y, last

    def _run_segments(self, x: Tensor, initial: Tensor | None, segments: Segments) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, H], 0 at padding, and the state after each row's last real token [L, B, state]."""
        (batch, time, width), config = x.shape, self.config
        if initial is None:
            initial = x.new_zeros(config.num_hidden_layers, batch, config.state_size)
        if not len(segments.rows):  # padding only
            return torch.zeros_like(x), initial
        packed = PackedSequence(x.reshape(-1, width)[segments.order], segments.batch_sizes)
        first = initial[:, segments.rows].masked_fill(~segments.continues.unsqueeze(-1), 0)
        y, last = self._run(packed, first)
        outputs = y.new_zeros(batch * time, width).index_copy(0, segments.order, y)
        rows, is_last = segments.rows, segments.is_last
        state = initial.to(last.dtype).index_copy(1, rows[is_last], last[:, is_last])
        return outputs.view(batch, time, width), state


class TorchRNNForCausalLM(TorchRNNPreTrainedModel, MinRNNForCausalLM):
    """The language model: [`TorchRNNModel`] and a linear head. `forward` is that of `MinRNNForCausalLM`."""

    def __init__(self, config: TorchRNNConfig):
        MinRNNPreTrainedModel.__init__(self, config)
        self.model = TorchRNNModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["torch_rnn"] = TorchRNNForCausalLM.__name__

__all__ = ["TorchRNNForCausalLM", "TorchRNNModel"]
