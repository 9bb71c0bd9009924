"""Minimal RNN language models for transformers.

    input_ids -> embedding -> blocks -> norm -> logits

The state of a block (block.py) is (h, last conv inputs). It enters with `past_key_values` and is returned the
same way, so a sequence can be cut anywhere. Documents may start anywhere in a row (`document_starts`), and
padding may be on either side: real tokens are first moved to the left, so that no real token follows padding.

Shapes: B batch, T time, H hidden_size.
"""

import math
import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .batches import (
    PACKING,
    check_keyword_arguments,
    check_padding_of_counted_labels,
    check_targets,
    check_tokens,
    document_starts_from_packing,
    left_align_order,
    shifted_labels,
)
from .block import MinRNNBlock
from .boundaries import Boundaries
from .cache import MinRNNCache, check_state
from .configuration_minrnn import MinRNNConfig
from .context_parallel import ContextGroup
from .dtypes import at_least_fp32
from .generation import PREFILL, StateGenerationMixin
from .layers import RMSNorm
from .loss import LMHead, loss_of_module_head, next_token_loss, softcapped, without_padding
from .mixer import MinRNNMixer, State
from .registry import CELLS


class MinRNNPreTrainedModel(PreTrainedModel):
    """Initialisation, and the class attributes that transformers reads."""

    config: MinRNNConfig
    config_class = MinRNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MinRNNBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _can_record_outputs = {"hidden_states": MinRNNBlock}
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "modeling_minrnn.MinRNNModel",
        "AutoModelForSequenceClassification": "modeling_classification.MinRNNForSequenceClassification",
    }
    """The modules and classes of an export that other auto classes load."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in transformers. Also writes the `auto_map` entries of other auto classes, which transformers
        omits: a classifier can begin with an exported language model."""
        # transformers copies the files that this one imports, and the classifier's imports this one.
        from .modeling_classification import MinRNNForSequenceClassification  # noqa: F401

        if self._auto_class is not None:
            saved = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = {**saved, **self.auto_classes}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every projection keeps the variance of its input.

        Projections into the residual stream are scaled down by the number of additions to it.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std or self.config.hidden_size**-0.5)
        elif isinstance(module, nn.Linear):
            scale = getattr(module, "initial_scale", None)  # of projections into the residual stream
            if scale is not None and self.config.zero_init_residual:
                init.zeros_(module.weight)
            else:
                init.normal_(module.weight, std=(std or module.in_features**-0.5) * (scale or 1.0))
        elif isinstance(module, MinRNNBlock) and module.residual_scales is not None:
            init.copy_(module.residual_scales, torch.tensor([1.0, 0.0]))
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, MinRNNMixer):
            if module.conv_weight is not None:
                init.normal_(module.conv_weight, std=module.kernel**-0.5)
            log_factor = torch.rand(self.config.recurrent_size) * math.log(self.config.memory_length / 2)
            module.init_parameters(2 * log_factor.exp())
            if module.h0 is not None:
                init.zeros_(module.h0)
        elif isinstance(module, MinRNNModel) and module.lower_bounds is not None:
            init.zeros_(module.lower_bounds)


