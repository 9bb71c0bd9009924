"""Decays of all cells: as they start, close to 1 over thousands of tokens, and with weights in bf16."""

import math
from typing import Any

import pytest
import torch
from helpers import assert_close, generator, logits_of, new_model, random_ids
from naive_cells import UNSCALED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minrnn.models import MinRNNConfig, MinRNNModel
from minrnn.models.boundaries import NO_BOUNDARIES
from minrnn.models.registry import CELLS

CHANNELS = 96
cells = pytest.mark.parametrize("name", CELLS)


def decays_at_zero_input(name: str, mixer: Any, bound: Tensor | None) -> Tensor:
    """What one token whose projections are 0 leaves of a state of ones; of complex numbers, the size."""
    config = MinRNNConfig(cell=name, hidden_size=64, **sizes(name))
    ones = torch.ones(1, config.state_size, dtype=torch.float64)
    if name in UNSCALED:  # sums divided by exp(m), and m
        ones[:, -(config.state_size - mixer.matrix_size if name == "mlstm" else CHANNELS) :] = 0
    if name == "gilr_lstm":  # its second scan reads the first one's state
        ones[:, :CHANNELS] = 0
    results, bounds = [], () if bound is None else (bound,)
    for state in (ones, torch.zeros_like(ones)):
        projected = torch.zeros(1, 1, sum(mixer.widths), dtype=torch.float64)
        _, last = mixer.recur(projected, state, NO_BOUNDARIES, *bounds)
        results.append(UNSCALED[name](mixer, last) if name in UNSCALED else last)
    a = (results[0] - results[1])[0]
    if name in ("lru", "s4d"):
        return torch.complex(*a.chunk(2)).abs() / math.sqrt(2)
    return a[CHANNELS:] if name == "gilr_lstm" else a


def mixer_of(block: torch.nn.Module) -> Any:
    return block.get_submodule("mixer")


def sizes(name: str) -> dict[str, Any]:
    """Many heads, as some cells have one decay for each."""
    return {"head_dim": 2} if "head_dim" in CELLS[name].own_fields else {}


@pytest.mark.parametrize("name", [name for name in CELLS if name != "linear_attention"])
@pytest.mark.parametrize("longest", [2.0, 64.0, 4096.0])
def test_memory_lengths_start_log_uniform_from_2_to_memory_length(name, longest):
    """1 / (1 - a) at zero input: the median is sqrt(2 memory_length). A lower bound may allow no less."""
    torch.manual_seed(0)
    fields = {**sizes(name), "num_hidden_layers": 4, "intermediate_size": 0, "memory_length": longest}
    model = MinRNNModel(MinRNNConfig(cell=name, hidden_size=64, **fields))
    torch.nn.Module.to(model, torch.float64)
    model.requires_grad_(False)
    for layer, bound in zip(model.layers, model.layer_bounds(), strict=True):
        a = decays_at_zero_input(name, mixer_of(layer), bound)
        octaves = torch.log2(1 / (1 - a)).sort().values
        shortest = 1.0 if bound is None else max(1.0, math.log2(1.02 / (1 - bound[0])))
        uniform = torch.linspace(1, math.log2(longest), len(octaves), dtype=torch.float64).clamp(min=shortest)
        assert octaves[0] >= shortest - 1e-5
        assert octaves[-1] <= uniform[-1] + 1e-4
        # Kolmogorov-Smirnov: 0.2 is p = 0.05 of 1e-2 layers.
        assert (octaves - uniform).abs().max() <= 0.25 * (math.log2(longest) - 1) + 1e-5


