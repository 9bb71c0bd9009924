"""What both soaks share: the options `--seed` and `--out`, and the origin of their results."""

import argparse
from pathlib import Path
from typing import Any

import torch

from minrnn.evals.record import commit, machine, versions

RESULTS = Path(__file__).parents[2] / "evals" / "results"


def soak_parser(program: str, description: str, seed_of: str, file: str) -> argparse.ArgumentParser:
    """A parser with the options of every soak.

    Args:
        seed_of: what the seed decides.
        file: default name of the results.
    """
    parser = argparse.ArgumentParser(program, description=description)
    parser.add_argument("--seed", type=int, default=0, help=f"of {seed_of} (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / file, help="results (default: %(default)s)")
    return parser


def origin() -> dict[str, Any]:
    """Where results come from."""
    return {"commit": commit(), "machine": machine(torch.device("cpu")), "versions": versions()}
