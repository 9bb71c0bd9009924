"""What a bench leaves behind: a JSON file that says all that was run, a table, a plot.

    {"bench", "command", "commit", "time", "machine", "versions", "config", "ceilings", "rows"}

Each row is one contender at one point, with every round's seconds, or with the reason why it could not run. The file is written anew after
every section, so that a run that is cut off leaves what it had. No host names, no paths.
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
    """The growing result of one bench.

    Args:
        bench: its name.
        argv: its arguments, as typed.
        config: every setting, resolved.
        device: what it runs on.
        out: the JSON file; the plot goes beside it.
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
        """More rows, on disk at once."""
        self.rows.extend(rows)
        self.write()

    def write(self) -> None:
        """Replace the file by what is known now."""
        write_json(self.out, self.data)

    def finish(self, draw: Callable[[Any, list[dict[str, Any]]], None]) -> None:
        """Write the file and the plot; `draw(figure, rows)` fills the latter."""
        self.write()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        draw(figure, [row for row in self.rows if "reason" not in row])
        machine = self.data["machine"]
        where = (
            machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
        )
        figure.suptitle(
            f"{self.data['command']}\n{where}, torch {self.data['versions']['torch']}", fontsize=8
        )
        FigureCanvasAgg(figure).print_png(str(self.out.with_suffix(".png")))
        print(f"\n{self.out} and {self.out.with_suffix('.png').name} written")
