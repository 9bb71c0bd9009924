"""The run under faults, and the faults."""

import errno
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

import yaml
from faulty_disk import FaultyDisk

from minrnn.pipeline.checkpoint import checkpoint_paths

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORDS = "state lane goes on where it was cut and no document ever sees another".split()
PEER_TIMEOUT = 15.0
EVAL_EVERY = 10
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
# Relative frequency of each fault. `__main__.py` describes them.
WEIGHTS = {
    "kill": 40,
    "all": 15,
    "preempt": 6,
    **dict.fromkeys(SIGNALS, 4),
    "stop": 5,
    "rot": 15,
    "full disk": 5,
    "sync error": 4,
    "read error": 5,
}
KILLS = ("kill", "all", "rot", "read error")  # faults that begin with a SIGKILL


def write_recipe(folder: Path, seed: int) -> Path:
    """Write a small corpus, and a recipe with more steps than a soak can take."""
    draw = random.Random(seed)
    with (folder / "words.jsonl").open("w") as file:
        for _ in range(2000):
            length = draw.choice([0, 1, 3, 10, 60, 300])
            file.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=length))}) + "\n")
    recipe = {
        "run": {"seed": seed},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "dropout": 0.1},
        "data": {
            "corpus": str(folder / "words.jsonl"),
            "validation_fraction": 0.05,
            "validation_tokens": 500,
            "shuffle_window": 50,
        },
        "batch": {"readers": 2, "lanes": 2, "chunk": 24},
        "optim": {"schedule": "constant", "warmup_steps": 2, "lr": 1e-3},
        "train": {
            "steps": 10**6,
            "precision": "fp32",
            "log_every": 1,
            "eval_every": EVAL_EVERY,
            "save_every": 7,
            "sample_tokens": 0,
            "keep_checkpoints": 3,
            "peer_timeout": PEER_TIMEOUT,
        },
        "tracking": {"uri": None},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(recipe: Path, run: Path, *more: str) -> list[str]:
    """The command that trains with two processes under an elastic launcher."""
    config = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"
    launcher = [
        *("accelerate.commands.launch", "--config_file", str(config)),
        *("--max_restarts", "100000", "--monitor_interval", "0.2"),
    ]
    training = ["minrnn.pipeline.train", "--config", str(recipe), "--run.dir", str(run)]
    return [sys.executable, "-m", *launcher, "-m", *training, *more]


