"""The matrices of a model that Muon updates, each with the projections that it consists of."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

Widths = tuple[int, ...]
"""Rows of the projections of a matrix, from the top. Each is orthogonalised by itself."""


def block_matrices(model: Any) -> dict[str, Widths]:
    """The matrices of the blocks by the names of their parameters, in the model's order.

    In minrnn these are the weights of all linear layers of the blocks. In other families they are the weights
    of all linear layers but the head; parameters of three dimensions, such as stacked experts, are not among
    them. The gates of torch's LSTM and GRU are projections of their own; other families do not say what their
    fused layers consist of, so each is one matrix.
    """
    widths = {id(weight): parts for weight, parts in _matrices(model)}
    return {name: widths[id(p)] for name, p in model.named_parameters() if id(p) in widths}


def _matrices(model: Any) -> Iterator[tuple[nn.Parameter, Widths]]:
    is_ours = model.config.model_type == "minrnn"
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer |= {id(parameter) for parameter in _head_parameters(model)}
    module: Any
    for module in (model.model.layers if is_ours else model).modules():
        if isinstance(module, nn.LSTM | nn.GRU):
            weights = (
                p for name, p in module.named_parameters() if name.startswith(("weight_ih", "weight_hh"))
            )
            yield from (
                (weight, (module.hidden_size,) * (len(weight) // module.hidden_size)) for weight in weights
            )
        elif isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in outer:
            weight: Any = module.weight
            if weight.ndim == 2:
                yield weight, getattr(module, "widths", (len(weight),))


def _head_parameters(model: Any) -> Iterator[nn.Parameter]:
    head = getattr(model, "inner", model).get_output_embeddings()
    return head.parameters() if isinstance(head, nn.Module) else iter(())
