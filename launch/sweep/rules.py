"""The rules of a ladder: all settings that follow from a size. One dial, the number of parameters N, sets

    learning rate   0.0047 / 2 (N / 108M)^(-1/3)
    batch           2048 x 160 (N / 108M)^(2/3) tokens, rounded to whole lanes
    warmup          N tokens
    beta2           0.99 for batches below 0.5M tokens, else 0.95
    decay           the last tenth of the steps, linearly to 0 (wsd)
    depth           (N / 49,152)^(1/3) layers: the width is about 64 times the depth, N = 12 depth width^2

The first five are those of OLMo-core's model ladder (allenai/OLMo-core: src/olmo_core/model_ladder), the last
is that of nanochat (karpathy/nanochat). `ladder.rules` in SWEEP.yaml changes their numbers.
"""

from typing import Any

from pydantic import Field

from ...pipeline.section import Section

REFERENCE = 108e6  # parameters for which lr and batch are given
SMALL_BATCH = 500_000  # tokens


class Rules(Section):
    """Numbers of the rules."""

    lr: float = Field(default=0.0047 / 2, gt=0)
    """Learning rate of a model of 108M parameters."""
    lr_exponent: float = -1 / 3
    """Of N in the learning rate."""
    batch_tokens: float = Field(default=2048 * 160, gt=0)
    """Tokens of a step of a model of 108M parameters."""
    batch_exponent: float = 2 / 3
    """Of N in the batch."""
    warmup: float = Field(default=1.0, ge=0)
    """Tokens of warmup per parameter."""
    decay_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the steps in which the learning rate decays."""
    width_per_layer: float | None = Field(default=64.0, gt=0)
    """Width divided by depth; null to keep the recipe's number of layers."""

    def learning_rate(self, size: int) -> float:
        """Peak learning rate of a size."""
        return self.lr * (size / REFERENCE) ** self.lr_exponent

    def lanes(self, size: int, readers: int, chunk: int) -> int:
        """Lanes of each reader, so that a step has about the tokens of the rule; at least 1.

        Args:
            chunk: tokens of a lane in a step.
        """
        tokens = self.batch_tokens * (size / REFERENCE) ** self.batch_exponent
        return max(1, round(tokens / (readers * chunk)))

    def layers(self, size: int) -> int | None:
        """Number of layers; at least 2. None to keep the recipe's."""
        if self.width_per_layer is None:
            return None
        return max(2, round((size / (12 * self.width_per_layer**2)) ** (1 / 3)))

    def settings(self, size: int, readers: int, chunk: int) -> dict[str, Any]:
        """The settings of a size, without those that depend on the budget."""
        lanes = self.lanes(size, readers, chunk)
        tokens = readers * lanes * chunk
        settings = {
            "model.num_parameters": size,
            "batch.lanes": lanes,
            "optim.lr": float(f"{self.learning_rate(size):.6g}"),
            "optim.schedule": "wsd",
            "optim.decay_fraction": self.decay_fraction,
            "optim.final_lr_fraction": 0.0,
            "optim.warmup_steps": max(1, round(self.warmup * size / tokens)),
            "optim.beta2": 0.99 if tokens < SMALL_BATCH else 0.95,
        }
        layers = self.layers(size)
        return settings if layers is None else {**settings, "model.num_hidden_layers": layers}


def decay_start(steps: int, decay_fraction: float) -> int:
    """The last step of the stable stage of a wsd schedule of `steps`, as `optim.learning_rate` decays."""
    return int(steps - decay_fraction * steps)
