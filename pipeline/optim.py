"""The optimizer and the learning rate."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..models.dtypes import DTYPES
from .adamw import AdamW
from .matrices import Widths, block_matrices
from .muon import Muon
from .optim_section import OptimSection

# Decay to zero would half-open a gate, silence a norm, and erase the embedding of a rare token.
WITHOUT_DECAY = ("embed_tokens", "in_proj", "decay_proj", "norm")

WITHOUT_DECAY_ELSEWHERE = ("bias", "norm", "A_log")  # in other families


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter of minrnn: only to the matrices of linear layers."""
    is_matrix = parameter.ndim == 2 and name.endswith(".weight")
    return is_matrix and not any(part in name for part in WITHOUT_DECAY)


def decaying_parameters(model: Any) -> set[str]:
    """Names of the parameters to which weight decay applies.

    In other families these are all matrices but embeddings, biases, norms and Mamba's decays.
    """
    named = list(model.named_parameters())
    if model.config.model_type == "minrnn":
        return {name for name, parameter in named if has_decay(name, parameter)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in named
        if sum(size > 1 for size in parameter.shape) >= 2
        and id(parameter) not in embeddings
        and not any(part in name for part in WITHOUT_DECAY_ELSEWHERE)
    }


def build_optimizer(model: nn.Module, config: OptimSection, precision: str = "fp32") -> torch.optim.AdamW:
    """AdamW with two groups, with and without decay; or Muon, which has such groups for its matrices too. The
    loop sets the learning rate before each step (`learning_rate`).

    Args:
        precision: of the run, which Muon's products have.

    Raises:
        UserError: there is no matrix for Muon.
    """
    named, decaying = list(model.named_parameters()), decaying_parameters(model)
    adamw: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,
    }
    matrices = block_matrices(model) if config.name == "muon" else {}
    groups: list[dict[str, Any]] = []
    for is_muon in (True, False):
        of_kind = [(name, parameter) for name, parameter in named if (name in matrices) == is_muon]
        for weight_decay, decays in ((config.weight_decay, True), (0.0, False)):
            parameters = [parameter for name, parameter in of_kind if (name in decaying) == decays]
            if parameters:
                group = {"params": parameters, "weight_decay": weight_decay, "is_muon": is_muon}
                groups.append({**group, "is_cautious": config.cautious_decay})
    if config.name == "adamw":
        # DeepSpeed knows torch's own class.
        return (AdamW if config.cautious_decay else torch.optim.AdamW)(groups, **adamw)
    if not matrices:
        message = "muon finds no matrix in this model's blocks that it can update; use adamw"
        raise UserError("optim.name", message)
    widths: dict[Tensor, Widths] = {
        parameter: matrices[name] for name, parameter in named if name in matrices
    }
    return Muon(groups, widths, config.momentum, DTYPES[precision], **adamw)


def learning_rate(config: OptimSection, step: int, num_steps: int) -> float:
    """The learning rate of a step, counted from 1, in a schedule of `num_steps`. Later steps have the last
    step's rate.

    All schedules rise linearly over `warmup_steps`. `wsd` (warmup, stable, decay: Hu et al., arXiv
    2404.06395) falls linearly over its last part, `cosine` from the end of the warmup. Both would reach
    `final_lr_fraction` one step after the last, so no step has a rate of 0.
    """
    step = min(step, num_steps)
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    progress = 0.0  # of the decay
    if config.schedule == "wsd":
        length = config.decay_fraction * num_steps
        progress = max(0.0, (step - (num_steps - length)) / (length + 1))
    elif config.schedule == "cosine":
        length = max(num_steps - config.warmup_steps, 0)
        progress = 0.5 - 0.5 * math.cos(math.pi * max(step - config.warmup_steps, 0) / (length + 1))
    return config.lr * min(warmup, 1.0 - (1.0 - config.final_lr_fraction) * progress)
