"""What a block keeps for its backward pass: nothing, what is dear to compute, or everything.

Bytes per token and layer in bf16 autocast (fp32 residual stream; H hidden_size, R recurrent_size, P
projections, I intermediate_size; with the convolution and a gated MLP):

    none        14 H + 2 P R + 4 R + 6 I     inputs of every operation
    selective    8 H + 2 P R + 4 R + 4 I     results of matrix products and scans; norms, convolution and gates are computed again
    full         4 H                         the block's input; everything is computed again

These are the fused cells. A cell that is composed (the signed ones; in fp64, all) keeps the decay and what it
is computed from, too:

    none        + 18 R, signed minLSTM + 26 R        fp32 a, 1 - a and the candidate; of minLSTM, both gates
    selective    - 2 R                               y is computed again

`tests/models/test_recompute.py` counts them; `minrnn plan` does for every kind of block and precision.
"""

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

RECOMPUTE = ("none", "selective", "full")

_DEAR_ATEN = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def _policy(_, operator, *args, **kwargs) -> CheckpointPolicy:
    is_scan = operator.namespace.startswith("minrnn_") and "_scan_" in str(operator)
    return (
        CheckpointPolicy.MUST_SAVE if operator in _DEAR_ATEN or is_scan else CheckpointPolicy.PREFER_RECOMPUTE
    )


def checkpointing_options(recompute: str) -> dict | None:
    """Arguments for transformers' `activation_checkpointing_enable`; None for "none", which needs no call.

    Raises:
        ValueError: `recompute` is none of "none", "selective", "full".
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"There is no recomputation {recompute!r}; choose one of {', '.join(RECOMPUTE)}.")
    if recompute == "none":
        return None
    options = {"use_reentrant": False}
    return (
        options
        if recompute == "full"
        else options | {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    )
