"""Sequence classification: each row of tokens gets one of num_labels labels.

    input_ids -> MinRNNModel -> pooling (last token, or mean) -> logits                         one tower
    two texts u, v, each read with the same weights -> [u, v, u * v, u - v] -> MLP -> logits    two towers

The features of two towers are those of Long Range Arena's Retrieval task (Tay et al., arXiv 2011.04006).

Shapes: B batch, T time, H hidden_size.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from .batches import has_values
from .cache import MinRNNCache
from .configuration_minrnn import MinRNNConfig
from .modeling_minrnn import MinRNNModel, MinRNNPreTrainedModel


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """One vector for each row: hidden [B, T, H] -> [B, H].

    Args:
        attention_mask: [B, T], 0 is padding, on any side; None: every token is real.
        pooling: `"last"` for the last real token, `"mean"` for the mean of all real tokens.

    Raises:
        ValueError: a row has no real token.
    """
    if hidden.shape[1] == 0:
        raise ValueError("The rows have no tokens, so there is nothing to classify.")
    if attention_mask is None:
        return hidden[:, -1] if pooling == "last" else hidden.mean(1)
    real = attention_mask.bool()
    if has_values(real) and not bool(real.any(1).all()):
        row = int((~real.any(1)).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} has no token, so there is nothing to classify.")
    if pooling == "last":
        positions = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, positions, 0).amax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
    # Outputs at padding are undefined, perhaps NaN, so they are replaced rather than multiplied by 0.
    total = hidden.masked_fill(~real.unsqueeze(-1).to(hidden.device), 0).sum(1)
    return total / real.sum(1, keepdim=True).to(total)


def check_labels(labels: Tensor, num_labels: int, batch: int, problem_type: str | None) -> None:
    """Refuse labels that the loss of a problem type would not take, or would broadcast.

    Args:
        problem_type: of the configuration; None is decided as in transformers, by number and dtype of labels.

    Raises:
        ValueError: wrong shape or dtype.
    """
    if problem_type is None and num_labels > 1:
        is_single = labels.dtype in (torch.int64, torch.int32)
        problem_type = "single_label_classification" if is_single else "multi_label_classification"
    shapes, fits, kind = [(batch, num_labels)], labels.is_floating_point(), "float"
    if problem_type == "single_label_classification":
        shapes, fits, kind = [(batch,), (batch, 1)], labels.dtype == torch.int64, "int64"
    elif num_labels == 1:
        shapes = [(batch,), (batch, 1)]
    if labels.shape not in shapes or not fits:
        raise ValueError(
            f"labels must be {kind} {shapes[0]} for problem_type {problem_type or 'regression'}, "
            f"but are {labels.dtype} {tuple(labels.shape)}."
        )


class PairHead(nn.Module):
    """Logits from two texts: an MLP of the features [u, v, u * v, u - v]."""

    def __init__(self, config: MinRNNConfig, num_labels: int):
        super().__init__()
        self.dense = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.out_proj = nn.Linear(config.hidden_size, num_labels, bias=False)

    def forward(self, towers: Tensor) -> Tensor:
        """towers [B, 2, H] -> logits [B, num_labels]."""
        u, v = towers.unbind(1)
        return self.out_proj(self.act(self.dense(torch.cat([u, v, u * v, u - v], dim=-1))))


class MinRNNForSequenceClassification(MinRNNPreTrainedModel):
    """[`MinRNNModel`], pooling and a linear head, or an MLP for pairs of texts."""

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = MinRNNModel(config)
        if config.num_towers == 2:
            self.score = PairHead(config, self.num_labels)
        else:
            self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MinRNNCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Logits of the labels, and the loss.

        Args:
            input_ids: [batch, time], or [batch, 2, time] with `config.num_towers` 2.
            attention_mask: of the same shape, 0 for padding, on any side. Padding does not change the logits.
                Without it every token is real: pad_token_id is not looked for.
            past_key_values: State after the beginning of the texts, for pooling `"last"` only.
            inputs_embeds: [..., time, hidden_size] instead of input_ids.
            labels: int64 [batch], -100 for rows that are not scored; for `config.problem_type` `"regression"`
                and `"multi_label_classification"` float [batch] or [batch, num_labels].
            use_cache: Return the state after the texts, for pooling `"last"` only.
            num_items_in_batch: Number of labels to divide the summed loss by; by default those of this call.
            kwargs: As in `MinRNNForCausalLM`.

        Returns:
            `loss` (scalar), `logits` [batch, num_labels], `past_key_values`.

        Raises:
            TypeError: an unknown keyword argument.
            ValueError: a row without a token, shapes or labels that do not fit, or a state that pooling
                cannot use.
        """
        towers = self.config.num_towers
        if past_key_values is not None and (self.config.pooling != "last" or towers > 1):
            raise ValueError("past_key_values: only one tower with pooling 'last' reads a text in pieces.")
        if towers > 1:
            self._check_towers(input_ids if input_ids is not None else inputs_embeds, input_ids is None)
            input_ids, attention_mask, inputs_embeds = (
                None if tensor is None else tensor.flatten(0, 1)
                for tensor in (input_ids, attention_mask, inputs_embeds)
            )
        can_continue = self.config.pooling == "last" and towers == 1
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if can_continue else False,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        assert hidden is not None
        if attention_mask is not None:  # the last columns belong to this call
            attention_mask = attention_mask[:, attention_mask.shape[1] - hidden.shape[1] :]
        pooled = pool(hidden, attention_mask, self.config.pooling)
        logits = self.score(pooled if towers == 1 else pooled.unflatten(0, (-1, towers)))
        loss = None
        if labels is not None:
            check_labels(labels, self.num_labels, len(logits), self.config.problem_type)
            loss = self.loss_function(
                labels=labels,
                pooled_logits=logits,
                config=self.config,
                num_items_in_batch=num_items_in_batch,
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _check_towers(self, tokens: Tensor | None, is_embedded: bool) -> None:
        if tokens is not None and (tokens.ndim != 3 + is_embedded or tokens.shape[1] != 2):
            raise ValueError(
                "With config.num_towers 2, each row is a pair of texts: [batch, 2, time], "
                f"not {tuple(tokens.shape)}."
            )


__all__ = ["MinRNNForSequenceClassification"]
