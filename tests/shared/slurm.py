"""A Slurm job without Slurm: stand-ins for its commands, and the environment that a job's script sees."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def job_environment(folder: Path, stand_ins: dict[str, str], **variables: str) -> dict[str, str]:
    """The environment of a job that runs, is started from the repository, and lasts as long as it takes.

    Args:
        folder: for the commands, an environment to activate, and LOG.
        stand_ins: the bodies of scripts by command. They use LOG (a folder), LASTS (seconds), STATUS (to exit
            with) and JOB_STATE (Slurm's).
        variables: Slurm's, such as SLURM_JOB_ID.
    """
    tools, venv = folder / "tools", folder / "venv" / "bin"
    tools.mkdir()
    venv.mkdir(parents=True)
    (venv / "activate").touch()
    for name, body in stand_ins.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}")
        (tools / name).chmod(0o755)
    stage = {"LOG": str(folder), "LASTS": "0", "STATUS": "0", "JOB_STATE": "RUNNING"}
    folders = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "VENV": str(venv.parent)}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **variables, **stage, **folders, "PATH": path}


def signal_when(
    has_started: Callable[[], bool], number: int, command: list[str], environment: dict[str, str]
) -> int:
    """Start a job that would last for minutes, signal it once it has started, and return its exit status."""
    job = subprocess.Popen(command, env={**environment, "LASTS": "600"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while job.poll() is None and not has_started() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(number)
    return job.wait(300)


def requeued(folder: Path) -> str:
    """What the stand-in for scontrol was told to do."""
    log = folder / "scontrol"
    return log.read_text() if log.exists() else ""
