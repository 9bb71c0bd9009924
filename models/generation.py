"""`generate()` with a recurrent state in place of keys and values."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from .cache import MinRNNCache

PREFILL = 8192  # tokens of a prompt that are read at once by default


class StateGenerationMixin(GenerationMixin):
    """`GenerationMixin` for models whose past is a `MinRNNCache`."""

    config: Any

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> bool:
        """Create a `MinRNNCache`, unless a state is passed or `use_cache` is False.

        Raises:
            ValueError: a cache implementation for keys and values, or use as an assistant, which must be
                rewound.
        """
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is a way to store "
                "keys and values, but this model has a state of fixed size: leave it unset."
            )
        if generation_config.is_assistant:
            raise ValueError(
                "A recurrent model cannot be an assistant_model: "
                "its state does not go back to before a rejected token."
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = MinRNNCache(self.config.num_hidden_layers)
        return False  # like the base method; the result is not used

    def _prefill(self, input_ids: Tensor, generation_config, model_kwargs: dict[str, Any], *args, **kwargs):
        """Read a long prompt in pieces of `prefill_chunk_size` tokens, so that memory does not grow with it.

        Raises:
            ValueError: a state that has already read the whole text or more.
        """
        check_text_continues_state(input_ids, generation_config, model_kwargs)
        if (
            input_ids.shape[1] > PREFILL
            and generation_config.use_cache is not False
            and generation_config.prefill_chunk_size is None
        ):
            generation_config.prefill_chunk_size = PREFILL  # generate()'s own copy
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def init_continuous_batching(self, *args, **kwargs):
        """Raises ValueError: continuous batching stores keys and values in pages."""
        raise ValueError(
            "Continuous batching (generate_batch, cache_implementation='paged') is a way to store "
            "keys and values, but this model has a state of fixed size: use generate() with a padded batch."
        )


def check_text_continues_state(
    input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> None:
    """Refuse a text without new tokens: generate() would read some of the state's tokens again.

    The text includes the tokens that the state has read, unless `attention_mask` is longer than the text.
    (Without padding, generate() keeps only the mask's length.)

    Raises:
        ValueError: naming both lengths.
    """
    state, embeds, mask = (
        model_kwargs.get(name) for name in ("past_key_values", "inputs_embeds", "attention_mask")
    )
    num_read = 0 if state is None else state.get_seq_length()
    text = input_ids if embeds is None else embeds
    mask_length = getattr(generation_config, "_mask_length", text.shape[1]) if mask is None else mask.shape[1]
    if num_read and text.shape[1] <= num_read and (embeds is not None or mask_length == text.shape[1]):
        raise ValueError(
            f"past_key_values has read {num_read} tokens, but the text has {text.shape[1]}: "
            "pass the whole text and what is new, or only what is new with an attention_mask for all of it."
        )
