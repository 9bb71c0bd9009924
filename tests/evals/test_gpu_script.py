"""The GPU script, tried out on the CPU."""

import json
import time
from pathlib import Path

import pytest
import torch
from minrnn.evals import gpu
from minrnn.evals.bench import agreement


def test_checks_and_benches_end_to_end(tmp_path: Path):
    gpu.main(["--out", str(tmp_path), "--device", "cpu", "--tiny", "--sections", "checks,fused,layers"])
    summary = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: section["end"] for name, section in summary["sections"].items()} == dict.fromkeys(("checks", "fused", "layers"), "finished")
    checks = json.loads((tmp_path / "checks.json").read_text())
    assert checks["num_checks"] > 4
    assert checks["failed"] == []
    assert json.loads((tmp_path / "fused.json").read_text())["rows"]


def test_every_section_has_tiny_sizes():
    assert gpu.TINY.keys() == gpu.SECTIONS.keys()


def test_a_section_whose_time_is_up_leaves_what_it_had(tmp_path: Path, monkeypatch):
    def slow(device, tiny, out):
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("a contender's failure must not swallow the end of the time")

    monkeypatch.setattr(gpu, "_checks", slow)
    summary = gpu.run(torch.device("cpu"), tmp_path, minutes=0.01, tiny=True, names=["checks"])
    assert summary["sections"]["checks"]["end"].startswith("cut off after")
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"].keys() == {"checks"}


def test_a_backend_that_is_wrong_is_found_out(monkeypatch):
    monkeypatch.setattr(agreement, "linear_scan", lambda a, b, h0, backend: (a * 1.001 + b + h0.unsqueeze(1), h0 + a[:, -1]))
    row = agreement.check_scan((2, 3, 4), torch.float32, torch.device("cpu"), "torch")
    assert row["passed"]  # compared with itself in fp64
    assert agreement.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == 1e30
    assert agreement.relative_error(torch.tensor([1.0, 1.1]), torch.ones(2)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--device", "cuda"], "cuda is not available"), (["--sections", "chekcs"], "there is no 'chekcs'"), (["--minutes", "0"], "more than 0")],
)
def test_mistakes(arguments: list[str], told: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as left:
        gpu.main(["--out", str(tmp_path), *(arguments if "--device" in arguments else ["--device", "cpu", *arguments])])
    assert left.value.code == 2
    assert told in capsys.readouterr().out
