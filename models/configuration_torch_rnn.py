"""Configuration of a language model on torch's nn.GRU or nn.LSTM."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .export_format import check_export_format

CELLS = ("gru", "lstm")


@strict
class TorchRNNConfig(PreTrainedConfig):
    r"""Configuration of [`TorchRNNModel`] and [`TorchRNNForCausalLM`].

    Args:
        vocab_size: Number of rows of the embedding.
        num_tokens: Number of ids that the tokenizer has; the rows after them are padding, without any
            probability. `None` if no row is padding.
        hidden_size: Width of the embedding and of every layer.
        num_hidden_layers: Number of layers.
        cell: `"gru"` or `"lstm"`.
        dropout: Probability of dropping an element between two layers, in training.
        initializer_range: Standard deviation of the embedding; `None` for hidden_size ** -0.5. The layers
            are initialised as torch does.
        tie_word_embeddings: Use the embedding as output projection.
        max_position_embeddings: The longest input that harnesses should send; the recurrence has no limit.
        use_cache: Return the state, so that the sequence can go on.
        bos_token_id: First token of every document.
        eos_token_id: Last token of every document.
        pad_token_id: Padding.

    Raises:
        ValueError: values that do not fit, all of them in one message.
    """

    model_type = "torch_rnn"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 264
    num_tokens: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 4
    cell: str = "gru"
    dropout: int | float = 0.0
    initializer_range: int | float | None = None
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8_192
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_export_format(kwargs.get("export_format"))
        errors = []
        if self.cell not in CELLS:
            errors.append(f"cell: {self.cell!r} is none of {', '.join(CELLS)}")
        counts = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
        errors += [
            f"{name}: must be positive, not {getattr(self, name)}"
            for name in counts
            if getattr(self, name) <= 0
        ]
        if not 0.0 <= self.dropout < 1.0:
            errors.append(f"dropout: must be in [0, 1), not {self.dropout}")
        if self.initializer_range is not None and self.initializer_range <= 0:
            errors.append(f"initializer_range: must be positive or null, not {self.initializer_range}")
        if self.num_tokens is not None and not 0 < self.num_tokens <= self.vocab_size:
            most = f"vocab_size ({self.vocab_size})"
            errors.append(f"num_tokens: must be from 1 to {most}, not {self.num_tokens}")
        if errors:
            raise ValueError(f"TorchRNNConfig: {'; '.join(errors)}")

    @property
    def state_size(self) -> int:
        """Channels of a layer's state: h, and for an LSTM also c."""
        return self.hidden_size * (2 if self.cell == "lstm" else 1)

    def state_shapes(self, batch: int) -> list[tuple[tuple[int, int], None]]:
        """As `MinRNNConfig.state_shapes`."""
        return [((batch, self.state_size), None)] * self.num_hidden_layers

    @property
    def num_taps(self) -> int:
        """There is no convolution."""
        return 1

    @property
    def bidirectional(self) -> bool:
        """The layers read from left to right."""
        return False


__all__ = ["TorchRNNConfig"]
