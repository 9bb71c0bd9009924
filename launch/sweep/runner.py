"""The workers of a sweep: each takes the next run that nobody holds, trains it, and goes on.

    survey leases -> choose -> take -> [copy the trunk's checkpoint] -> train -> done, failed or stopped

A run that was stopped, or whose worker died, resumes from its newest checkpoint. A run that failed is started
again `retries` times, after all others, unless it refused its settings; then `failed/NAME.json` marks it.
Training is a process of its own, started by the same command as by hand. If its worker was killed, it goes on
alone: it holds the lock of its run's folder, and the worker that takes the run over waits until it ends.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...common.files import write_json, write_text
from ...common.locks import lock
from .branch import has_branch_point, start_branch
from .expand import recipe_with
from .leases import FAILURES, Lease, Leases, RunState
from .search import Study

POLL = 1.0  # seconds
# Training ended because it was told to: it has saved, and goes on later.
STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
REFUSED = 2  # status of training that refuses its settings
Command = Callable[[dict[str, Any], Path], Sequence[str]]
"""The command line that trains a run, from its entry in the plan and its recipe's file."""


@dataclass(frozen=True)
class Hardware:
    """What one worker trains on."""

    worker: str
    """Number of the worker in its process."""
    cores: tuple[int, ...] = ()
    """Cores of the worker; none for all."""
    environment: dict[str, str] = field(default_factory=dict)
    """More variables for training, e.g. CUDA_VISIBLE_DEVICES."""


