"""Minimal RNN language models for transformers.

    input_ids -> embedding -> blocks -> norm -> logits
    block:  x + down(cell(conv(norm(x)))),   then   x + mlp(norm(x))
    cell:   projections -> (a, b) -> linear_scan -> h  [* silu(gate)]

The state of a block is (h, last conv inputs); it enters with `past_key_values` and leaves the same way, so a sequence may be cut anywhere.
Two kinds of boundary inside a batch are exact in the scan and in the convolution alike:

- `document_starts`: the decay is zero there (the input is kept) and no conv tap reaches across;
- padding, on either side: rows are first packed to the left, so that padding is always on the right, where nothing real can see it. In the
  recurrence a pad is (a, b) = (1, 0); the conv state is taken where the row ends.

Shapes: B batch, T time, H hidden_size, R recurrent_size, K conv_kernel.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .batches import PACKING, check_counted, check_names, packing_order, shift_labels_of, starts_of_packing
from .cache import MinRNNCache, check_state
from .cell_scan import cell_scan, one_token
from .cells import CELLS
from .configuration_minrnn import MinRNNConfig
from .context_parallel import ContextGroup, context_cell_scan, context_conv
from .conv import causal_conv, conv_one_token, next_conv_state, reach_within_document
from .generation import PREFILL, StateGenerationMixin
from .layers import RMSNorm, swiglu
from .loss import LMHead, loss_of_any_head, next_token_loss
from .numba_support import is_token_step

State = tuple[Tensor | None, Tensor | None]  # recurrent [B, R] fp32, conv inputs [B, K-1, H]


@dataclass(frozen=True)
class Boundaries:
    """Where rows hold something else than one running text; computed once, used by every block."""

    document_starts: Tensor | None  # bool [B, T]
    lengths: Tensor | None  # [B], real tokens of each row; padding is on the right
    reach: Tensor | None  # [B, T], how many tokens back the convolution may look

    @classmethod
    def of(cls, document_starts: Tensor | None, lengths: Tensor | None, kernel: int) -> "Boundaries":
        if document_starts is not None and lengths is not None:
            document_starts = document_starts & (torch.arange(document_starts.shape[1], device=lengths.device) < lengths.unsqueeze(1))
        return cls(document_starts, lengths, None if document_starts is None else reach_within_document(document_starts, kernel))

    def to(self, device: torch.device | str | int) -> "Boundaries":
        """The same on a device: the blocks of a model may lie on several (`device_map`)."""
        tensors = self.document_starts, self.lengths, self.reach
        return Boundaries(*(None if tensor is None else tensor.to(device) for tensor in tensors))


class MinRNNMixer(nn.Module):
    """conv -> projections -> scan -> gate -> down-projection: the half of a block that looks back in time."""

    def __init__(self, config: MinRNNConfig):
        super().__init__()
        self.cell = CELLS[config.cell]
        self.backend = config.scan_backend
        self.options = {"cell": config.cell, "activation": config.candidate_activation, "output_gate": config.output_gate}
        self.memory_length = config.memory_length
        self.context_group: ContextGroup | None = None  # see `use_context_parallel`
        self.kernel = max(config.conv_kernel, 1)
        num_projections = self.cell.num_gates + 1 + int(config.output_gate)
        self.conv_weight = nn.Parameter(torch.empty(config.hidden_size, self.kernel)) if self.kernel > 1 else None
        self.in_proj = nn.Linear(config.hidden_size, num_projections * config.recurrent_size, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(self.cell.num_gates, config.recurrent_size))
        self.out_proj = nn.Linear(config.recurrent_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: State, boundaries: Boundaries) -> tuple[Tensor, State]:
        """x [B, T, H] -> [B, T, H], and the state after it."""
        boundaries = boundaries.to(x.device)
        if self.context_group is not None:
            return self.one_slice(x, state, boundaries, self.context_group)
        if self.backend is None and is_token_step(x) and boundaries.lengths is None and boundaries.document_starts is None:
            return self.one_token(x, state)
        recurrent, conv = state
        next_conv = None
        if self.conv_weight is not None:
            next_conv = next_conv_state(x, conv, self.kernel, boundaries.document_starts, boundaries.lengths)
            x = causal_conv(x, self.conv_weight, conv, boundaries.reach, self.backend)
        y, recurrent = cell_scan(
            self.in_proj(x), self.gate_bias, recurrent, **self.options,
            document_starts=boundaries.document_starts, lengths=boundaries.lengths, backend=self.backend,
        )  # fmt: skip
        return self.out_proj(y), (recurrent, next_conv)

    def one_token(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The same for x [B, 1, H] that continues a text, in inference: weights and state are read once, and little else is done."""
        recurrent, conv = state
        if self.conv_weight is not None:
            x, conv = conv_one_token(x, self.conv_weight, conv)
        y, recurrent = one_token(self.in_proj(x), self.gate_bias, recurrent, **self.options)
        return self.out_proj(y), (recurrent, conv)

    def one_slice(self, x: Tensor, state: State, boundaries: Boundaries, group: ContextGroup) -> tuple[Tensor, State]:
        """The same for x [B, T, H] that is one process's slice of a longer text; both states are those around the whole text."""
        if boundaries.lengths is not None:
            raise ValueError(
                "A sequence that is cut between processes cannot be padded: pass no attention_mask, or use_context_parallel(model, None)."
            )
        recurrent, conv = state
        if self.conv_weight is not None:
            x, conv = context_conv(x, self.conv_weight, conv, boundaries.reach, group, self.backend)
        y, recurrent = context_cell_scan(
            self.in_proj(x), self.gate_bias, recurrent, boundaries.document_starts, group, **self.options, backend=self.backend
        )
        return self.out_proj(y), (recurrent, conv)


class MinRNNMLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    def __init__(self, config: MinRNNConfig):
        super().__init__()
        self.act, self.gated, self.backend = ACT2FN[config.hidden_act], config.gated_mlp, config.scan_backend
        self.is_swiglu = config.gated_mlp and config.hidden_act in ("silu", "swish")
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size * (2 if config.gated_mlp else 1), bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)
        if self.is_swiglu:
            return self.down_proj(swiglu(x, self.backend))
        if not self.gated:
            return self.down_proj(self.act(x))
        gate, up = x.chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


class MinRNNBlock(GradientCheckpointingLayer):
    """Mixer and MLP, each behind a norm and around a residual."""

    def __init__(self, config: MinRNNConfig):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.scan_backend)
        self.mixer = MinRNNMixer(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.scan_backend) if config.intermediate_size else None
        self.mlp = MinRNNMLP(config) if config.intermediate_size else None
        self.dropout = nn.Dropout(config.dropout)
        # What is added to the residual stream shrinks with the number of additions; _init_weights reads it (it never sees a module that has no
        # parameters of its own, such as this one).
        scale = (config.num_hidden_layers * (1 if self.mlp is None else 2)) ** -0.5
        self.mixer.out_proj.residual_scale = scale
        if self.mlp is not None:
            self.mlp.down_proj.residual_scale = scale

    def forward(
        self, x: Tensor, recurrent: Tensor | None, conv: Tensor | None, boundaries: Boundaries
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, T, H] -> [B, T, H], and the state after it. Flat: reentrant checkpointing sees no gradient inside of a tuple."""
        mixed, (recurrent, conv) = self.mixer(self.mixer_norm(x), (recurrent, conv), boundaries)
        x = x + self.dropout(mixed)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, recurrent, conv


class MinRNNPreTrainedModel(PreTrainedModel):
    """Initialisation and what transformers needs to know."""

    config: MinRNNConfig
    config_class = MinRNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MinRNNBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _can_record_outputs = {"hidden_states": MinRNNBlock}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As everywhere in transformers; the folder's code also serves `AutoModel`, which transformers itself would not note."""
        if self._auto_class is not None:
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": "modeling_minrnn.MinRNNModel"}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every projection keeps the variance of its input; what is added to the residual stream shrinks with the number of additions."""
        std = self.config.initializer_range
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std or self.config.hidden_size**-0.5)
        elif isinstance(module, nn.Linear):
            scale = getattr(module, "residual_scale", 1.0)
            init.normal_(module.weight, std=(std or module.in_features**-0.5) * scale)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, MinRNNMixer):
            if module.conv_weight is not None:
                init.normal_(module.conv_weight, std=module.kernel**-0.5)
            octaves = torch.rand(module.gate_bias.shape[1]) * math.log(self.config.memory_length / 2)
            init.copy_(module.gate_bias, module.cell.gate_bias(2 * octaves.exp()).to(module.gate_bias))


