"""The optimizer's groups and the learning rate."""

import copy
import itertools
import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.pipeline.optim import build_optimizer, decaying_parameters, learning_rate
from minrnn.pipeline.optim_section import OptimSection


@pytest.mark.parametrize("tied", [True, False])
def test_only_output_and_mlp_projections_decay(tied: bool):
    model = MinRNNForCausalLM(
        MinRNNConfig(hidden_size=8, num_hidden_layers=1, intermediate_size=8, tie_word_embeddings=tied)
    )
    optimizer = build_optimizer(model, OptimSection())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {
        names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    expected = {
        f"model.layers.0.{name}.weight" for name in ("mixer.out_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert decaying == expected | (set() if tied else {"lm_head.weight"})
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@given(
    st.sampled_from(["wsd", "cosine", "constant"]),
    st.integers(0, 30),
    st.integers(1, 100),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 100),
)
def test_the_learning_rate_rises_stays_and_falls(
    schedule, warmup: int, steps: int, decay: float, final: float, step: int
):
    config = OptimSection(
        lr=2.0, schedule=schedule, warmup_steps=warmup, decay_fraction=decay, final_lr_fraction=final
    )
    rates = [learning_rate(config, s, steps) for s in range(1, steps + 1)]
    assert all(0 < rate <= 2.0 for rate in rates), "every step is worth its computation, the last one too"
    assert learning_rate(config, steps + 7, steps) == rates[-1]
    peak = rates.index(max(rates))
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(rates[: peak + 1]))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rates[peak:]))


def test_the_schedules_at_known_points():
    wsd = OptimSection(lr=1.0, schedule="wsd", warmup_steps=10, decay_fraction=0.19, final_lr_fraction=0.1)
    rates = [learning_rate(wsd, step, 100) for step in (5, 10, 81, 91, 100)]
    # 20 equal decrements end at 0.1 after the last step.
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.145])
    cosine = OptimSection(lr=1.0, schedule="cosine", warmup_steps=10, final_lr_fraction=0.0)
    assert learning_rate(cosine, 55, 99) == pytest.approx(0.5)
    assert learning_rate(cosine, 99, 99) == pytest.approx(math.sin(math.pi / 180) ** 2)
    assert learning_rate(OptimSection(lr=1.0, schedule="constant", warmup_steps=0), 100, 100) == 1.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
@given(st.integers(0, 10**6), st.floats(0.01, 0.5))
@settings(max_examples=10)
def test_cautious_decay_leaves_alone_what_a_step_moves_from_zero(
    name: Literal["adamw", "muon"], seed: int, decay: float
):
    """Against a step without decay, and one with all of it."""
    torch.manual_seed(seed)
    model = MinRNNForCausalLM(MinRNNConfig(hidden_size=8, num_hidden_layers=1, intermediate_size=8))
    batches = [torch.randint(0, 264, (2, 6)) for _ in range(3)]

    def trained(weight_decay: float, cautious: bool, steps: int) -> dict[str, Any]:
        own = copy.deepcopy(model)
        section = OptimSection(name=name, lr=0.1, weight_decay=weight_decay, cautious_decay=cautious)
        optimizer = build_optimizer(own, section)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for ids in batches[:steps]:
            own(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        decays = {group["weight_decay"] for group in optimizer.param_groups}
        assert decays == {weight_decay, 0.0}
        return dict(own.named_parameters())

    before, free = dict(model.named_parameters()), trained(0.0, False, 1)
    full, cautious = (trained(decay, is_cautious, 1) for is_cautious in (False, True))
    num_kept = 0
    for key, parameter in cautious.items():
        if key not in decaying_parameters(model):
            assert torch.equal(parameter, free[key])
            continue
        towards_zero = (before[key] - free[key]) * before[key] > 0
        expected = torch.where(towards_zero, full[key], free[key])
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)
        num_kept += int((~towards_zero).sum())
    assert num_kept > 0
    two = [trained(decay, is_cautious, 3) for is_cautious in (False, True)]
    assert any(not torch.equal(two[0][key], two[1][key]) for key in before)