class Runner:
    """All workers of this process.

    Args:
        folder: of the sweep.
        runs: the plan's entries.
        base: values of every run's recipe, section -> field -> value.
        command: what trains a run.
        retries: how often a run that failed is started again.
        leases: of the folder.
        poll: seconds between looks at the folder and at training.
        study: of a search; draws the settings of its runs.
    """

    def __init__(
        self,
        folder: Path,
        runs: list[dict[str, Any]],
        base: dict[str, Any],
        command: Command,
        retries: int,
        leases: Leases,
        poll: float = POLL,
        study: Study | None = None,
    ):
        self.folder, self.base, self.command, self.retries = folder, base, command, retries
        self.runs = {run["name"]: run for run in runs}
        self.leases, self.poll, self.study = leases, poll, study
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        for name in ("runs", "recipes", "logs", "failed"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def run_dir(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / name

    def states(self) -> dict[str, RunState]:
        """The state of each run."""
        return self.leases.survey(self.runs)

    def has_failed(self, state: RunState) -> bool:
        """Whether a run is not started again."""
        return not state.is_done and (state.is_refused or len(state.failures) > self.retries)

    def work(self, hardware: Hardware) -> None:
        """Train runs until all are done or failed, or `stop` is set. An error is kept in `errors`, and stops
        all workers."""
        try:
            if hardware.cores and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, hardware.cores)  # of this thread, and of the processes that it starts
            while not self.stop.is_set():
                states = self.states()
                if all(state.is_done or self.has_failed(state) for state in states.values()):
                    return
                taken = self._take(states, hardware)
                if taken is None:
                    self.stop.wait(self.poll)
                else:
                    self._train(*taken, hardware)
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    # --- Taking a run

    def _take(self, states: dict[str, RunState], hardware: Hardware) -> tuple[str, Lease, RunState] | None:
        """A run that nobody holds, the most expensive first; those that failed come last."""

        def rank(name: str) -> tuple[int, float]:
            return len(states[name].failures), -self.runs[name]["flops"]

        for name in sorted(states, key=rank):
            state = states[name]
            if state.is_done or state.is_held or self.has_failed(state) or not self._is_ready(name, states):
                continue
            lease = self.leases.take(name, state, f"{hardware.worker}@{socket.gethostname()}")
            if lease is not None:
                return name, lease, state
        return None

    def _is_ready(self, name: str, states: dict[str, RunState]) -> bool:
        """Whether a run can start: it is no branch, or its trunk has come to the branch point or its end."""
        trunk, step = self.runs[name]["trunk"], self.runs[name]["branch_step"]
        if trunk is None or has_branch_point(self.run_dir(trunk), step):
            return True
        return states[trunk].is_done or self.has_failed(states[trunk])

    # --- Training a run

    def _train(self, name: str, lease: Lease, state: RunState, hardware: Hardware) -> None:
        """Train a run to its end, and record how it ended."""
        outcome, message = "stopped", ""
        try:
            outcome, message = self._attempt(name, lease, hardware)
        finally:
            if not lease.is_lost.is_set():
                is_last = outcome == "refused" or len(state.failures) >= self.retries
                is_last_failure = outcome in FAILURES and is_last
                if self.study is not None and (outcome == "done" or is_last_failure):
                    self.study.record(name, has_failed=is_last_failure)
                if is_last_failure:
                    failures = [*state.failures, message]
                    write_json(self.folder / "failed" / f"{name}.json", {"failures": failures})
                elif outcome == "done":
                    (self.folder / "failed" / f"{name}.json").unlink(missing_ok=True)
                lease.end(outcome, message)

    def _attempt(self, name: str, lease: Lease, hardware: Hardware) -> tuple[str, str]:
        """Outcome and message of one attempt."""
        log = self.folder / "logs" / f"{name}.log"
        while _is_locked(self.run_dir(name)):
            if self.stop.wait(self.poll) or lease.is_lost.is_set():
                return "stopped", ""
        with log.open("ab") as output:
            recipe = self._write_recipe(name, self._branch(name, output))
            process = subprocess.Popen(
                self.command(self.runs[name], recipe),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **hardware.environment},
                start_new_session=True,  # Ctrl-C reaches it through this worker only
            )
            status = self._wait(process, lease)
        if status == 0:
            return "done", ""
        is_told = self.stop.is_set() or lease.is_lost.is_set()  # accelerate launch then exits with 1
        if is_told or status in STOPPED or 128 - status in STOPPED:
            return "stopped", ""
        return "refused" if status == REFUSED else "failed", _last_error(log, status)

    def _branch(self, name: str, output: Any) -> bool:
        """Copy the checkpoint that a branch starts from; returns whether it could be copied."""
        run = self.runs[name]
        if run["trunk"] is None:
            return False
        try:
            start_branch(self.run_dir(run["trunk"]), self.run_dir(name), run["branch_step"])
        except (ValueError, OSError) as error:
            lacks = f"no checkpoint of {run['trunk']} at step {run['branch_step']} ({error})"
            message = f"warning: {name} starts from the beginning, with the same result: {lacks}\n"
            output.write(message.encode())
            output.flush()
            return False
        return True

    def _write_recipe(self, name: str, is_branch: bool) -> Path:
        """Write the run's recipe, for training and for `minrnn train --config` by hand."""
        run = self.runs[name]
        drawn = {} if self.study is None else self.study.settings(name)
        settings = {
            **run["settings"],
            **drawn,
            "run.dir": str(self.run_dir(name)),
            "run.change": ["optim.schedule_steps"] if is_branch else [],
            "train.save_at": run["save_at"],
        }
        if run["sizes"]:
            settings["model.sizes"] = run["sizes"]
        values = recipe_with(self.base, settings)
        path = self.folder / "recipes" / f"{name}.yaml"
        write_text(path, yaml.safe_dump(values, sort_keys=False))
        return path

    def _wait(self, process: subprocess.Popen[bytes], lease: Lease) -> int:
        """Wait for training; it saves and exits if this worker must stop, or has lost the run."""
        is_told = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(self.poll)
            if not is_told and (self.stop.is_set() or lease.is_lost.is_set()):
                process.send_signal(signal.SIGTERM)
                is_told = True


def train_command(processes: int, launcher: str | None, has_gpus: bool) -> Command:
    """The command that trains: `minrnn train`, or accelerate launch with several processes.

    Args:
        launcher: a configuration file for accelerate launch; None for DDP, over gloo on CPUs.
    """
    if launcher is not None:
        kind = ["--config_file", launcher]
    else:
        cpu = Path(__file__).resolve().parent.parent / "accelerate" / "cpu.yaml"
        kind = ["--multi_gpu"] if has_gpus else ["--config_file", str(cpu)]
    options = [*kind, "--num_processes", str(processes), "--main_process_port", "0"]  # a free one

    def command(run: dict[str, Any], recipe: Path) -> list[str]:
        words = ["-m", "minrnn.pipeline.train", "--config", str(recipe)]
        if processes == 1 and launcher is None:
            return [sys.executable, *words]
        return [sys.executable, "-m", "accelerate.commands.launch", *options, *words]

    return command


def _is_locked(run_dir: Path) -> bool:
    """Whether a process trains in a folder: one whose worker died, or one that was started by hand."""
    try:
        with (run_dir / ".lock").open("a") as file:
            lock(file, wait=False)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _last_error(log: Path, status: int) -> str:
    """The last line of a log that names an error, and the exit status."""
    lines = log.read_bytes()[-20_000:].decode(errors="replace").splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    end = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"{errors[-1].strip()[:300]} ({end})" if errors else end