class MinRNNModel(MinRNNPreTrainedModel):
    """The model without its head."""

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MinRNNBlock(config, i) for i in range(config.num_hidden_layers))
        bounds = CELLS[config.cell].lower_bound_size(config)
        self.lower_bounds = nn.Parameter(torch.empty(config.num_hidden_layers, bounds)) if bounds else None
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
        batch, time = check_tokens(input_ids, inputs_embeds)
        # transformers switches the cache off under gradient checkpointing, where keys and values would be
        # written twice. These blocks return their state, and training carries it from chunk to chunk, so it
        # stays on.
        if self.config.bidirectional:
            if past_key_values is not None or use_cache or self.context_group is not None:
                raise ValueError(
                    "A bidirectional model reads whole rows: it takes no past_key_values, returns none "
                    "(use_cache), and cannot share a row between processes (use_context_parallel)."
                )
            use_cache = False
        use_cache = self.config.use_cache if use_cache is None else use_cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_keyword_arguments(type(self).forward, kwargs)
        document_starts = self.resolve_document_starts(
            (batch, time), attention_mask, past_key_values, document_starts, kwargs
        )
        if use_cache and past_key_values is None:
            past_key_values = MinRNNCache(self.config.num_hidden_layers)

        order = left_align_order(attention_mask, time)
        lengths = None
        if order is not None:
            assert attention_mask is not None
            lengths = attention_mask[:, attention_mask.shape[1] - time :].bool().sum(1)
            x = x.gather(1, order.unsqueeze(-1).expand_as(x))
            document_starts = None if document_starts is None else document_starts.gather(1, order)
        boundaries = Boundaries.of(document_starts, lengths, self.config.num_taps)
        num_tokens = time if self.context_group is None else time * self.context_group.size

        layers = [] if past_key_values is None else past_key_values.layers
        states = [(layer.recurrent, layer.conv) for layer in layers]
        x, states = self.run_layers(x, states or [(None, None)] * self.config.num_hidden_layers, boundaries)
        for layer, state in zip(layers, states, strict=True) if use_cache else ():
            layer.replace(*state, num_tokens=num_tokens)
        x = self.norm(x)

        if order is not None:
            order = order.to(x.device)
            x = torch.empty_like(x).scatter(1, order.unsqueeze(-1).expand_as(x), x)
        return BaseModelOutputWithPast(
            last_hidden_state=x, past_key_values=past_key_values if use_cache else None
        )

    def run_layers(
        self, x: Tensor, states: list[State], boundaries: Boundaries
    ) -> tuple[Tensor, list[State]]:
        """All blocks: x [B, T, H] -> [B, T, H], from the state before each block to the states after them."""
        after, x0 = [], x if self.config.residual_scales else None
        for block, state, bound in zip(self.layers, states, self.layer_bounds(), strict=True):
            x, *state = block(x, *state, boundaries, bound, x0)
            after.append(tuple(state))
        return x, after

    def layer_bounds(self) -> list[Tensor | None]:
        """Lower bounds of each layer's decays, each [lower_bound_size]: 0 in the first layer, then rising.

        Source: Qin et al., arXiv 2311.04823, section 3.2 (a cumulative softmax over the layers).
        """
        if self.lower_bounds is None:
            return [None] * len(self.layers)
        shares = at_least_fp32(self.lower_bounds).softmax(0)
        return list(shares.cumsum(0) - shares[0])

    def resolve_document_starts(
        self,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        state: MinRNNCache | None,
        document_starts: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Check mask, state and document starts of a batch, and remove the `PACKING` arguments from `kwargs`.

        Returns:
            Document starts, bool `shape`, from all arguments that give them; None without any.

        Raises:
            ValueError: shapes that do not fit the batch, a state of another model or batch, contradictions.
        """
        batch, time = shape
        if document_starts is not None and document_starts.shape != shape:
            raise ValueError(
                f"document_starts must be [batch, time] = {shape}, but is {tuple(document_starts.shape)}."
            )
        if state is not None:
            check_state(state, self.config.state_shapes(batch))
        continues = state is not None and state.layers[0].recurrent is not None
        num_read = 0 if state is None else state.layers[0].num_tokens
        if (
            attention_mask is not None
            and num_read is not None
            and attention_mask.shape[-1] not in (time, num_read + time)
        ):
            raise ValueError(
                f"attention_mask must be [batch, {time}], or [batch, {num_read + time}] "
                f"with what past_key_values has read, but is {tuple(attention_mask.shape)}."
            )
        packing = {name: kwargs.pop(name) for name in PACKING if name in kwargs}
        if all(value is None for value in packing.values()):
            return document_starts
        return document_starts_from_packing(
            packing, document_starts, attention_mask, (batch, time), continues
        )


class MinRNNForCausalLM(MinRNNPreTrainedModel, StateGenerationMixin):
    """The language model: [`MinRNNModel`] and a linear head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        if config.bidirectional:
            raise ValueError("bidirectional is for classifiers: a language model reads from left to right.")
        self.model = MinRNNModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        if not isinstance(new_embeddings, LMHead):  # a resized vocabulary comes as a plain nn.Linear
            head = LMHead(new_embeddings.in_features, new_embeddings.out_features, bias=False, device="meta")
            head.weight = new_embeddings.weight
            # Without this flag post_init would draw the weights again.
            head.__dict__["_is_hf_initialized"] = getattr(new_embeddings, "_is_hf_initialized", False)
            new_embeddings, self.config.num_tokens = head, None  # the new size is that of the user's tokens
        self.lm_head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs
    ) -> nn.Embedding:
        """As in transformers. Rows that padded the vocabulary become tokens, and those that
        `pad_to_multiple_of` adds are padding."""
        num_tokens = new_num_tokens or self.config.num_tokens or self.config.vocab_size
        embeddings: Any = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            has_padding = num_tokens < len(embeddings.weight)
            self.config.num_tokens = num_tokens if has_padding else None
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] -> logits [..., vocab_size], bounded by `config.logit_softcap`; those of the
        vocabulary's padding are the lowest number."""
        logits = self.lm_head(hidden)
        return without_padding(softcapped(logits, self.softcap).to(logits.dtype), self.config.num_tokens)

    @property
    def softcap(self) -> float | None:
        """Bound of the logits; the configurations of gru and lstm have none."""
        return getattr(self.config, "logit_softcap", None)

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
        z_loss: float = 0.0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, the loss, and the state.

        Args:
            input_ids: [batch, time].
            attention_mask: [batch, time] or longer (the last `time` columns count); 0 is padding, on either
                side. Padding does not change the logits of real tokens; logits at padding are undefined.
            past_key_values: State to continue from. It is updated in place when `use_cache`.
            inputs_embeds: [batch, time, hidden_size] instead of input_ids.
            labels: [batch, time], the input_ids themselves (-100 where nothing is scored), shifted inside as
                everywhere in transformers. The first label of a document, and one behind padding, is not
                scored; if `num_items_in_batch` may have counted it, it must be -100.
            use_cache: Return the state after the last token.
            document_starts: bool [batch, time], True where a new document begins: the state before it is
                dropped.
            shift_labels: [batch, time], targets that are already shifted (made before a sequence was cut);
                used instead of labels.
            num_items_in_batch: Number of scored tokens to divide the summed loss by; by default those of this
                call.
            logits_to_keep: Compute logits for the last n positions (0: all), or for these positions.
            skip_logits: Compute the loss without holding all logits (see `loss.linear_cross_entropy`), and
                return no logits. Needs targets.
            z_loss: Weight of the square of logsumexp(logits) in the loss (see `loss.linear_cross_entropy`).
            kwargs: `position_ids`, `seq_idx`, `cu_seq_lens_q`: other forms of `document_starts` (see
                batches.py); and what transformers passes to every model (`output_hidden_states`,
                `return_dict`, ...).

        Returns:
            `loss` (scalar, nats per scored token), `logits` [batch, time, vocab_size], `past_key_values`.

        Raises:
            TypeError: an unknown keyword argument.
            ValueError: shapes that do not fit, contradictions, or a state of another model or batch.
        """
        check_keyword_arguments(type(self).forward, kwargs)
        shape = check_tokens(input_ids, inputs_embeds)
        check_targets("labels", labels, shape)
        check_targets("shift_labels", shift_labels, shape)
        if labels is not None:  # otherwise self.model resolves them
            document_starts = self.model.resolve_document_starts(
                shape, attention_mask, past_key_values, document_starts, kwargs
            )
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
            shift_labels = shifted_labels(
                labels, attention_mask, document_starts, is_counted=num_items_in_batch is not None
            )
        elif shift_labels is None and num_items_in_batch is not None:
            check_padding_of_counted_labels(attention_mask)
        loss = logits = None
        if skip_logits:
            if shift_labels is None:
                raise ValueError("skip_logits leaves nothing to return without labels or shift_labels.")
            if isinstance(self.lm_head, LMHead):
                bounds = self.config.num_tokens, self.softcap
                loss = self.lm_head(hidden, shift_labels, num_items_in_batch, *bounds, z_loss)
            else:  # wrapped by an adapter (LoRA), whose forward takes no targets
                loss = loss_of_module_head(
                    self.logits, hidden, shift_labels, num_items_in_batch, z_loss=z_loss
                )
        else:
            is_count = isinstance(logits_to_keep, int)
            positions = slice(-logits_to_keep, None) if is_count else logits_to_keep.to(hidden.device)
            logits = self.logits(hidden[:, positions])
            if shift_labels is not None:
                loss = next_token_loss(logits, shift_labels, num_items_in_batch, z_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


# With label smoothing, Trainer shifts the labels only for the classes in this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["minrnn"] = MinRNNForCausalLM.__name__

__all__ = ["PREFILL", "MinRNNForCausalLM", "MinRNNModel", "MinRNNPreTrainedModel"]
