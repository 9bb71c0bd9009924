"""A sweep whose workers and runs are killed at random moments, to be compared with an undisturbed one."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml
from mlflow import MlflowClient

from minrnn.launch.sweep.leases import Leases
from minrnn.pipeline.checkpoint import checkpoint_paths
from minrnn.pipeline.tracking_parent import NAME_TAG, PARENT_TAG

NUM_WORKERS = 2
# What is killed: a worker, whose training goes on alone; training, which counts as a failure; or both.
FAULTS = {"worker": 2, "training": 1, "both": 2}
TIMEOUT = 600.0  # seconds
SETTINGS = {
    "train.precision": "fp32",
    "train.sample_tokens": 0,
    "train.log_every": 1,
    "train.save_every": 3,
    "data.workers": 0,
    "data.validation_tokens": 2000,
    "batch.chunk": 16,
}
LADDER: dict[str, Any] = {
    "sizes": ["12k"],
    "budgets": [0.5, 1, 2],
    "rules": {"warmup": 0.05, "batch_tokens": 150_000, "decay_fraction": 0.3},
}


def write_sweep(path: Path, out: Path, tracking: str | None = None, **ladder: Any) -> Path:
    """A tiny ladder. Kills of training count as failures, so many are allowed.

    Args:
        tracking: URI of MLflow.
        ladder: fields in place of those of LADDER.
    """
    settings = {**SETTINGS, "tracking.uri": tracking}
    fields = {"out": str(out), "settings": settings, "retries": 1000, "ladder": {**LADDER, **ladder}}
    path.write_text(yaml.safe_dump(fields))
    return path


def start(sweep: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a worker."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "minrnn.launch.cli", "sweep", str(sweep)],
            env=environment,
            stdout=output,
            stderr=output,
        )


class KilledSweep:
    """Workers of a sweep that are killed and started again.

    Args:
        sweep: the file.
        out: the sweep's folder.
        seed: of the moments and the kinds of the kills.
    """

    def __init__(self, sweep: Path, out: Path, seed: int):
        self.sweep, self.out, self.log = sweep, out, out.with_suffix(".log")
        self.draw = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.workers = [start(sweep, self.log) for _ in range(NUM_WORKERS)]

    def run(self, num_kills: int) -> None:
        """Kill until there were this many kills or the sweep is done; then let it end.

        Raises:
            TimeoutError: nothing happens any more.
        """
        while self.kills.total() < num_kills and self._wait_for_progress():
            time.sleep(self.draw.uniform(0.0, 1.5))
            self._kill(self.draw.choices(list(FAULTS), list(FAULTS.values()))[0])
            self.restart()
        for worker in self.workers:
            assert worker.wait(TIMEOUT) == 0, self.log.read_text()[-2000:]

    def restart(self) -> None:
        """Start a worker in place of each that was killed."""
        for i, worker in enumerate(self.workers):
            if worker.poll() not in (None, 0):
                self.workers[i] = start(self.sweep, self.log)

    def end(self) -> None:
        """Kill all processes."""
        for worker in self.workers:
            for process in _tree(worker.pid):
                _kill(process)

    def _progress(self) -> tuple[int, ...]:
        """What changes when a step is trained or a run ends."""
        sizes = [path.stat().st_size for path in self.out.glob("runs/*/metrics.jsonl")]
        return sum(sizes), len(list(self.out.glob("runs/*/.finished")))

    def _wait_for_progress(self) -> bool:
        """Wait until something is trained; False if all workers have ended before."""
        before, end = self._progress(), time.monotonic() + TIMEOUT
        while self._progress() == before:
            if all(worker.poll() is not None for worker in self.workers):
                return False
            if time.monotonic() > end:
                raise TimeoutError(self.log.read_text()[-2000:])
            time.sleep(0.02)
        return True

    def _kill(self, fault: str) -> None:
        """Kill one worker that trains, its training, or both."""
        trees = [(worker, tree) for worker in self.workers if len(tree := _tree(worker.pid)) > 1]
        if not trees:
            return
        worker, tree = self.draw.choice(trees)
        for process in {"worker": tree[:1], "training": tree[1:], "both": tree}[fault]:
            _kill(process)
        if fault != "training":
            worker.wait()
        self.kills[fault] += 1


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; [] if it has ended."""
    try:
        process = psutil.Process(pid)
        is_over = process.status() == psutil.STATUS_ZOMBIE
        return [] if is_over else [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(signal.SIGKILL)


# --- Comparison


def metrics(run: Path) -> list[tuple[str, int, float]]:
    """Kind, step and loss of each line."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


def differences(killed: Path, undisturbed: Path) -> list[str]:
    """What is wrong with a sweep that was killed: runs that are lost, were trained twice, or differ.

    Args:
        killed, undisturbed: folders of the sweeps.
    """
    names = [entry["name"] for entry in json.loads((undisturbed / "sweep.json").read_text())["runs"]]
    states, errors = Leases(killed / "leases").survey(names), []
    for name in names:
        run, other = killed / "runs" / name, undisturbed / "runs" / name
        if not states[name].is_done:
            errors.append(f"{name} is lost")
            continue
        leases = [json.loads(path.read_text() or "{}") for path in (killed / "leases").glob(f"{name}.??????")]
        if sum(lease.get("outcome") == "done" for lease in leases) != 1:
            errors.append(f"{name} was done twice")
        steps = start_steps(killed / "logs" / f"{name}.log")
        if steps != sorted(steps):
            errors.append(f"{name} was trained twice: it began at the steps {steps}")
        if metrics(run) != metrics(other):
            errors.append(f"the losses of {name} differ")
        weights = [
            (checkpoint_paths(each / "checkpoints")[0] / "model.safetensors").read_bytes()
            for each in (run, other)
        ]
        if weights[0] != weights[1]:
            errors.append(f"the weights of {name} differ")
    return errors


def tracking_differences(uri: str, killed: Path) -> list[str]:
    """What is wrong with the MLflow runs of a sweep: one parent that is finished, one child for each run."""
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = (each for each in client.search_experiments() if each.name == killed.name)
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if NAME_TAG in run.data.tags]
    children = sorted(
        str(run.info.run_name) for run in runs if run.data.tags.get(PARENT_TAG) == parents[0].info.run_id
    )
    errors = []
    if [parent.info.status for parent in parents] != ["FINISHED"]:
        errors.append(f"MLflow has the parents {[parent.info.status for parent in parents]}")
    names = sorted(path.name for path in (killed / "runs").iterdir() if not path.name.startswith("."))
    if children != names:
        errors.append(f"MLflow has the children {children}")
    return errors


def start_steps(log: Path) -> list[int]:
    """The step at which each attempt of a run began, from its log."""
    begins = re.findall(
        r"; (?:going on from step (\d+)|from the beginning)\n", log.read_text(errors="replace")
    )
    return [int(step or 0) for step in begins]
