"""The Slurm script of sweeps, with stand-ins for Slurm and minrnn."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
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
    tools, venv = tmp_path / "tools", tmp_path / "venv" / "bin"
    tools.mkdir()
    venv.mkdir(parents=True)
    (venv / "activate").touch()
    for name, body in STANDINS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4321", "SLURM_ARRAY_JOB_ID": "4300", "SLURM_ARRAY_TASK_ID": "2"}
    stage = {"LOG": str(tmp_path), "LASTS": "0", "STATUS": "0", "JOB_STATE": "RUNNING"}
    folders = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "VENV": str(venv.parent)}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **job, **stage, **folders, "PATH": path}


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


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", "requeue 4300_2\n"), ("COMPLETING", "")])
def test_a_signalled_task_saves_and_is_requeued(
    task: dict[str, str], tmp_path: Path, state: str, requeued: str
):
    job = subprocess.Popen(
        ["bash", str(SCRIPT), "gpu"],
        env={**task, "LASTS": "600", "JOB_STATE": state},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while job.poll() is None and not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(300) == 143
    assert (tmp_path / "saved").exists()
    log = tmp_path / "scontrol"
    assert (log.read_text() if log.exists() else "") == requeued
