"""The section `model` of a recipe: the family, the fields of MinRNNConfig, and what they say together."""

from typing import Any, Literal

from pydantic import Field, field_validator

from ..models import MinRNNConfig
from ..models.configuration_minrnn import PRESETS
from .families.fields import (
    field_errors,
    merged_fields,
    name_error,
    parse_count,
    setting_of,
    size_errors,
    sizes_to_check,
)
from .families.registry import OURS
from .section import Section, expand_home

# Settings of the section `model` that are no fields of MinRNNConfig.
NO_CONFIG_FIELDS = ("family", "family_config", "num_parameters", "sizes", "limits", "preset", "init_from")


def saved_fields(model: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family and the fields of the model's configuration, from the section `model` of a config.yaml."""
    own = {name: value for name, value in model.items() if name not in NO_CONFIG_FIELDS}
    family, sizes = model.get("family", OURS), model.get("sizes", {})
    if family == OURS:
        return family, {**own, **sizes}
    return family, merged_fields(family, own, model.get("family_config", {}), sizes)


class ModelSection(Section):
    """The model: its family, and the fields of MinRNNConfig. The vocabulary and its special tokens come from
    the tokenizer."""

    family: str = OURS
    """minrnn; gru or lstm (torch's); or any model type of a causal language model of transformers (llama,
    mamba2, recurrent_gemma, ...). docs/families.md says what each carries and respects. Of the fields below,
    a family takes those that its own configuration has."""
    family_config: dict[str, Any] = {}
    """Fields of the configuration of another family, e.g. {num_attention_heads: 4} for llama."""
    num_parameters: int | None = Field(default=None, ge=1)
    """Choose the width, and the size of the MLP or of the state, so that the model has this many parameters
    (e.g. 3M), within 2 %. All are counted, embeddings included, and once if the head is tied to them."""
    sizes: dict[str, Any] = {}
    """The fields that num_parameters was resolved to. minrnn writes them to config.yaml, so that a resume
    does not search again; leave it out of a recipe."""
    limits: list[str] = []
    """What the family cannot do in this run. minrnn writes it to config.yaml; leave it out of a recipe."""
    preset: Literal["default", "paper"] = "default"
    """Defaults of the fields below. paper: the block as published. default: minrnn's own."""
    init_from: str | None = None
    """An export (a folder or a hub id) of a language model of the same shape. The run starts from its
    weights; a classifier (lra/NAME) from all but those of its head."""
    _expand = field_validator("init_from")(expand_home)
    _parse = field_validator("num_parameters", mode="before")(parse_count)

    # The fields of MinRNNConfig, in its order and with its descriptions. tests/pipeline/test_recipe.py
    # compares them.
    hidden_size: int = MinRNNConfig.hidden_size
    """Width of the residual stream."""
    num_hidden_layers: int = MinRNNConfig.num_hidden_layers
    """Number of blocks."""
    cell: str = MinRNNConfig.cell
    """Name of the recurrent cell: `"mingru"` or `"minlstm"` with decays in (0, 1), `"mingru_signed"`
    or `"minlstm_signed"` in (-1, 1), or another one: docs/cells.md lists all."""
    expansion_factor: int | float = MinRNNConfig.expansion_factor
    """Recurrent width / hidden_size (the paper's alpha)."""
    candidate_activation: str = MinRNNConfig.candidate_activation
    """Activation of the candidate: `"g"` (x + 0.5 for x >= 0, else sigmoid), `"none"`, `"tanh"` or
    `"silu"`."""
    output_gate: bool = MinRNNConfig.output_gate
    """Multiply the cell's output by silu of one more projection."""
    conv_kernel: int = MinRNNConfig.conv_kernel
    """Width of the causal depthwise convolution before the cell; 0 or 1 for none."""
    intermediate_size: int = MinRNNConfig.intermediate_size
    """Width of the MLP; 0 for none."""
    hidden_act: str = MinRNNConfig.hidden_act
    """Activation of the MLP."""
    gated_mlp: bool = MinRNNConfig.gated_mlp
    """MLP as down(act(gate) * up) (as in Llama) instead of down(act(up))."""
    memory_length: int | float = MinRNNConfig.memory_length
    """Before training, the channels' memory lengths 1 / (1 - a) are spread log-uniformly from 2 to
    this many tokens; 2 starts every gate half open."""
    learn_h0: bool = MinRNNConfig.learn_h0
    """Learn the state before the first token of every document, one for each layer. It starts as 0, the
    state without it. For cells with a state per channel; docs/cells.md lists them."""
    output_norm: bool = MinRNNConfig.output_norm
    """RMS norm of the cell's output before the output gate, over groups of 64 channels (or the
    nearest number that divides the cell's width). Not for gilr_lstm, hgrn2, mlstm and gla."""
    two_tap_input: bool = MinRNNConfig.two_tap_input
    """The cell's input is b_t + lambda b_{t-1}, with a learnt lambda in each channel, 0 before training. In
    place of the convolution (set conv_kernel to 0); for cells that docs/cells.md lists."""
    attention_every: int | None = MinRNNConfig.attention_every
    """Attention over a sliding window instead of the cell in every block whose number, from 1, is a multiple
    of this; `None` for none (docs/cells.md)."""
    attention_window: int = MinRNNConfig.attention_window
    """Tokens that such a block reads, the own one included."""
    residual_scales: bool = MinRNNConfig.residual_scales
    """Each block reads s x + r x0 in place of x: x0 is the embedding, and s and r are learnt
    numbers, 1 and 0 before training."""
    zero_init_residual: bool = MinRNNConfig.zero_init_residual
    """Start the projections into the residual stream at zero: every block then begins as the
    identity."""
    logit_softcap: int | float | None = MinRNNConfig.logit_softcap
    """Bound the logits to softcap tanh(logits / softcap); `None` for no bound."""
    initializer_range: int | float | None = MinRNNConfig.initializer_range
    """Standard deviation of the weights; `None` for fan_in ** -0.5."""
    dropout: int | float = MinRNNConfig.dropout
    """Probability of dropping an element of a block's output, in training."""
    rms_norm_eps: int | float = MinRNNConfig.rms_norm_eps
    """Epsilon of the RMS norms."""
    tie_word_embeddings: bool = MinRNNConfig.tie_word_embeddings
    """Use the embedding as output projection."""
    max_position_embeddings: int = MinRNNConfig.max_position_embeddings
    """The longest input that harnesses should send. The recurrence itself has no limit; harnesses try
    out batches of this length and cut texts to it."""
    scan_backend: str | None = MinRNNConfig.scan_backend
    """Backend of the scan (see `scan.linear_scan`); `None` for the fastest on the device."""
    use_cache: bool = MinRNNConfig.use_cache
    """Return the state, so that the sequence can go on."""
    head_dim: int | None = MinRNNConfig.head_dim
    """Channels of each head, in cells with a matrix state; `None` for 64, or the nearest number
    that divides the recurrent width."""
    state_expansion: int | None = MinRNNConfig.state_expansion
    """Numbers of the state for each channel, in cells whose state is wider than their output (complex
    numbers in `"s4d"`); `None` for the cell's own."""
    ternary: bool = MinRNNConfig.ternary
    """Round the weights of the projections to -1, 0 or 1 times a scale, and their inputs to 8 bits."""
    bidirectional: bool = MinRNNConfig.bidirectional
    """Read each row in both directions, with a mixer for each. For classification only."""
    pooling: str = MinRNNConfig.pooling
    """What a classifier sees of a row: `"last"` (the last token) or `"mean"` (the mean of all)."""

    def user_fields(self) -> dict[str, Any]:
        """The fields of a configuration that the user set in this section."""
        return {
            name: value
            for name, value in self.model_dump(exclude=set(NO_CONFIG_FIELDS)).items()
            if name in self.model_fields_set
        }

    def setting_of(self, field: str | None) -> str:
        """The setting that a field of the configuration comes from; of None, that of a family's fields."""
        return f"model.{setting_of(self.family, self.user_fields(), field)}"

    def errors(self) -> dict[str, str]:
        direct = self.user_fields()
        if self.sizes and self.num_parameters is None:
            return {"sizes": "is what minrnn writes for num_parameters, which is not set; leave it out"}
        sized = (
            {} if self.sizes else size_errors(self.family, self.num_parameters, direct, self.family_config)
        )
        if self.family != OURS:
            errors = field_errors(self.family, direct, self.family_config, self.num_parameters is not None)
            errors |= {} if "family" in errors else sized
            if "preset" in self.model_fields_set and self.preset != "default" and not name_error(self.family):
                errors["preset"] = f"is a form of minrnn's block; {self.family} has none, so leave it out"
            return errors
        sizes = sizes_to_check(OURS, direct, self.num_parameters is not None)
        errors = min((self._value_errors(size) for size in sizes), key=len) | sized
        if self.family_config:
            errors["family_config"] = (
                "is for other families; minrnn's fields are set in the section model itself"
            )
        return errors

    def _value_errors(self, size: dict[str, Any]) -> dict[str, str]:
        """What MinRNNConfig says about the fields, with those of a size where the user set none."""
        config = MinRNNConfig()
        for name, value in {**PRESETS[self.preset], **size, **self.user_fields(), **self.sizes}.items():
            setattr(config, name, value)
        return config.errors()
