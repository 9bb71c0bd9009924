"""Runs the checks of the Triton kernels in new processes: the interpreter is chosen before the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minrnn.models.tiles_triton import triton

FOLDER = Path(__file__).parent
SCAN, CELLS = "triton_scan_checks.py", "triton_cell_checks.py"
pytestmark = pytest.mark.skipif(triton is None, reason="needs the package triton")


def run_checks(*files: str, selection: str = "test", interpret: bool) -> None:
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
        *(str(FOLDER / file) for file in files),
    ]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]


@pytest.mark.parametrize(
    ("file", "selection"),
    [
        (SCAN, "test"),
        (CELLS, "test_cells or test_boundaries"),
        (CELLS, "not (test_cells or test_boundaries)"),
    ],
)
def test_interpreted(file, selection):
    run_checks(file, selection=selection, interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    run_checks(SCAN, CELLS, interpret=False)
