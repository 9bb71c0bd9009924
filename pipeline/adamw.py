"""AdamW whose weight decay can be cautious: it leaves alone the numbers that a step moves away from 0.

    p <- p - lr u - lr decay p [u p > 0]                     u: the step of AdamW or Muon without decay

Source: Chen et al., "Cautious Weight Decay", arXiv 2510.12402.
"""

from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """torch's AdamW; in groups with `is_cautious`, decay follows the update's sign."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step from the gradients."""
        assert closure is None
        cautious = [group for group in self.param_groups if is_cautious(group)]
        decays = [group["weight_decay"] for group in cautious]
        before = [[(p, p.clone()) for p in group["params"] if p.grad is not None] for group in cautious]
        for group in cautious:
            group["weight_decay"] = 0.0
        try:
            super().step()
        finally:
            for group, decay in zip(cautious, decays, strict=True):
                group["weight_decay"] = decay
        for group, pairs in zip(cautious, before, strict=True):
            for parameter, old in pairs:
                parameter.sub_(cautious_decay(old, old - parameter, group))


def is_cautious(group: dict[str, Any]) -> bool:
    """Whether a group has decay, and a cautious one."""
    return bool(group.get("is_cautious")) and group["weight_decay"] > 0


def cautious_decay(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
    """What decay subtracts from a parameter, of which a positive multiple of `update` is subtracted too."""
    return parameter * (update * parameter > 0) * (group["lr"] * group["weight_decay"])
