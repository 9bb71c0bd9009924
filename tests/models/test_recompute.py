"""Activation checkpointing: saved bytes as documented, and unchanged losses and gradients."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.models.recompute import RECOMPUTE, checkpointing_options

HIDDEN, TOKENS = 64, 1024


def new_model(num_layers: int, recompute: str, **fields) -> MinRNNForCausalLM:
    torch.manual_seed(0)
    fields = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "expansion_factor": 1.5, **fields}
    model = MinRNNForCausalLM(MinRNNConfig(num_hidden_layers=num_layers, vocab_size=16, **fields)).train()
    if (options := checkpointing_options(recompute)) is not None:
        model.activation_checkpointing_enable(options)
    return model


def loss_of(model: MinRNNForCausalLM) -> torch.Tensor:
    ids = torch.arange(2 * TOKENS // 2).view(2, -1) % 16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=ids, shift_labels=ids, skip_logits=True).loss


def saved_bytes(num_layers: int, recompute: str, cell: str) -> int:
    """Bytes that a forward pass allocates and does not free."""
    model = new_model(num_layers, recompute, cell=cell)
    loss_of(model)  # compile what is to be compiled
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = loss_of(model)
    num_bytes = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    loss.backward()
    return num_bytes


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("cell", ["mingru", "mingru_signed", "minlstm_signed"])
def test_bytes_per_token_and_layer_are_as_stated(recompute, cell):
    H, P, R, intermediate = HIDDEN, 4 if "lstm" in cell else 3, 3 * HIDDEN // 2, 2 * HIDDEN
    composed = (
        {"none": 26 * R if "lstm" in cell else 18 * R, "selective": -2 * R, "full": 0}
        if "signed" in cell
        else {}
    )
    stated = {
        "none": 14 * H + 2 * P * R + 4 * R + 6 * intermediate,
        "selective": 8 * H + 2 * P * R + 4 * R + 4 * intermediate,
        "full": 4 * H,
    }
    measured = (saved_bytes(5, recompute, cell) - saved_bytes(2, recompute, cell)) / 3 / TOKENS
    larger, smaller = (
        sum(p.numel() for p in new_model(layers, "none", cell=cell).parameters()) for layers in (3, 2)
    )
    weights = 2 * (larger - smaller)
    if recompute == "none":  # autocast's bf16 copies of the weights are saved too
        measured -= weights / TOKENS
    assert measured == pytest.approx(stated[recompute] + composed.get(recompute, 0), rel=0.03)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute):
    def run(mode):
        model = new_model(2, mode, dropout=0.1)
        torch.manual_seed(1)
        loss = loss_of(model)
        loss.backward()
        return loss.item(), [parameter.grad for parameter in model.parameters()]

    (loss, grads), (other_loss, other_grads) = run("none"), run(recompute)
    assert loss == other_loss
    for grad, other in zip(grads, other_grads, strict=True):
        assert grad is not None
        assert other is not None
        assert torch.equal(grad, other)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="no recomputation 'some'; choose one of none, selective, full"):
        checkpointing_options("some")
