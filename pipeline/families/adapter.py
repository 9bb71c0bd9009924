"""A causal language model of transformers, with the call that the training loop and the validation make.

Documents are separated by position_ids that restart, where the model can (limits.py). No state is carried, so
`past_key_values` must be None. The loss is that of models/loss.py: over the last hidden state without storing
the logits where the head is a plain matrix, else over the logits.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...models.loss import LMHead, next_token_loss
from .limits import NO_ROUTER_LOSS, Abilities, active_dropout, positions_in_documents


class FamilyModel(nn.Module):
    """Wraps a model of transformers; its parameters keep the names that they have there.

    Args:
        inner: the model. A plain head is replaced by one with the same weight that can compute the loss.
        abilities: of the model.
    """

    def __init__(self, inner: PreTrainedModel, abilities: Abilities):
        super().__init__()
        self.inner, self.abilities = inner, abilities
        if abilities.has_plain_head:
            _replace_head(inner)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.inner.config

    @property
    def limits(self) -> list[str]:
        """What the model cannot do in this pipeline, and its dropout, which minrnn has only if it is set."""
        has_router = getattr(self.config, "router_aux_loss_coef", None) is not None
        router = [NO_ROUTER_LOSS] if has_router else []
        return [*self.abilities.limits, *router, *active_dropout(self.config)]

    def num_parameters(self) -> int:
        """Number of parameters; shared ones are counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own names, for checkpoints."""
        return self.inner.named_parameters(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor | None = None,
        document_starts: Tensor | None = None,
        past_key_values: None = None,
        use_cache: bool = False,
        skip_logits: bool = False,
        num_items_in_batch: float | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        z_loss: float = 0.0,
    ) -> CausalLMOutputWithPast:
        """As `MinRNNForCausalLM.forward`, without a state."""
        assert past_key_values is None, "this family carries no state"
        assert not use_cache, "this family carries no state"
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if document_starts is not None and self.abilities.separates_documents:
            inputs["position_ids"] = positions_in_documents(document_starts)
        if skip_logits and self.abilities.has_plain_head:
            hidden = self.inner.base_model(**inputs)[0]
            head: Any = self.inner.get_output_embeddings()
            loss = head(hidden, shift_labels, num_items_in_batch, z_loss=z_loss)
            return CausalLMOutputWithPast(loss=loss)
        logits = self.inner(**inputs).logits
        loss = None
        if shift_labels is not None:
            loss = next_token_loss(logits, shift_labels, num_items_in_batch, z_loss)
        if skip_logits:
            return CausalLMOutputWithPast(loss=loss)
        is_count = isinstance(logits_to_keep, int)
        positions = slice(-logits_to_keep, None) if is_count else logits_to_keep.to(logits.device)
        return CausalLMOutputWithPast(loss=loss, logits=logits[:, positions])


def _replace_head(model: PreTrainedModel) -> None:
    old: Any = model.get_output_embeddings()
    head = LMHead(old.in_features, old.out_features, bias=False, device="meta")
    head.weight = old.weight
    model.set_output_embeddings(head)
