"""The record of a benchmark: a JSON file with all that was run, and a plot.

    {"bench", "command", "commit", "time", "machine", "versions", "config", "ceilings", "rows"}

Each row is one contender at one setting, with the seconds of every round or the reason why it could not run.
The file is rewritten after every section, so an interrupted benchmark keeps its results. It contains no host
names and no paths.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...common.files import write_json
from ...pipeline.public import public_config
from ..record import command_line, commit, machine, versions


class Record:
    """The growing result of one benchmark.

    Args:
        bench: its name.
        argv: its arguments, as typed.
        config: every setting, resolved.
        device: the device of the measurements.
        out: the JSON file; the plot is written beside it.
    """

    def __init__(
        self, bench: str, argv: Sequence[str], config: dict[str, Any], device: torch.device, out: Path
    ):
        self.out = out
        self.data: dict[str, Any] = {
            "bench": bench,
            "command": command_line(f"minrnn bench {bench}", argv),
            "commit": commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(device),
            "versions": versions(),
            "config": public_config({key: value for key, value in config.items() if key != "out"}),
            "ceilings": {},
            "rows": [],
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows and write the file."""
        self.rows.extend(rows)
        self.write()

    def write(self) -> None:
        """Write the file with everything known so far."""
        write_json(self.out, self.data)

    def finish(self, draw: Callable[[Any, list[dict[str, Any]]], None]) -> None:
        """Write the file and the plot, which `draw(figure, rows)` fills."""
        self.write()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        draw(figure, [row for row in self.rows if "reason" not in row])
        machine = self.data["machine"]
        hardware = (
            machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
        )
        torch_version = self.data["versions"]["torch"]
        figure.suptitle(f"{self.data['command']}\n{hardware}, torch {torch_version}", fontsize=8)
        FigureCanvasAgg(figure).print_png(str(self.out.with_suffix(".png")))
        print(f"\n{self.out} and {self.out.with_suffix('.png').name} written")
