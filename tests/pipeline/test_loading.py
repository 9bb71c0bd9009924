"""The dtype that a loaded model computes in."""

import pytest
import torch
from minrnn.data import UserError
from minrnn.pipeline.loading import weights_dtype

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_auto_keeps_what_loses_digits_otherwise(stored: torch.dtype):
    assert weights_dtype(stored, "auto", CPU) == stored


def test_auto_widens_bf16_only_where_that_is_faster(monkeypatch):
    for rates, expected in (({"fp32": 100e9, "bf16": 1e9}, torch.float32), ({"fp32": 100e9, "bf16": 400e9}, torch.bfloat16)):
        monkeypatch.setattr("minrnn.pipeline.loading.measure_rates", lambda *_, rates=rates: rates)
        assert weights_dtype(torch.bfloat16, "auto", CPU) == expected


def test_a_slow_dtype_is_taken_with_a_warning(monkeypatch, capsys):
    monkeypatch.setattr("minrnn.pipeline.loading.measure_rates", lambda *_: {"fp32": 100e9, "bf16": 1e9})
    assert weights_dtype(torch.float32, "bf16", CPU) == torch.bfloat16
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --dtype: matrix products reach 1 GFLOP/s in bf16 here, and 100 GFLOP/s in fp32")


def test_what_cannot_be_is_named():
    with pytest.raises(UserError, match="--dtype: mps does not support fp64, in which the weights are stored; use --dtype fp32"):
        weights_dtype(torch.float64, "auto", MPS)
    with pytest.raises(UserError, match="--dtype: must be auto, fp32, bf16, fp64, not float32"):
        weights_dtype(torch.float32, "float32", CPU)
