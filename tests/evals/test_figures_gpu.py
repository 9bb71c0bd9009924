"""`minrnn figures gpu`, tried on the CPU."""

import json
import time
from pathlib import Path

import pytest
import torch

from minrnn.evals.bench import agreement
from minrnn.evals.figures import gpu
from minrnn.launch.cli import main
from minrnn.models.scan import linear_scan


def test_checks_and_benches_end_to_end(tmp_path: Path):
    gpu.main(
        [
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
            "--tiny",
            "--minutes",
            "600",
            "--sections",
            "checks,fused,layers",
        ]
    )
    summary = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: section["end"] for name, section in summary["sections"].items()} == dict.fromkeys(
        ("checks", "fused", "layers"), "finished"
    )
    checks = json.loads((tmp_path / "checks.json").read_text())
    assert checks["num_checks"] > 4
    assert checks["failed"] == []
    assert json.loads((tmp_path / "fused.json").read_text())["rows"]


def test_every_section_has_tiny_sizes():
    assert gpu.TINY.keys() == gpu.SECTIONS.keys()


def test_a_section_that_runs_out_of_time_keeps_its_results(tmp_path: Path, monkeypatch):
    def slow(device, tiny, out, command):
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("a contender's failure must not swallow the end of the time")

    monkeypatch.setattr(gpu, "_checks", slow)
    summary = gpu.run(torch.device("cpu"), tmp_path, minutes=0.01, tiny=True, names=["checks"], command="c")
    assert summary["sections"]["checks"]["end"].startswith("cut off after")
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"].keys() == {"checks"}


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is 0.1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 1.001


@pytest.mark.parametrize("fault", ["", "h", "h_last", "da", "db", "dh0"])
def test_an_error_of_a_backend_is_reported_by_name(fault: str, monkeypatch: pytest.MonkeyPatch):
    def backend_under_test(a, b, h0, backend):
        if backend == "torch":  # what it is compared with
            return linear_scan(a, b, h0, backend=backend)
        a, b, h0 = (
            _ScaledGradient.apply(x) if fault == name else x
            for name, x in (("da", a), ("db", b), ("dh0", h0))
        )
        h, h_last = linear_scan(a, b, h0, backend=backend)
        return h * (1.001 if fault == "h" else 1), h_last * (1.001 if fault == "h_last" else 1)

    monkeypatch.setattr(agreement, "linear_scan", backend_under_test)
    row = agreement.check_scan((2, 3, 4), torch.float32, torch.device("cpu"), "reference")
    assert row["passed"] == (not fault)
    wrong = {name for name, error in row["errors"].items() if error > row["tolerance"]}
    assert (fault in wrong) if fault else not wrong


def test_a_backend_with_different_bits_on_repetition_fails(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def backend_under_test(a, b, h0, backend):
        calls.append(backend)
        h, h_last = linear_scan(a, b, h0, backend=backend)
        return h * (1 + 1e-6 * len(calls)), h_last

    monkeypatch.setattr(agreement, "linear_scan", backend_under_test)
    row = agreement.check_scan((2, 3, 4), torch.float32, torch.device("cpu"), "reference")
    assert max(row["errors"].values()) < row["tolerance"]
    assert not row["same_bits_twice"]
    assert not row["passed"]


def test_relative_error():
    assert agreement.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == 1e30
    assert agreement.relative_error(torch.tensor([1.0, 1.1]), torch.ones(2)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "expected_error"),
    [
        (["--device", "cuda"], "cuda is not available"),
        (["--sections", "chekcs"], "there is no 'chekcs'"),
        (["--minutes", "0"], "more than 0"),
    ],
)
def test_user_errors_are_reported(arguments: list[str], expected_error: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as raised:
        main(
            [
                "figures",
                "gpu",
                "--out",
                str(tmp_path),
                *(arguments if "--device" in arguments else ["--device", "cpu", *arguments]),
            ]
        )
    assert raised.value.code == 2
    assert expected_error in capsys.readouterr().err
