"""Ternary projections: what they compute, and their straight-through gradients."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, generator, new_model, random_ids
from torch import Tensor, nn

from minrnn.models import ternary
from minrnn.models.registry import CELLS
from minrnn.models.ternary import LEVELS, TernaryLinear, eight_bit_activations, ternary_weights


def test_weights_have_three_values_and_activations_255():
    weight = torch.randn(40, 30, generator=generator(0))
    levels = (ternary_weights(weight) / weight.abs().mean()).round(decimals=4)
    assert levels.unique().tolist() == [-1, 0, 1]
    x = torch.randn(7, 30, generator=generator(1)) * 100
    rounded = eight_bit_activations(x)
    steps = rounded / (x.abs().amax(-1, keepdim=True) / LEVELS)
    assert_close(steps, steps.round(), atol=1e-6)
    assert (rounded - x).abs().max() <= x.abs().max() / LEVELS / 2 * 1.001


def test_the_layer_is_a_quantized_product_with_the_gradient_of_a_plain_one():
    layer = TernaryLinear(30, 20, 1e-6)
    x = torch.randn(3, 5, 30, generator=generator(1))
    normed = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).requires_grad_()
    scale = layer.weight.abs().mean()
    weight = (layer.weight / scale).round().clamp(-1, 1) * scale
    size = normed.abs().amax(-1, keepdim=True) / 127
    rounded = (normed / size).round() * size
    y = layer(x)
    assert_close(y, rounded @ weight.T, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.square().sum(), layer.weight)
    assert_close(gradient, (2 * y).flatten(0, 1).T @ rounded.flatten(0, 1), atol=1e-5)


def test_a_row_of_zeros_stays_zero():
    assert torch.equal(TernaryLinear(8, 4, 1e-6)(torch.zeros(2, 8)), torch.zeros(2, 4))


@pytest.mark.parametrize("cell", CELLS)
def test_every_projection_of_every_cell_is_ternary(cell, monkeypatch):
    products: list[tuple[Tensor, Tensor]] = []

    def product(x: Tensor, weight: Tensor) -> Tensor:
        products.append((x, weight))
        return F.linear(x, weight)

    monkeypatch.setattr(ternary, "F", SimpleNamespace(linear=product, rms_norm=F.rms_norm))
    model = new_model(cell=cell, ternary=True)
    layers = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert layers
    assert all(isinstance(layer, TernaryLinear) for layer in layers)
    ids = random_ids(2, 12)
    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.abs().max() > 0 for layer in layers)
    assert len(products) == len(layers)
    for x, weight in products:
        levels = x / x.abs().amax(-1, keepdim=True).clamp(min=1e-9) * LEVELS  # a state may be 0
        assert_close(levels, levels.round(), atol=1e-5)
        assert len((weight / weight.abs().max()).round(decimals=4).unique()) == 3
