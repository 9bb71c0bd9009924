"""fp32 runs and evaluations create no fp64 tensor, because MPS does not support fp64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minrnn.evals.harness.likelihood import read_rows, score_continuations
from minrnn.evals.long_context.positions import _target_nats, token_nats
from minrnn.models import MinRNNConfig, MinRNNForCausalLM


class NoFloat64(TorchDispatchMode):
    """Raises if an operation creates an fp64 tensor, so that the CPU behaves like a device without fp64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{func} makes an fp64 tensor")
        return result


def test_fp64_is_detected():
    with pytest.raises(TypeError, match="fp64"), NoFloat64():
        torch.ones(2).double()


@pytest.mark.parametrize("changes", [{}, {"skip_spikes": 3.0, "recompute": "selective"}])
def test_a_run_creates_no_fp64_tensor(values, run_recipe, changes: dict):
    values["train"] |= {"steps": 4, "eval_every": 2, "save_every": 2, **changes}
    with NoFloat64():
        folder = run_recipe(values)
    assert (folder / "samples.txt").exists(), "samples are written in the same way"


def test_evaluations_create_no_fp64_tensor():
    torch.manual_seed(0)
    model = MinRNNForCausalLM(MinRNNConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=0)).eval()
    tokens = np.arange(80) % 200
    with NoFloat64():
        nats = token_nats(model, tokens, [None, 16], piece=32)
        behind = _target_nats(model, tokens[None, :64], 32)
        scores = score_continuations(model, *read_rows(model, [[1, 2], [3]]), [[4, 5, 6], [7]])
    assert nats.dtype == behind.dtype == np.float64
    assert all(np.isfinite(value) for value, _ in scores)
