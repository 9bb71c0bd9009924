"""Runs `triton_checks` in a new process, because Triton's interpreter is chosen before the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minrnn.models.tiles_triton import triton

CHECKS = Path(__file__).with_name("triton_checks.py")
pytestmark = pytest.mark.skipif(triton is None, reason="needs the package triton")


def run_checks(selection: str, interpret: bool) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))
    }
    environment |= {"OMP_NUM_THREADS": "1"} | (
        {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpret else {}
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        selection,
        str(CHECKS),
    ]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKS.parents[2])
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]


@pytest.mark.parametrize(
    "selection", ["test_cells or test_boundaries", "not (test_cells or test_boundaries)"]
)
def test_interpreted(selection):
    run_checks(selection, interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    run_checks("test", interpret=False)
