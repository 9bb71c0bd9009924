"""Devices, precisions and threads, tested as functions of what the machine reports."""

import subprocess
import sys

import pytest
import torch

from minrnn.common.errors import UserError
from minrnn.pipeline import machine, processes
from minrnn.pipeline.launch_checks import check_launch
from minrnn.pipeline.recipe import build_recipe

WITH_UNITS = {"fp32": 171e9, "bf16": 628e9, "fp64": 80e9}
WITHOUT_UNITS = {"fp32": 105e9, "bf16": 0.9e9, "fp64": 50e9}
NO_BF16 = {"fp32": 14e12, "fp64": 7e12}


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (WITH_UNITS, "bf16"),
        (WITHOUT_UNITS, "fp32"),
        (NO_BF16, "fp32"),
        ({"fp32": 100e9, "bf16": 110e9}, "fp32"),  # too close for fewer digits
        ({"fp32": 1e9, "bf16": 1e9, "fp64": 9e9}, "fp32"),  # fp64 is never chosen
    ],
)
def test_auto_takes_the_faster_or_the_saved_precision(rates: dict[str, float], expected: str):
    choice = machine.choose_precision("auto", None, rates, "cpu")
    assert (choice.precision, choice.warning) == (expected, "")
    assert "chosen" in choice.reason
    for saved in rates:
        assert machine.choose_precision("auto", saved, rates, "cpu").precision == saved


def test_a_slow_precision_is_used_with_a_warning():
    for saved, requested in ((None, "bf16"), ("bf16", "auto")):
        choice = machine.choose_precision(requested, saved, WITHOUT_UNITS, "cpu")
        assert choice.precision == "bf16"
        assert "0.9 GFLOP/s in bf16 here, and 105 GFLOP/s in fp32, 117 times as much" in choice.warning
        assert "\n" not in choice.warning
    assert machine.choose_precision("fp32", None, WITH_UNITS, "cpu").warning  # 3.7 times
    assert not machine.choose_precision("fp64", None, WITHOUT_UNITS, "cpu").warning  # 2.1 times


@pytest.mark.parametrize(("requested", "saved"), [("bf16", None), ("auto", "bf16")])
def test_unsupported_precisions_are_refused(requested: str, saved: str | None):
    with pytest.raises(UserError, match=r"train\.precision: cuda \(Tesla V100\) does not support bf16"):
        machine.choose_precision(requested, saved, NO_BF16, "cuda (Tesla V100)")


def test_a_cpu_without_bf16_units_is_measured_quickly():
    """In another process, because the limit is read once. A product of size 1024 would take seconds there."""
    script = (
        "import torch; from minrnn.pipeline import machine; cpu = torch.device('cpu');"
        "rates = machine.measure_rates(cpu, ('fp32', 'bf16'));"
        "print(machine._size_to_measure(cpu, torch.bfloat16)[0], machine.choose_precision('auto', None, "
        "rates, 'cpu').precision)"
    )
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    size, precision = done.stdout.split()
    assert int(size) < 1024
    assert precision == "fp32"


# --- Devices. Stand-ins for torch's accelerators, since a test cannot have any.


def has_accelerator(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int = 1) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda *_, **__: kind and torch.device(kind)
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_missing_devices_are_errors(monkeypatch):
    has_accelerator(monkeypatch, None)
    assert machine.resolve_device("auto") == machine.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="error: --device: there is no cuda device here; use cpu, or auto"):
        machine.resolve_device("cuda")
    with pytest.raises(UserError, match="'gpu' is no device"):
        machine.resolve_device("gpu")
    has_accelerator(monkeypatch, "cuda", 2)
    assert machine.resolve_device("auto") == torch.device("cuda")
    assert machine.resolve_device("cpu") == torch.device("cpu")
    assert machine.resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="there is no cuda:2 here; the last is cuda:1"):
        machine.resolve_device("cuda:2")
    with pytest.raises(UserError, match="there is no mps device here; use cpu or cuda, or auto"):
        machine.resolve_device("mps", "train.device")


def test_local_rank_picks_the_accelerator_but_not_on_mps(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    has_accelerator(monkeypatch, "cuda", 4)
    assert processes.local_device("auto") == torch.device("cuda", 3)
    assert processes.local_device("cpu") == torch.device("cpu")
    has_accelerator(monkeypatch, "mps")
    assert processes.local_device("auto") == torch.device("cpu")
    with pytest.raises(
        UserError, match=r"train\.device: several processes cannot work on mps; start one, or use cpu"
    ):
        processes.local_device("mps")


def test_more_processes_than_gpus_are_refused_unless_they_work_on_cpus(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    has_accelerator(monkeypatch, "cuda", 2)
    values = {"batch": {"readers": 4}}
    with pytest.raises(UserError, match="started 4 processes on a machine with 2 GPUs"):
        check_launch(build_recipe(values))
    check_launch(build_recipe({**values, "train": {"device": "cpu"}}))


def test_fp64_is_refused_at_the_start_if_unsupported(monkeypatch):
    has_accelerator(monkeypatch, "mps")
    with pytest.raises(UserError, match=r"train\.precision: mps does not support fp64"):
        check_launch(build_recipe({"train": {"precision": "fp64"}}))


@pytest.mark.parametrize(
    ("environment", "cores", "expected"),
    [
        ({}, 8, None),  # no launcher: torch decides
        ({"OMP_NUM_THREADS": "1"}, 8, None),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 8, 4),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 8, 4),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, 8, None),  # the user's
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, 2, 1),
        # one process of accelerate launch
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, 8, 8),
    ],
)
def test_each_process_uses_its_share_of_the_cores(
    environment: dict[str, str], cores: int, expected: int | None
):
    assert machine.share_of_threads(environment, cores) == expected


def test_a_missing_compiler_is_reported_in_one_line(monkeypatch, tmp_path):
    """Without a C++ compiler and with an empty cache."""
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nonexistent/compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    error = machine.compile_error(torch.device("cpu"))
    assert error is not None
    assert "No working C++ compiler" in error
    assert "\n" not in error
    assert machine.compile_error(torch.device("meta")) is None