class MinRNNModel(MinRNNPreTrainedModel):
    """The model without its head."""

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MinRNNBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.scan_backend)
        self.context_group: ContextGroup | None = None  # see `use_context_parallel`
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MinRNNCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_starts: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As `MinRNNForCausalLM.forward`, up to the last hidden state [B, T, H]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MinRNNModel takes exactly one of input_ids and inputs_embeds.")
        # transformers' own defaults switch the cache off under gradient checkpointing, where keys and values would be written twice; our
        # blocks return their state instead of writing it, and training carries it from chunk to chunk.
        use_cache = self.config.use_cache if use_cache is None else use_cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        time = x.shape[1]
        check_names(type(self).forward, kwargs)
        document_starts = self.read_boundaries(x.shape[:2], attention_mask, past_key_values, document_starts, kwargs)
        if use_cache and past_key_values is None:
            past_key_values = MinRNNCache(self.config.num_hidden_layers)

        order = packing_order(attention_mask, time)
        lengths = None
        if order is not None:
            assert attention_mask is not None
            lengths = attention_mask[:, attention_mask.shape[1] - time :].bool().sum(1)
            x = x.gather(1, order.unsqueeze(-1).expand_as(x))
            document_starts = None if document_starts is None else document_starts.gather(1, order)
        boundaries = Boundaries.of(document_starts, lengths, max(self.config.conv_kernel, 1))
        num_tokens = time if self.context_group is None else time * self.context_group.size

        for i, block in enumerate(self.layers):
            layer = None if past_key_values is None else past_key_values.layers[i]
            state = (None, None) if layer is None else (layer.recurrent, layer.conv)
            x, *state = block(x, *state, boundaries)
            if layer is not None and use_cache:
                layer.replace(*state, num_tokens=num_tokens)
        x = self.norm(x)

        if order is not None:
            order = order.to(x.device)
            x = torch.empty_like(x).scatter(1, order.unsqueeze(-1).expand_as(x), x)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values if use_cache else None)

    def read_boundaries(
        self,
        shape: tuple[int, ...],
        attention_mask: Tensor | None,
        state: MinRNNCache | None,
        document_starts: Tensor | None,
        others: dict[str, Any],
    ) -> Tensor | None:
        """Check what comes with a batch, and take from `others` all that says where documents start: bool `shape`, or None.

        Raises:
            ValueError: shapes that do not fit the batch, a state of another model or batch, contradictions.
        """
        batch, time = shape
        if document_starts is not None and document_starts.shape != shape:
            raise ValueError(f"document_starts must be [batch, time] = {tuple(shape)}, but is {tuple(document_starts.shape)}.")
        if state is not None:
            config, taps = self.config, self.config.conv_kernel - 1
            conv_shape = (batch, taps, config.hidden_size) if taps > 0 else None
            check_state(state, config.num_hidden_layers, (batch, config.recurrent_size), conv_shape)
        goes_on = state is not None and state.layers[0].recurrent is not None
        num_read = 0 if state is None else state.layers[0].num_tokens
        if attention_mask is not None and num_read is not None and attention_mask.shape[-1] not in (time, num_read + time):
            raise ValueError(
                f"attention_mask must be [batch, {time}], or [batch, {num_read + time}] with what past_key_values has read, "
                f"but is {tuple(attention_mask.shape)}."
            )
        packing = {name: others.pop(name) for name in PACKING if name in others}
        if all(value is None for value in packing.values()):
            return document_starts
        return starts_of_packing(packing, document_starts, attention_mask, (batch, time), goes_on)


