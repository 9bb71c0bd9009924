"""Shared by the tests of models/: tiny models, comparisons, logits in chunks."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minrnn.models import MinRNNCache, MinRNNConfig, MinRNNForCausalLM, backprop_through_chunks
from minrnn.models.recompute import checkpointing_options
from minrnn.models.registry import CELLS

VOCAB = 40


def assert_close(value: Tensor, expected: Tensor, *, atol: float, rtol: float = 0.0, name: str = "") -> None:
    """|value - expected| <= atol * max|expected| + rtol * |expected|, elementwise; NaN is never close."""
    assert value.shape == expected.shape, f"{name}: {tuple(value.shape)} instead of {tuple(expected.shape)}"
    if not expected.numel():
        return
    value, expected = value.detach().double(), expected.detach().double()
    assert not value.isnan().any(), f"{name}: NaN"
    assert expected.isfinite().all(), f"{name}: the expected value is not finite"
    excess = (value - expected).abs() - rtol * expected.abs() - atol * expected.abs().max()
    assert excess.max() <= 0, (
        f"{name}: off by {(value - expected).abs().max():.3g} where the largest is {expected.abs().max():.3g}"
    )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_ids(batch: int, time: int, seed: int = 0) -> Tensor:
    """Tokens [batch, time], none of them pad (0), bos (1) or eos (2)."""
    return torch.randint(3, VOCAB, (batch, time), generator=generator(seed))


def new_model(
    preset: str = "default", dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any
) -> MinRNNForCausalLM:
    """A tiny model in eval mode.

    Gains and biases differ from their initial values, so that each has an effect.
    """
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "pad_token_id": 0,
    }
    if "head_dim" in CELLS[fields.get("cell", "mingru")].own_fields:
        sizes["head_dim"] = 8  # three heads
    model = MinRNNForCausalLM(MinRNNConfig.from_preset(preset, **{**sizes, **fields})).eval()
    torch.nn.Module.to(model, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "proj" not in name and "embed" not in name and "lm_head" not in name and "conv" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # the cell's own: biases, decays, ...
    return model


@functools.cache
def shared_model(
    preset: str = "default", dtype: torch.dtype = torch.float32, **fields: Any
) -> MinRNNForCausalLM:
    """As `new_model`, one for all tests that do not change it."""
    return new_model(preset, dtype, **fields)


def logits_of(model: MinRNNForCausalLM, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        logits = model(ids, **kwargs).logits
    assert logits is not None
    return logits


def generate(model: Any, ids: Tensor, num_tokens: int = 10, **options: Any) -> Tensor:
    """The text and its continuation, greedy by default. (Pyright rejects models as GenerationMixin.)"""
    return model.generate(ids, max_new_tokens=num_tokens, **{"do_sample": False, **options})


def generate_with_state(
    model: Any, ids: Tensor, num_tokens: int, **options: Any
) -> tuple[Tensor, MinRNNCache]:
    """As `generate`, and the state after it."""
    output: Any = generate(model, ids, num_tokens, return_dict_in_generate=True, **options)
    return output["sequences"], output["past_key_values"]


def chunked_logits(
    model: MinRNNForCausalLM, ids: Tensor, cuts: list[int], whole_mask: bool = False, **per_token: Tensor
) -> tuple[Tensor, MinRNNCache]:
    """Logits of a sequence cut before each of `cuts`, state handed over, and the state after it.

    Args:
        per_token: tensors [batch, time] that are cut along.
        whole_mask: pass attention_mask from the beginning to the end of the chunk, as generate() does.
    """
    cache, pieces, edges = MinRNNCache(model.config.num_hidden_layers), [], [0, *cuts, ids.shape[1]]
    for low, high in itertools.pairwise(edges):
        cut = {name: tensor[:, low:high] for name, tensor in per_token.items()}
        if whole_mask and "attention_mask" in per_token:
            cut["attention_mask"] = per_token["attention_mask"][:, :high]
        with torch.no_grad():
            output = model(ids[:, low:high], past_key_values=cache, use_cache=True, **cut)
        assert output.past_key_values is cache
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1), cache


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of each parameter, by name; the parameters' own .grad stay None."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient to compare"
        assert_close(actual[name], gradient, atol=atol, name=name)


def assert_gradients_through_chunks(
    model: MinRNNForCausalLM, inputs: dict[str, Tensor], length: int, recomputations: Sequence[str]
) -> dict[str, Tensor]:
    """`backprop_through_chunks` gives the gradients of one pass, fp64, with every recomputation.

    Args:
        model: in training mode.
        inputs: of the whole text, [batch, time] each.
        length: tokens of a chunk.

    Returns:
        The gradients of all parameters.
    """
    expected = gradients(model, model(**inputs, skip_logits=True).loss)
    for recompute in recomputations:
        if (options := checkpointing_options(recompute)) is not None:
            model.activation_checkpointing_enable(options)
        parts = zip(*(tensor.split(length, 1) for tensor in inputs.values()), strict=True)
        backprop_through_chunks(model, [dict(zip(inputs, part, strict=True)) for part in parts])
        actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same_gradients(actual, expected, atol=1e-10)
        model.zero_grad()
    return expected


def run_and_differentiate(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """function(*leaves) and its gradients for each leaf; leaves keep their strides."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)
