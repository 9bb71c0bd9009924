"""`minrnn figures speed`: prints the README's tables of speed, from the committed results.

`tests/launch/test_readme.py` compares them with the README.
"""

import argparse
from functools import partial

from ..output import RESULTS
from ..report import speed

scan_lines = partial(speed.scan_lines, RESULTS / "bench-scan-cpu.json")
train_lines = partial(speed.train_lines, RESULTS / "bench-train-cpu.json")
generate_lines = partial(speed.generate_lines, RESULTS / "bench-generate-cpu.json")
contexts_line = partial(speed.contexts_line, RESULTS / "bench-generate-cpu.json")
stream_line = partial(speed.stream_line, RESULTS / "bench-stream-cpu.json", RESULTS / "bench-length-cpu.json")
loop_line = partial(
    speed.loop_line, RESULTS / "bench-loop-cpu.json", link="evals/results/bench-loop-cpu.json"
)
soak_line = partial(speed.soak_line, RESULTS / "soak.json", link="evals/results/soak.json")


def main(argv: list[str]) -> None:
    """Print the tables."""
    argparse.ArgumentParser(
        "minrnn figures speed", description="Print the README's tables of speed."
    ).parse_args(argv)
    for lines in (
        scan_lines(),
        train_lines(),
        generate_lines(),
        [contexts_line()],
        [stream_line()],
        [loop_line()],
        [soak_line()],
    ):
        print("\n".join(lines), end="\n\n")
