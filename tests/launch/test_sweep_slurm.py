"""The Slurm script of sweeps, with stand-ins for Slurm and minrnn."""

import signal
import subprocess
from pathlib import Path

import pytest
from slurm import REPOSITORY, job_environment, requeued, signal_when

SCRIPT = REPOSITORY / "launch" / "slurm" / "sweep.sbatch"
STANDINS = {
    "minrnn": """
trap 'echo saved > "$LOG/saved"; kill $(jobs -p); exit 143' TERM
echo "$@" > "$LOG/building" && mv "$LOG/building" "$LOG/started"
[[ $LASTS == 0 ]] || { sleep $LASTS & wait $!; }
exit $STATUS
""",
    "squeue": 'echo "$@" > "$LOG/squeue"; echo "$JOB_STATE"',
    "scontrol": 'echo "$@" >> "$LOG/scontrol"',
}


@pytest.fixture
def task(tmp_path: Path) -> dict[str, str]:
    """The environment of task 2 of the array 4300."""
    job = {"SLURM_JOB_ID": "4321", "SLURM_ARRAY_JOB_ID": "4300", "SLURM_ARRAY_TASK_ID": "2"}
    return job_environment(tmp_path, STANDINS, **job)


def test_a_task_is_one_sweep_command_with_its_status(task: dict[str, str], tmp_path: Path):
    command = ["bash", str(SCRIPT), "gpu", "--workers", "4"]
    for status in (0, 7):
        done = subprocess.run(command, env={**task, "STATUS": str(status)}, check=False)
        assert done.returncode == status
        assert (tmp_path / "started").read_text() == "sweep gpu --workers 4\n"
    assert not (tmp_path / "scontrol").exists()
    usage = subprocess.run(command[:2], env=task, capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "usage: sbatch" in usage.stderr


@pytest.mark.parametrize(("state", "expected"), [("RUNNING", "requeue 4300_2\n"), ("COMPLETING", "")])
def test_a_signalled_task_saves_and_is_requeued(
    task: dict[str, str], tmp_path: Path, state: str, expected: str
):
    started = tmp_path / "started"
    command = ["bash", str(SCRIPT), "gpu"]
    assert signal_when(started.exists, signal.SIGUSR1, command, {**task, "JOB_STATE": state}) == 143
    assert (tmp_path / "saved").exists()
    assert requeued(tmp_path) == expected