class DisturbedRun:
    """A run that is started again whenever it ends.

    Args:
        folder: holds the run, its log and its corpus.
        seed: of the corpus, the model and the faults.
    """

    def __init__(self, folder: Path, seed: int):
        self.draw = random.Random(seed + 1)
        self.run, self.log = folder / "disturbed", folder / "disturbed.txt"
        self.recipe, self.disk = write_recipe(folder, seed), FaultyDisk(self.run, folder)
        self.faults: Counter[str] = Counter()
        self.errors: list[str] = []
        self.launcher: subprocess.Popen[bytes] | None = None

    @property
    def num_kills(self) -> int:
        """Number of faults with a SIGKILL."""
        return sum(self.faults[name] for name in KILLS)

    def output(self) -> str:
        """The output of the run so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def num_starts(self) -> int:
        """Number of times that training started or resumed."""
        return len(re.findall(r"going on from step \d+|from the beginning", self.output()))

    def last_step(self) -> int:
        """The step of the last line of metrics.jsonl; 0 if there is none."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"]
        except (OSError, ValueError, IndexError, KeyError):
            return 0

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, oldest first."""
        return checkpoint_paths(self.run / "checkpoints")[::-1]

    def start(self) -> None:
        """Start the command."""
        environment = {**ENVIRONMENT, **self.disk.environment}
        with self.log.open("ab") as log:
            words = command(self.recipe, self.run)
            self.launcher = subprocess.Popen(
                words, env=environment, stderr=log, stdout=log, start_new_session=True
            )

    def wait_for(self, event: str, condition, seconds: float = 300.0) -> None:
        """Wait until the condition holds, and start the launcher again if it has ended.

        Raises:
            TimeoutError: the condition does not hold in time.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{event}: not within {seconds:.0f} s; end of the output: {self.output()[-2000:]}"
                )
            if self.launcher is not None and self.launcher.poll() is not None:
                self.start()
            time.sleep(0.02)

    def wait_until_it_trains(self, starts: int) -> None:
        """Wait until training has started more than `starts` times, and has taken a step."""
        self.wait_for("a start", lambda: self.num_starts() > starts)
        step = self.last_step()
        self.wait_for("a step", lambda: self.last_step() > step)

    def processes(self) -> dict[int, int]:
        """Pids of the training processes by rank."""
        assert self.launcher is not None
        pids = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == self.launcher.pid:
                    rank = re.search(r"\0RANK=(\d+)\0", (path / "environ").read_text())
                    pids[int(rank[1])] = int(path.name)  # pyright: ignore[reportOptionalSubscript]
            except (OSError, TypeError, ValueError):
                continue
        return pids

    def end_all(self, number: int) -> None:
        """Send a signal to the launcher (SIGKILL: to the training processes as well) and wait for its end."""
        assert self.launcher is not None
        # killpg does not reach the training processes: each leads a process group of its own.
        pids = self.processes()
        os.killpg(self.launcher.pid, number)
        if number == signal.SIGKILL:
            for pid in pids.values():
                os.kill(pid, number)
        self.launcher.wait(60)

    def disturb(self, fault: str) -> None:
        """Cause a fault, and wait until the run trains again."""
        starts = self.num_starts()
        if fault in ("full disk", "sync error"):
            self._fail_writes(fault)
            self.faults[fault] += 1
            return
        broken_step = None
        if fault in ("kill", "stop", *SIGNALS):
            if not self._disturb_one_process(fault):
                return
        else:
            self.end_all(signal.SIGTERM if fault == "preempt" else signal.SIGKILL)
            if fault == "rot":
                broken_step = self._break_newest_checkpoint()
                fault = fault if broken_step else "all"
            newest = self.checkpoints()[-1:]
            if fault == "read error":
                self.disk.switch_on("read", errno.EIO)
            output_before = len(self.output())
            self.start()
            if fault == "read error":
                self._end_read_errors(newest, output_before)
        self.faults[fault] += 1
        self.wait_until_it_trains(starts)
        output = self.output().rsplit("warning: checkpoint", 1)[-1]
        if broken_step and f"going on from step {broken_step}\n" in output:
            self.errors.append(f"the broken checkpoint step-{broken_step:06d} was used")

    def _disturb_one_process(self, fault: str) -> bool:
        """Send a signal to one of the two processes. False if one of them has just ended."""
        pids = self.processes()
        if len(pids) < 2:
            return False
        rank = self.draw.randrange(2)
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(fault) or signal.Signals[fault]
        log_size = len(self.output())
        os.kill(pids[rank], number)
        if fault == "stop":
            try:
                holder = rf"; (the launcher|rank {rank}) on .*, which holds it, hangs or is gone"
                named = re.compile(rf"waiting for .*rank {rank} on|{holder}")
                event = "the name of a stopped process"
                self.wait_for(event, lambda: named.search(self.output()[log_size:]), 90)
            except TimeoutError as error:
                self.errors.append(str(error))
            os.kill(pids[rank], signal.SIGKILL)
        return True

    def _break_newest_checkpoint(self) -> int | None:
        """Flip a bit of a file, or truncate it. Returns the step, or None if there is no older checkpoint."""
        paths = self.checkpoints()
        if len(paths) < 2:
            return None
        file = self.draw.choice(sorted(path for path in paths[-1].iterdir() if path.stat().st_size > 0))
        content = bytearray(file.read_bytes())
        if self.draw.random() < 0.25:
            content = content[: self.draw.randrange(len(content))]
        else:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        return int(paths[-1].name.removeprefix("step-"))

    def _fail_writes(self, fault: str) -> None:
        """Let writes fail until a save has failed. The next save must succeed."""
        assert self.launcher is not None
        launcher, log_size = self.launcher, len(self.output())
        self.disk.switch_on(*(("write", errno.ENOSPC) if fault == "full disk" else ("fsync", errno.EIO)))
        try:
            self.wait_for("a failed save", lambda: "could not be written" in self.output()[log_size:], 120)
        except TimeoutError as error:
            self.errors.append(f"{fault}: {error}")
        self.disk.switch_off()
        newest = self.checkpoints()[-1:]
        self.wait_for("a checkpoint after the disk works again", lambda: self.checkpoints()[-1:] != newest)
        if self.launcher is not launcher:
            self.errors.append(f"{fault}: the run ended")

    def _end_read_errors(self, newest: list[Path], output_before: int) -> None:
        """Wait for a failed read, then let reads succeed. The run must resume from the newest checkpoint."""
        try:
            self.wait_for("a failed read", lambda: "Input/output error" in self.output()[output_before:], 120)
        except TimeoutError as error:
            self.errors.append(f"read error: {error}")
        self.disk.switch_off()
        if newest:
            step = int(newest[0].name.removeprefix("step-"))
            resumes = re.compile(r"going on from step (\d+)")
            self.wait_for("a start", lambda: resumes.search(self.output()[output_before:]))
            match = resumes.search(self.output()[output_before:])
            if match is None or int(match[1]) != step:
                resumed = match and match[1]
                self.errors.append(
                    f"read error: the newest checkpoint was {step}, the run resumed from {resumed}"
                )
