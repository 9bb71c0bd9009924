"""Activation checkpointing: what a block saves for its backward pass.

Bytes per token and layer in bf16 autocast (fp32 residual stream; H hidden_size, R recurrent_size, P
projections, I intermediate_size; with the convolution and a gated MLP):

    none        14 H + 2 P R + 4 R + 6 I     saves the inputs of every operation
    selective    8 H + 2 P R + 4 R + 4 I     saves the results of matrix products and scans, recomputes others
    full         4 H                         saves the block's input, recomputes everything

These numbers are for the fused cells. A composed cell (the signed cells; in fp64, all) also saves the decay
and its operands:

    none        + 18 R, signed minLSTM + 26 R        fp32 a, 1 - a and the candidate; for minLSTM, both gates
    selective    - 2 R                               y is recomputed

`tests/models/test_recompute.py` measures these numbers; `minrnn plan` finds them for every cell, block and
precision by running one block on fake tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

RECOMPUTE = ("none", "selective", "full")

_EXPENSIVE_OPERATORS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def is_expensive(operator: Any) -> bool:
    """Whether "selective" keeps the operator's results: matrix products, scans and attention."""
    is_scan = operator.namespace.startswith("minrnn_") and "_scan" in str(operator)
    return operator in _EXPENSIVE_OPERATORS or is_scan or "_scaled_dot_product" in str(operator)


_keeps_nothing = ContextVar("keeps_nothing", default=False)


@contextmanager
def keep_nothing() -> Iterator[None]:
    """Inside, "selective" keeps no results: those that only the forward pass needs."""
    token = _keeps_nothing.set(True)
    try:
        yield
    finally:
        _keeps_nothing.reset(token)


def _policy(_, operator, *args, **kwargs) -> CheckpointPolicy:
    is_kept = is_expensive(operator) and not _keeps_nothing.get()
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointing_options(recompute: str) -> dict | None:
    """Arguments for transformers' `activation_checkpointing_enable`; None for "none".

    Raises:
        ValueError: `recompute` is none of "none", "selective", "full".
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"There is no recomputation {recompute!r}; choose one of {', '.join(RECOMPUTE)}.")
    if recompute == "none":
        return None
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return options