class MinRNNForCausalLM(MinRNNPreTrainedModel, StateGenerationMixin):
    """The language model: [`MinRNNModel`] and a linear head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        self.model = MinRNNModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        if not isinstance(new_embeddings, LMHead):  # a resized vocabulary comes as a plain nn.Linear
            head = LMHead(new_embeddings.in_features, new_embeddings.out_features, bias=False, device="meta")
            head.weight = new_embeddings.weight
            head.__dict__["_is_hf_initialized"] = getattr(new_embeddings, "_is_hf_initialized", False)  # else post_init draws it again
            new_embeddings = head
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MinRNNCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        document_starts: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, the loss, and the state.

        Args:
            input_ids: [batch, time].
            attention_mask: [batch, time] or longer (the last `time` columns count); 0 is padding, on either side. Real tokens get the logits
                they would get without it; logits at padding mean nothing.
            past_key_values: State to go on from. It is updated in place when `use_cache`.
            inputs_embeds: [batch, time, hidden_size] instead of input_ids.
            labels: [batch, time], the input_ids themselves (-100 where nothing is scored): shifted inside, as everywhere in transformers. A
                target at a document start is masked, and one that a pad would predict; where `num_items_in_batch` may have counted it,
                it must be -100.
            use_cache: Return the state after the last token.
            document_starts: bool [batch, time], True where a new document begins: nothing before it is seen from there on.
            shift_labels: [batch, time], targets that are already shifted (made before a sequence was cut); used instead of labels.
            num_items_in_batch: Number of scored tokens to divide the summed loss by; by default those of this call.
            logits_to_keep: Compute logits for the last n positions (0: all), or for these positions.
            skip_logits: Compute the loss without ever holding the logits (see `loss.linear_cross_entropy`), and return none. Needs targets.
            kwargs: `position_ids`, `seq_idx`, `cu_seq_lens_q`: other ways to say `document_starts` (see batches.py); and what transformers
                passes to every model (`output_hidden_states`, `return_dict`, ...).

        Returns:
            `loss` (scalar, nats per scored token), `logits` [batch, time, vocab_size], `past_key_values`.

        Raises:
            TypeError: a keyword argument that nobody reads.
            ValueError: shapes that do not fit, contradictions, or a state of another model or batch.
        """
        check_names(type(self).forward, kwargs)
        if labels is not None:  # else the model itself reads them
            document_starts = self.model.read_boundaries(labels.shape, attention_mask, past_key_values, document_starts, kwargs)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_starts=document_starts,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        assert hidden is not None
        if labels is not None and shift_labels is None:
            shift_labels = shift_labels_of(labels, attention_mask, document_starts, is_counted=num_items_in_batch is not None)
        elif shift_labels is None and num_items_in_batch is not None:
            check_counted(attention_mask)
        loss = logits = None
        if skip_logits:
            if shift_labels is None:
                raise ValueError("skip_logits leaves nothing to return without labels or shift_labels.")
            if isinstance(self.lm_head, LMHead):
                loss = self.lm_head(hidden, shift_labels, num_items_in_batch)
            else:  # wrapped by an adapter (LoRA), which knows nothing of targets
                loss = loss_of_any_head(self.lm_head, hidden, shift_labels, num_items_in_batch)
        else:
            is_count = isinstance(logits_to_keep, int)
            kept = slice(-logits_to_keep, None) if is_count else logits_to_keep.to(hidden.device)
            logits = self.lm_head(hidden[:, kept])
            if shift_labels is not None:
                loss = next_token_loss(logits, shift_labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states)


# Trainer shifts the labels of a smoothed loss for the classes in this table only, and has no other way to know.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["minrnn"] = MinRNNForCausalLM.__name__

__all__ = ["PREFILL", "MinRNNForCausalLM", "MinRNNModel", "MinRNNPreTrainedModel"]
