"""Runs with a learnt initial state: they resume, export, and begin from models without it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_helpers import Values, losses, run_that_resumes_to_the_bit
from safetensors.torch import load_file

from minrnn.common.errors import UserError
from minrnn.models import MinRNNForCausalLM

Run = Callable[[Values], Path]


def test_a_run_resumes_and_exports(
    values: Values, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """To the bit; the state has been learnt, and the first step is that of a run without it."""
    values["model"]["learn_h0"] = True
    whole = run_that_resumes_to_the_bit(values, run_recipe, tmp_path, monkeypatch)
    exported = MinRNNForCausalLM.from_pretrained(whole / "model")
    for layer in exported.model.layers:
        assert layer.get_parameter("mixer.h0").all()
    values["run"]["dir"], values["model"]["learn_h0"] = str(tmp_path / "plain"), False
    assert losses(run_recipe(values))[0][1] == pytest.approx(losses(whole)[0][1], rel=1e-5)


def test_a_run_begins_from_an_export_without_it(values: Values, run_recipe: Run, tmp_path: Path):
    values["train"] |= {"steps": 2, "eval_every": None, "save_every": None}
    first = run_recipe(values)
    values["run"]["dir"], values["model"]["init_from"] = str(tmp_path / "second"), str(first / "model")
    values["model"]["learn_h0"] = True
    values["optim"]["lr"] = 1e-12
    second = run_recipe(values)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    assert after.keys() - before.keys() == {f"model.layers.{i}.mixer.h0" for i in range(2)}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    values["run"]["dir"], values["model"]["learn_h0"] = str(tmp_path / "third"), False
    values["model"]["init_from"] = str(second / "model")
    with pytest.raises(UserError, match=r"model\.learn_h0: is False, but .* has True"):
        run_recipe(values)
