"""The quickstart, as `make train` runs it."""

import json
from pathlib import Path

import pytest

from minrnn.launch.cli import main


@pytest.mark.slow
def test_the_main_job_learns_in_minutes(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", "--config", "quickstart"])
    folder = tmp_path / "runs" / "quickstart"
    assert {"config.yaml", "metrics.jsonl", "loss.png", "samples.txt", "checkpoints", "model"} <= {
        path.name for path in folder.iterdir()
    }
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert entries[-1]["kind"] == "validation"
    assert entries[-1]["bits_per_byte"] <= 2.2
    assert (tmp_path / "mlflow.db").exists()
