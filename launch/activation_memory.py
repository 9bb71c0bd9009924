"""Bytes that a block keeps for its backward pass, found by running one on fake tensors.

A fake tensor has a shape and a dtype but no memory. The forward pass runs as in training, and every tensor
that autograd saves is counted once, except parameters and what is computed from them alone (such as their
copies in the precision of the matrix products). So the numbers hold for every cell, block and precision.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models import MinRNNConfig

TOKENS = 1024  # of the fake chunk, without attention: what does not grow with it is negligible


def block_bytes(
    config: "MinRNNConfig", precision: str, layer: int = 0, tokens: int = TOKENS
) -> dict[str, float]:
    """Bytes per token that a block keeps, by `train.recompute`.

    Args:
        precision: fp32, bf16 (autocast over an fp32 residual stream) or fp64.
        layer: index of the block, since blocks may have different mixers.
        tokens: of the chunk, on which the bytes per token of a block with attention depend.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..models.block import MinRNNBlock
    from ..models.boundaries import Boundaries
    from ..models.dtypes import DTYPES
    from ..models.registry import CELLS

    results, weights = Storages(), Storages()
    saved: list[weakref.ref[Saved]] = []
    config = copy.copy(config)
    config.scan_backend = None  # the recipe's may not run on this machine
    dtype = DTYPES["fp64" if precision == "fp64" else "fp32"]
    with FakeTensorMode(), default_dtype(dtype):
        block = MinRNNBlock(config, layer)
        for parameter in block.parameters():
            weights.add(parameter)
        x = torch.empty(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        # With a learnt initial state, a chunk in which a document starts keeps more.
        starts = torch.zeros(1, tokens, dtype=torch.bool) if config.learn_h0 else None
        boundaries = Boundaries.of(starts, None, config.num_taps)
        size = CELLS[config.cell].lower_bound_size(config)
        bound = torch.empty(size, dtype=dtype) if size else None
        x0 = torch.empty_like(x, requires_grad=True) if config.residual_scales else None
        if x0 is not None:
            weights.add(x0)  # one tensor for all blocks
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: remember(tensor, saved), lambda saved: saved.tensor
        )
        with autocast, hooks, recorder(results, weights):
            output = block(x, None, None, boundaries, bound, x0)  # keeps its graph, and so what is saved
        kept = Storages()
        for reference in saved:
            if (entry := reference()) is not None and entry.tensor not in weights:
                kept.add(entry.tensor)
        del output
    own = x.numel() * x.element_size()
    return {
        "none": sum(kept.sizes.values()) / tokens,
        "selective": (own + sum(results.sizes.values())) / tokens,
        "full": own / tokens,
    }


def recorder(results: "Storages", weights: "Storages") -> Any:
    """A context that records in `results` what selective recomputation keeps.

    What is computed from `weights` alone is added to them.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from ..models.recompute import is_expensive

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            tensors = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
            if tensors and all(tensor in weights for tensor in tensors) and isinstance(result, torch.Tensor):
                weights.add(result)
            if is_expensive(function):
                for tensor in result if isinstance(result, tuple) else (result,):
                    results.add(tensor)
            return result

    return Recorder()


@contextmanager
def default_dtype(dtype: Any) -> Iterator[None]:
    """Parameters are created in this dtype (fake tensors cannot be converted in place)."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(eq=False)
class Saved:
    """A tensor that autograd saves; it lives as long as the graph that saved it."""

    tensor: Any


def remember(tensor: Any, saved: "list[weakref.ref[Saved]]") -> Saved:
    """What autograd saves in place of a tensor, listed in `saved`."""
    entry = Saved(tensor)
    saved.append(weakref.ref(entry))
    return entry


class Storages:
    """Sizes in bytes of the memory of tensors, each counted once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._tensors: list[Any] = []  # kept, so that no address is used twice

    def add(self, tensor: Any) -> Any:
        """Count a tensor's memory; returns the tensor."""
        storage = tensor.untyped_storage()
        self._tensors.append(tensor)
        self.sizes[storage._cdata] = storage.nbytes()
        return tensor

    def __contains__(self, tensor: Any) -> bool:
        return tensor.untyped_storage()._cdata in self.sizes
