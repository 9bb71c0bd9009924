"""Memory lengths of many chunks, in bf16: a decay of 1 - 1e-5 is computed as such."""

import math
from typing import Any

import pytest
import torch
from helpers import generator, new_model

from minrnn.models.boundaries import NO_BOUNDARIES
from minrnn.models.registry import CELLS

TOKENS = 256
NO_DECAY = ("linear_attention",)
WITH_A_MAXIMUM = ("rwkv4", "mlstm")
"""Their state holds the logarithm of its scale."""
OF_TWO_SCANS = ("gilr_lstm",)


def remembered(cell: str, memory: float) -> torch.Tensor:
    """The state after TOKENS tokens of input 0, as a fraction of a state of ones before them, fp64."""
    model = new_model(cell=cell, num_hidden_layers=1).train()
    mixer: Any = model.model.layers[0].mixer
    mixer.init_parameters(torch.full((model.config.recurrent_size,), memory))
    projected = torch.zeros(1, TOKENS, sum(mixer.widths), dtype=torch.bfloat16)
    bounds = [bound for bound in model.model.layer_bounds() if bound is not None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, state = mixer.recur(projected, torch.ones(1, model.config.state_size), NO_BOUNDARIES, *bounds)
    return absolute(cell, state) / (2**0.5 if cell in ("lru", "s4d") else 1)  # 1 + i before


def absolute(cell: str, state: torch.Tensor) -> torch.Tensor:
    """Absolute values in fp64, of complex numbers where the state is."""
    state = state.double()
    if cell in ("lru", "s4d"):
        real, imaginary = state.chunk(2, dim=-1)
        return (real**2 + imaginary**2).sqrt()
    return state.abs()


@pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if cell not in (*NO_DECAY, *WITH_A_MAXIMUM, *OF_TWO_SCANS)]
)
@pytest.mark.parametrize(("memory", "tolerance"), [(1e4, 0.002), (1e5, 0.01)])
def test_decays_near_one_keep_their_digits_in_bf16(cell: str, memory: float, tolerance: float):
    """-log of what is remembered is TOKENS / memory. fp32 resolves decays near 1 to 6e-8, so 1 - a to 0.6 %
    for 1e5 tokens; in bf16 the decay would be 1 for every memory above 256."""
    rates = -remembered(cell, memory).log() / TOKENS * memory
    torch.testing.assert_close(rates, torch.ones_like(rates), rtol=0, atol=tolerance)


@pytest.mark.parametrize("cell", ["mingru", "minlstm", "hgrn", "qrnn", "rglru", "lru"])
def test_an_impulse_is_remembered_over_1e5_tokens_in_bf16(cell: str):
    """Autocast keeps what fp32 keeps of the first token, 1/e of it, to a few percent."""
    model = new_model(cell=cell, num_hidden_layers=1).train()
    mixer: Any = model.model.layers[0].mixer
    mixer.init_parameters(torch.full((model.config.recurrent_size,), 1e5))
    bounds = [torch.zeros_like(bound) for bound in model.model.layer_bounds() if bound is not None]
    impulse = torch.randn(1, 1, sum(mixer.widths), generator=generator(1))
    nothing = torch.zeros(1, 10_000, sum(mixer.widths))
    first, last = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            _, state = mixer.recur(impulse.to(dtype), None, NO_BOUNDARIES, *bounds)
            first[dtype] = absolute(cell, state)
            for _ in range(10):
                _, state = mixer.recur(nothing.to(dtype), state, NO_BOUNDARIES, *bounds)
            last[dtype] = absolute(cell, state)
    exact, rounded = last.values()
    assert (exact > 0).all()
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0)
    torch.testing.assert_close(
        rounded / first[torch.bfloat16], exact / first[torch.float32], rtol=0.01, atol=0
    )
    torch.testing.assert_close(
        exact / first[torch.float32], torch.full_like(exact, 1 / math.e), rtol=0.02, atol=0
    )


def test_initial_memory_lengths_reach_beyond_a_chunk():
    """Log-uniform from 2 to model.memory_length, whatever it is."""
    model = new_model(memory_length=1e5, hidden_size=512, num_hidden_layers=1)
    fresh = type(model)(model.config)
    bias = fresh.model.get_parameter("layers.0.mixer.gate_bias")[0].double()
    memory = (-bias).exp() + 1  # 1 - a = sigmoid(bias) = 1 / memory
    assert 2 <= memory.min() < 4
    assert 8e4 < memory.max() <= 1.0001e5
    assert memory.log().median().exp().item() == pytest.approx((2 * 1e5) ** 0.5, rel=0.3)
