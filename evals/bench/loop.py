"""The overhead of the training loop: a section of `minrnn bench train` (--loop).

    step    a fixed batch through forward, backward, clipping and update, as often as a turn has steps
    loop    as many steps of `pipeline.loop` with all that a run does besides: data from its worker,
            metrics.jsonl and MLflow every `log_every` steps, the progress bar, and one checkpoint that is
            completed within the turn; no validation

Both are the quickstart's, each in a process of its own, in turn.
"""

import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...pipeline import loop, processes
from ...pipeline.folder import open_folder
from ...pipeline.interrupt import Interrupt
from ...pipeline.machine import keep_freed_memory
from ...pipeline.recipe import read_recipe
from ...pipeline.run import Run
from ...pipeline.set_up import collective_timeout, set_up
from ...pipeline.watchdog import Watchdog
from ..memory import peak_memory
from .worker import run_contest

RECIPE = "quickstart"


class AfterSteps(Interrupt):
    """Requests the end of the loop at a given step, as a signal would."""

    def __init__(self, run: Run, step: int):
        self.run, self.step = run, step

    @property
    def requested(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return signal.SIGTERM if self.run.step >= self.step else None


class LoopWork:
    """The quickstart run in a temporary folder; see `worker.Work`."""

    def __init__(self, spec: Mapping[str, Any]):
        keep_freed_memory()
        self.steps, self.is_loop = spec["loop"], spec["family"] == "loop"
        self._folder = tempfile.TemporaryDirectory(prefix="minrnn-bench-")
        path = Path(self._folder.name)
        overrides = {
            "run.dir": path / "run",
            "run.seed": spec["seed"],
            "train.device": torch.device(spec["device"]).type,
            "train.precision": spec["dtype"],
            "train.steps": 10**9,
            "train.eval_every": "null",
            "train.save_every": self.steps,
            "tracking.uri": f"sqlite:///{path / 'mlflow.db'}",
        }
        recipe = read_recipe(
            [
                "--config",
                RECIPE,
                *(word for key, value in overrides.items() for word in (f"--{key}", str(value))),
            ]
        )
        accelerator = processes.connect(
            collective_timeout(recipe), processes.local_device(recipe.train.device)
        )
        self.run = set_up(
            recipe,
            accelerator,
            open_folder(recipe, accelerator),
            Watchdog.from_accelerator(accelerator, recipe.train.peer_timeout),
        )
        self.batch = next(iter(self.run.data.loader))
        self.info = {"parameters": self.run.engine.num_parameters, "steps": self.steps}
        self._bare_steps(5)

    def turn(self) -> dict[str, float]:
        """Measure the seconds per step."""
        start = time.perf_counter()
        if self.is_loop:
            loop.take_steps(self.run, AfterSteps(self.run, self.run.step + self.steps))
        else:
            self._bare_steps(self.steps)
        return {
            "seconds": (time.perf_counter() - start) / self.steps,
            "peak_bytes": peak_memory(self.run.accelerator.device),
        }

    def _bare_steps(self, num_steps: int) -> None:
        (chunk,), accelerator, engine, cache = self.batch, self.run.accelerator, self.run.engine, None
        names = ("input_ids", "shift_labels", "document_starts")
        inputs = {name: processes.to_device(getattr(chunk, name), accelerator) for name in names}
        for _ in range(num_steps):
            output = engine.forward(
                **inputs,
                past_key_values=cache,
                use_cache=True,
                skip_logits=True,
                num_items_in_batch=chunk.num_scored,
            )
            engine.backward(output.loss)
            engine.update(1e-4)
            cache = output.past_key_values.detach_()


def build_work(spec: Mapping[str, Any]) -> LoopWork:
    """Build the contender of a spec."""
    return LoopWork(spec)


def measure_loop(arguments: Any) -> list[dict[str, Any]]:
    """Two rows; that of the loop has its overhead over the bare step."""
    common = {
        "module": "loop",
        "loop": arguments.loop,
        **{name: getattr(arguments, name) for name in ("threads", "seed", "device", "dtype")},
    }
    specs = {name: {**common, "family": name} for name in ("step", "loop")}
    with tqdm(total=2 * arguments.rounds, desc="train, the loop", leave=False) as bar:
        timings, infos = run_contest(specs, arguments.rounds, float("inf"), True, {}, bar)
    rows = [
        {"section": "loop", "contender": name, **infos.get(name, {}), **timings[name].row()} for name in specs
    ]
    step_seconds, loop_seconds = (row.get("median_seconds") for row in rows)
    if step_seconds and loop_seconds:
        rows[1]["overhead"] = loop_seconds / step_seconds - 1
    return rows
