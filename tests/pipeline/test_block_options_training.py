"""Runs with options of the block: they resume, export, and decay what they should."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_helpers import Values, run_that_resumes_to_the_bit

from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.pipeline.matrices import block_matrices
from minrnn.pipeline.optim import decaying_parameters

Run = Callable[[Values], Path]
OPTIONS = {"output_norm": True, "residual_scales": True, "zero_init_residual": True, "logit_softcap": 15}
ATTENTION = {"attention_every": 2, "attention_window": 20}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_resumes_and_exports(
    values: Values, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
):
    """To the bit; the options have learnt."""
    values["model"] |= {**OPTIONS, **ATTENTION, "cell": "mingru_normalized"}
    values["optim"] |= {"name": optimizer, "z_loss": 1e-3, "cautious_decay": True}
    whole = run_that_resumes_to_the_bit(values, run_recipe, tmp_path, monkeypatch)
    exported = MinRNNForCausalLM.from_pretrained(whole / "model")
    assert exported.config.logit_softcap == 15
    for layer in exported.model.layers:
        assert not torch.equal(layer.get_parameter("residual_scales"), torch.tensor([1.0, 0.0]))
        assert layer.get_parameter("mixer.out_proj.weight").any()


def test_neither_decay_nor_muon_touch_scales_and_norms():
    model = MinRNNForCausalLM(MinRNNConfig(hidden_size=16, intermediate_size=24, **OPTIONS))
    names = {name for name, _ in model.named_parameters() if "scales" in name or "norm" in name}
    assert any("residual_scales" in name for name in names)
    assert any("output_norm" in name for name in names)
    assert not names & decaying_parameters(model)
    assert not names & block_matrices(model).keys()
