"""Configuration of a minimal RNN language model, and the two presets."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .export_format import check_export_format
from .minimal_coefficients import CANDIDATE_ACTIVATIONS
from .registry import CELLS, mixer_classes
from .scan import BACKENDS

# "paper" is the block as published (Feng et al., arXiv 2410.01201): norm, causal conv of width 4, cell with
# the positive candidate g, down-projection; norm, MLP. The default block differs where ablations favoured it
# (ARCHITECTURE.md): identity candidate, output gate, gated MLP, weights drawn with a standard deviation of
# fan_in ** -0.5, decays spread over memory lengths.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "candidate_activation": "g",
        "output_gate": False,
        "gated_mlp": False,
        "hidden_act": "gelu",
        "memory_length": 2.0,
    },
}
POOLINGS = ("last", "mean")
FINITE = (
    "expansion_factor",
    "memory_length",
    "logit_softcap",
    "initializer_range",
    "dropout",
    "rms_norm_eps",
)


@strict
class MinRNNConfig(PreTrainedConfig):
    r"""Configuration of [`MinRNNModel`], [`MinRNNForCausalLM`] and [`MinRNNForSequenceClassification`].

    Args:
        vocab_size: Number of rows of the embedding; at least the tokenizer's, usually rounded up.
        num_tokens: Number of ids that the tokenizer has. The rows after them are padding: their logits are
            the lowest number, so they have no probability. `None` if no row is padding. To use such rows for
            new tokens, call `resize_token_embeddings`, which sets it to `None`.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of blocks.
        cell: Name of the recurrent cell: `"mingru"` or `"minlstm"` with decays in (0, 1), `"mingru_signed"`
            or `"minlstm_signed"` in (-1, 1), or another one: docs/cells.md lists all.
        expansion_factor: Recurrent width / hidden_size (the paper's alpha).
        candidate_activation: Activation of the candidate: `"g"` (x + 0.5 for x >= 0, else sigmoid), `"none"`,
            `"tanh"` or `"silu"`.
        output_gate: Multiply the cell's output by silu of one more projection.
        conv_kernel: Width of the causal depthwise convolution before the cell; 0 or 1 for none.
        intermediate_size: Width of the MLP; 0 for none.
        hidden_act: Activation of the MLP.
        gated_mlp: MLP as down(act(gate) * up) (as in Llama) instead of down(act(up)).
        memory_length: Before training, the channels' memory lengths 1 / (1 - a) are spread log-uniformly from
            2 to this many tokens; 2 starts every gate half open.
        learn_h0: Learn the state before the first token of every document, one for each layer. It starts as
            0, the state without it. For cells with a state per channel; docs/cells.md lists them.
        output_norm: RMS norm of the cell's output before the output gate, over groups of 64 channels (or the
            nearest number that divides the cell's width). Not for gilr_lstm, hgrn2, mlstm and gla.
        two_tap_input: The cell's input is b_t + lambda b_{t-1}, with a learnt lambda in each channel, 0
            before training. In place of the convolution (set conv_kernel to 0); for cells that docs/cells.md
            lists.
        attention_every: Attention over a sliding window instead of the cell in every block whose number, from
            1, is a multiple of this; `None` for none (docs/cells.md).
        attention_window: Tokens that such a block reads, the own one included.
        residual_scales: Each block reads s x + r x0 in place of x: x0 is the embedding, and s and r are
            learnt numbers, 1 and 0 before training.
        zero_init_residual: Start the projections into the residual stream at zero: every block then begins as
            the identity.
        logit_softcap: Bound the logits to softcap tanh(logits / softcap); `None` for no bound.
        initializer_range: Standard deviation of the weights; `None` for fan_in ** -0.5.
        dropout: Probability of dropping an element of a block's output, in training.
        rms_norm_eps: Epsilon of the RMS norms.
        tie_word_embeddings: Use the embedding as output projection.
        max_position_embeddings: The longest input that harnesses should send. The recurrence itself has no
            limit; harnesses try out batches of this length and cut texts to it.
        scan_backend: Backend of the scan (see `scan.linear_scan`); `None` for the fastest on the device.
        use_cache: Return the state, so that the sequence can go on.
        head_dim: Channels of each head, in cells with a matrix state; `None` for 64, or the nearest number
            that divides the recurrent width.
        state_expansion: Numbers of the state for each channel, in cells whose state is wider than their
            output (complex numbers in `"s4d"`); `None` for the cell's own.
        ternary: Round the weights of the projections to -1, 0 or 1 times a scale, and their inputs to 8 bits.
        bos_token_id: First token of every document.
        eos_token_id: Last token of every document.
        pad_token_id: Padding.
        bidirectional: Read each row in both directions, with a mixer for each. For classification only.
        pooling: What a classifier sees of a row: `"last"` (the last token) or `"mean"` (the mean of all).
        num_towers: Texts of an example: 1, or 2 for a classifier of pairs, which reads both with the same
            weights.

    Raises:
        ValueError: values that do not fit, all of them in one message.
    """

    model_type = "minrnn"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 264
    num_tokens: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 4
    cell: str = "mingru"
    expansion_factor: int | float = 1.5
    candidate_activation: str = "none"
    output_gate: bool = True
    conv_kernel: int = 4
    intermediate_size: int = 512
    hidden_act: str = "silu"
    gated_mlp: bool = True
    memory_length: int | float = 256.0
    learn_h0: bool = False
    output_norm: bool = False
    two_tap_input: bool = False
    attention_every: int | None = None
    attention_window: int = 512
    residual_scales: bool = False
    zero_init_residual: bool = False
    logit_softcap: int | float | None = None
    initializer_range: int | float | None = None
    dropout: int | float = 0.0
    rms_norm_eps: int | float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8_192
    scan_backend: str | None = None
    use_cache: bool = True
    head_dim: int | None = None
    state_expansion: int | None = None
    ternary: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bidirectional: bool = False
    pooling: str = "last"
    num_towers: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_export_format(kwargs.get("export_format"))
        if errors := self.errors():
            raise ValueError(
                "MinRNNConfig: " + "; ".join(f"{name}: {problem}" for name, problem in errors.items())
            )

    def errors(self) -> dict[str, str]:
        """What is wrong with the values, by field; empty if nothing is."""
        errors = {}
        choices = {
            "cell": tuple(CELLS),
            "candidate_activation": CANDIDATE_ACTIVATIONS,
            "scan_backend": (None, *BACKENDS),
            "pooling": POOLINGS,
            "num_towers": (1, 2),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                errors[name] = f"{getattr(self, name)!r} is none of {', '.join(map(str, allowed))}"
        if self.hidden_act not in ACT2FN:
            errors["hidden_act"] = (
                f"{self.hidden_act!r} is no activation of transformers (silu, gelu, relu, ...)"
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "max_position_embeddings",
            "expansion_factor",
        ):
            if getattr(self, name) <= 0:
                errors[name] = f"must be positive, not {getattr(self, name)}"
        for name in ("intermediate_size", "conv_kernel"):
            if getattr(self, name) < 0:
                errors[name] = f"must be 0 (none) or more, not {getattr(self, name)}"
        if not 0.0 <= self.dropout < 1.0:
            errors["dropout"] = f"must be in [0, 1), not {self.dropout}"
        if self.memory_length < 2.0:
            errors["memory_length"] = f"must be at least 2 tokens, not {self.memory_length}"
        if self.initializer_range is not None and self.initializer_range <= 0:
            errors["initializer_range"] = (
                f"must be positive, or null for fan_in ** -0.5, not {self.initializer_range}"
            )
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            errors["logit_softcap"] = f"must be positive, or null for no bound, not {self.logit_softcap}"
        for name in FINITE:
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                errors[name] = f"must be finite, not {getattr(self, name)}"
        if "expansion_factor" not in errors and "hidden_size" not in errors and self.recurrent_size < 1:
            errors["expansion_factor"] = (
                f"times hidden_size must round to at least 1 channel, not {self.recurrent_size}"
            )
        every = self.attention_every
        if every is not None and not 2 <= every <= self.num_hidden_layers:
            errors["attention_every"] = (
                f"must be from 2 to num_hidden_layers ({self.num_hidden_layers}), or null for no attention, "
                f"not {every}"
            )
        if self.attention_window < 2:
            errors["attention_window"] = f"must be at least 2 tokens, not {self.attention_window}"
        if self.num_tokens is not None and not 0 < self.num_tokens <= self.vocab_size:
            errors["num_tokens"] = f"must be from 1 to vocab_size ({self.vocab_size}), not {self.num_tokens}"
        for name in ("head_dim", "state_expansion"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                errors[name] = f"must be at least 1, not {getattr(self, name)}"
        if errors:
            return errors
        return self.errors_of_unread_fields() | CELLS[self.cell].config_errors(self)

    def errors_of_unread_fields(self) -> dict[str, str]:
        """Fields that are set and that the cell does not read, by name."""
        errors = {}
        for name in ("candidate_activation", "head_dim", "state_expansion"):
            cells = [cell for cell, mixer in CELLS.items() if name in mixer.own_fields]
            value = getattr(self, name)
            if self.cell not in cells and value != getattr(MinRNNConfig, name):
                source = " (preset paper sets it)" if PRESETS["paper"].get(name) == value else ""
                errors[name] = f"is for {', '.join(cells)}, and not for {self.cell}: leave it out{source}"
        if self.output_norm and not CELLS[self.cell].takes_output_norm:
            cells = ", ".join(cell for cell, mixer in CELLS.items() if mixer.takes_output_norm)
            errors["output_norm"] = (
                f"is for {cells}; {self.cell} has a norm or a gate of its own: leave it out"
            )
        if self.two_tap_input and not CELLS[self.cell].takes_two_taps:
            cells = ", ".join(cell for cell, mixer in CELLS.items() if mixer.takes_two_taps)
            errors["two_tap_input"] = f"is for {cells}, and not for {self.cell}: leave it out"
        elif self.two_tap_input and self.conv_kernel > 1:
            errors["two_tap_input"] = "takes the place of the convolution: set conv_kernel to 0"
        if self.attention_every is None and self.attention_window != MinRNNConfig.attention_window:
            errors["attention_window"] = "is for models with attention: set attention_every, or leave it out"
        if self.learn_h0 and not CELLS[self.cell].learns_h0:
            cells = ", ".join(cell for cell, mixer in CELLS.items() if mixer.learns_h0)
            errors["learn_h0"] = (
                f"is for cells with a state per channel ({cells}), and not for {self.cell}: leave it out"
            )
        return errors

    @classmethod
    def from_preset(cls, preset: str, **fields: Any) -> "MinRNNConfig":
        """`"default"` or `"paper"`, with `fields` on top."""
        if preset not in PRESETS:
            raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[preset], **fields})

    @property
    def recurrent_size(self) -> int:
        """Channels of the recurrence."""
        return round(self.hidden_size * self.expansion_factor)

    @property
    def num_taps(self) -> int:
        """Tokens that the convolution or the cell's input reads, the own one included."""
        return max(self.conv_kernel, 2 if self.two_tap_input else 1)

    @property
    def state_size(self) -> int:
        """Numbers of the recurrent state in each layer and row, but for those with attention."""
        return CELLS[self.cell].state_size(self)

    def state_shapes(self, batch: int) -> list[tuple[tuple[int, int] | None, tuple[int, int, int] | None]]:
        """Shapes of the state of each layer: recurrent [batch, width] and the last inputs [batch, tokens,
        width]; None for what a layer does not have."""
        shapes = []
        for mixer in mixer_classes(self):
            width, tail = mixer.state_size(self), mixer.tail_shape(self)
            shapes.append(((batch, width) if width else None, (batch, *tail) if tail else None))
        return shapes
