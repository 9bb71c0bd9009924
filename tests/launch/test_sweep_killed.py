"""kill -9 of workers at random moments: no run is lost, none trained twice, results are equal to the bit."""

from pathlib import Path

import pytest
from killed_sweep import KilledSweep, differences, start, tracking_differences, write_sweep


@pytest.mark.slow
def test_a_sweep_whose_workers_are_killed_equals_direct_runs_to_the_bit(tmp_path: Path):
    """The undisturbed sweep has no branches, so branches are compared with direct runs."""
    direct = write_sweep(tmp_path / "direct.yaml", tmp_path / "direct", branch=False, budgets=[0.5, 1])
    assert start(direct, tmp_path / "direct.log").wait() == 0
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    branched = write_sweep(tmp_path / "branched.yaml", tmp_path / "branched", tracking=uri, budgets=[0.5, 1])
    killed = KilledSweep(branched, tmp_path / "branched", seed=0)
    try:
        killed.run(num_kills=3)
    finally:
        killed.end()
    assert killed.kills.total() > 1
    assert differences(tmp_path / "branched", tmp_path / "direct") == []
    assert tracking_differences(uri, tmp_path / "branched") == []