@pytest.mark.parametrize("name", ["rwkv4", "mlstm"])
def test_slow_decays_with_large_exponents(name):
    """Near 30, fp32 rounds the stabilizer to multiples of 2e-6, but not the decay, here exp(-1e-5)."""
    mixer = mixer_of(new_model(cell=name, output_gate=False).model.layers[0])
    time = 20_000
    projected = torch.randn(1, time, sum(mixer.widths), generator=generator(0)).abs()  # no sum is near 0
    keys = projected[..., :24] if name == "rwkv4" else projected[..., -6:-3]
    keys += 24
    keys[:, 0] = 30  # the largest, so that all later maxima are the first one's
    results = []
    with torch.no_grad():
        if name == "rwkv4":
            mixer.get_parameter("decay").fill_(math.log(1e-5))
        else:
            projected[..., -3:] = 0
            mixer.get_parameter("gate_bias").copy_(torch.tensor([[0.0], [-math.log(1e-5)]]).expand(2, 3))
        for dtype in (torch.float32, torch.float64):
            torch.nn.Module.to(mixer, dtype)
            y, last = mixer.recur(projected.to(dtype), None, NO_BOUNDARIES)
            results.append((y, UNSCALED[name](mixer, last.double()) * math.exp(-30)))
    (y, last), (exact_y, exact_last) = results
    assert_close(y, exact_y, atol=1e-5, name="y")
    assert_close(last, exact_last, atol=time * 2**-25, name="state")  # each decay is rounded once


def test_rglru_scales_inputs_exactly_for_every_memory_length():
    """By sqrt(1 - a^2), also where a rounds to 1. Where 1 - a^2 rounds to 0, gradients are finite."""
    mixer = mixer_of(new_model(cell="rglru", output_gate=False).model.layers[0])
    memory = torch.logspace(0.5, 11, 24, dtype=torch.float64)
    with torch.no_grad():
        mixer.init_parameters(memory)
        mixer.get_parameter("gate_bias").zero_()
    state = torch.full((1, 24), 1e-30)  # a state of zeros would be none
    projected = torch.zeros(1, 1, 72).index_fill_(2, torch.arange(48, 72), 1)
    _, last = mixer.recur(projected, state, NO_BOUNDARIES)
    assert_close(last[0], 0.5 * (-torch.expm1(2 * torch.log1p(-1 / memory))).sqrt(), atol=0, rtol=1e-5)
    saturated = projected.index_fill(2, torch.arange(24), -200).requires_grad_()
    y, last = mixer.recur(saturated, state, NO_BOUNDARIES)
    (y.sum() + last.sum()).backward()
    assert saturated.grad is not None
    gradients = [saturated.grad, *(parameter.grad for parameter in mixer.parameters())]
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@cells
def test_weights_in_bf16_over_thousands_of_tokens(name):
    """Tokens differ from fp32 by 1 % in the median, and no more at the end than at the beginning."""
    model, ids = new_model(cell=name, dtype=torch.bfloat16, memory_length=2048.0), random_ids(1, 4096)
    actual = logits_of(model, ids).float()
    torch.nn.Module.to(model, torch.float32)
    expected = logits_of(model, ids)
    difference = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert difference.isfinite().all()
    first, *_, last = (part.median() for part in difference.chunk(4, dim=1))
    assert first <= 0.015
    assert last <= 1.2 * first


class DtypeRecorder(TorchDispatchMode):
    """Records the dtypes of all results."""

    def __init__(self):
        super().__init__()
        self.dtypes: dict[torch.dtype, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.dtypes |= {x.dtype: str(func) for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result


@cells
def test_an_fp32_model_needs_no_fp64(name):
    """Some devices have none (MPS). A loss that reads a state, documents and padding, and its gradients."""
    model, ids = new_model(cell=name, scan_backend="torch").train(), random_ids(2, 12)
    mask, starts = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    mask[0, :3], starts[:, 5] = 0, True
    with DtypeRecorder() as recorder:
        state = model(ids, use_cache=True).past_key_values
        output = model(
            ids,
            attention_mask=mask,
            document_starts=starts,
            labels=ids.masked_fill(mask == 0, -100),
            past_key_values=state,
        )
        output.loss.backward()
    assert torch.float32 in recorder.dtypes
    assert torch.float64 not in recorder.dtypes, recorder.dtypes[torch.float64]
