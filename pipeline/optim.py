"""AdamW and its learning rate."""

import math

import torch
from torch import nn

from .config import OptimSection

# Decay pulls towards zero: a gate to half open, a norm to silence, an embedding to nothing while its token is
# rare.
WITHOUT_DECAY = ("embed_tokens", "in_proj", "gate_bias", "conv_weight", "norm")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices that are neither gates, norms, biases, convolutions nor
    embeddings."""
    return parameter.ndim >= 2 and not any(part in name for part in WITHOUT_DECAY)


def build_optimizer(model: nn.Module, config: OptimSection) -> torch.optim.AdamW:
    """AdamW over two groups, with and without decay. The learning rate is set before each step
    (`learning_rate`)."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: OptimSection, step: int, num_steps: int) -> float:
    """Learning rate of step 1, 2, ... of a schedule of `num_steps`; later steps have that of the last.

    All schedules rise linearly over `warmup_steps`. `wsd` (warmup, stable, decay: Hu et al., arXiv
    2404.06395) falls linearly over its last part, `cosine` from the end of the warmup on. Both would reach
    `final_lr_fraction` one step after the last: a step at a rate of 0 would be computed for nothing.
    """
    step = min(step, num_steps)
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    progress = 0.0  # of the fall
    if config.schedule == "wsd":
        length = config.decay_fraction * num_steps
        progress = max(0.0, (step - (num_steps - length)) / (length + 1))
    elif config.schedule == "cosine":
        length = max(num_steps - config.warmup_steps, 0)
        progress = 0.5 - 0.5 * math.cos(math.pi * max(step - config.warmup_steps, 0) / (length + 1))
    return config.lr * min(warmup, 1.0 - (1.0 - config.final_lr_fraction) * progress)
