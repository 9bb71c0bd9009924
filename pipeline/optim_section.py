"""The settings `optim.*`."""

from typing import Literal

from pydantic import Field

from .section import Section


class OptimSection(Section):
    """The optimizer, without weight decay on gates, norms, biases, convolutions and embeddings, and the
    learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw: for all parameters. muon: Muon for the matrices of the blocks, AdamW for all others
    (docs/optimizers.md). It cannot change within a run."""
    lr: float = Field(default=4e-3, gt=0)
    """Peak learning rate. Muon's steps are scaled to the size of AdamW's, so the same rate is a start for
    both."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Learning rate after the warmup. wsd: constant, then linear decay over the last `decay_fraction` of
    the steps. cosine: cosine decay. constant: no decay."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warmup."""
    decay_fraction: float = Field(default=0.3, ge=0.0, le=1.0)
    """Fraction of the steps in which wsd decays."""
    final_lr_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate that the schedule decays to, as a fraction of the peak."""
    schedule_steps: int | None = Field(default=None, ge=1)
    """Steps of the schedule; null for train.steps at the start of the run. A resumed run keeps its
    schedule even if train.steps is raised: further steps use the last learning rate. `run.change:
    [optim.schedule_steps]` computes the schedule anew, over train.steps if this is null."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled weight decay of the output and MLP projections."""
    cautious_decay: bool = False
    """Decay only the numbers that the step moves towards 0 (arXiv 2510.12402)."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay rate of the second moment."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the square root of the second moment."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay rate of Muon's momentum (Nesterov's)."""
    clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; null for no clipping."""

    z_loss: float = Field(default=0.0, ge=0.0)
    """Weight of the square of log Z in the training loss, where Z is the softmax's denominator: it keeps the
    logits near 0 (1e-4 in PaLM). The log's training loss contains it, the validation's does not."""

    def errors(self) -> dict[str, str]:
        if self.cautious_decay and self.weight_decay == 0:
            return {"cautious_decay": "has no effect with weight_decay 0: leave it out, or set a decay"}
        if self.name == "muon" or self.momentum == type(self).model_fields["momentum"].default:
            return {}
        return {"momentum": f"is for muon, not for {self.name}; leave it out, or set optim.name to muon"}
