"""A run under random faults against an undisturbed one: `make soak`, or `python tests/soak.py --minutes 30 --kills 100`.

Two processes under an elastic launcher train a small model with a data worker each, and save in the background every few steps. Faults come at
random moments, those of saving included:

    kill     SIGKILL of one training process; the launcher starts both anew
    all      SIGKILL of the launcher and all its processes; the same command is given again
    term     SIGTERM to all, as a scheduler preempts: they agree on a step, save and leave; the same command again
    hang     SIGSTOP of one process: the other names it and leaves (killed after that, or the launcher would wait half a minute for it)
    rot      with all dead, the newest checkpoint is cut short or one bit of it flipped: it must not be used

At the end the run is told to stop, and an undisturbed run takes as many steps. Losses must be equal to the bit, every step once, every reader
at the same place. Writes evals/results/soak.json and ends with status 1 if anything differs.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import yaml
from minrnn.evals.bench.record import commit, machine, versions
from minrnn.pipeline.checkpoint import steps_in
from tqdm import tqdm

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORDS = ["state", "lane", "goes", "on", "where", "it", "was", "cut", "and", "no", "document", "ever", "sees", "another"]
TIMEOUT = 4.0
WEIGHTS = {"kill": 60, "all": 20, "term": 8, "hang": 2, "rot": 10}


def write_recipe(folder: Path, seed: int) -> Path:
    """A small corpus and a recipe that never ends by itself."""
    draw = random.Random(seed)
    with (folder / "words.jsonl").open("w") as file:
        for _ in range(2000):
            file.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.choice([0, 1, 3, 10, 60, 300])))}) + "\n")
    recipe = {
        "run": {"seed": seed},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "dropout": 0.1},
        "data": {"corpus": str(folder / "words.jsonl"), "validation_fraction": 0.05, "validation_tokens": 500, "shuffle_window": 50},
        "batch": {"readers": 2, "lanes": 2, "chunk": 24},
        "optim": {"schedule": "constant", "warmup_steps": 2, "lr": 1e-3},
        "train": {"steps": 10**6, "log_every": 1, "save_every": 7, "sample_tokens": 0, "keep_checkpoints": 3, "peer_timeout": TIMEOUT},
        "tracking": {"uri": None},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Soak:
    """The disturbed run and who disturbs it."""

    def __init__(self, folder: Path, seed: int):
        self.draw, self.run, self.log = random.Random(seed + 1), folder / "disturbed", folder / "disturbed.txt"
        self.recipe = write_recipe(folder, seed)
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.launcher: subprocess.Popen[bytes] | None = None
        self.broken: str | None = None

    def command(self, run: Path, *more: str) -> list[str]:
        config = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"
        launcher = ["accelerate.commands.launch", "--config_file", str(config), "--max_restarts", "1000", "--monitor_interval", "0.2"]
        return [sys.executable, "-m", *launcher, "-m", "minrnn.pipeline.train", "--config", str(self.recipe), "--run.dir", str(run), *more]

    def told(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def num_starts(self) -> int:
        return len(re.findall(r"going on from step \d+|from the beginning", self.told()))

    def last_step(self) -> int:
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"]
        except (OSError, ValueError, IndexError, KeyError):
            return 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(self.command(self.run), env=ENVIRONMENT, stderr=log, stdout=log, start_new_session=True)

    def wait_until_it_trains(self, starts: int, patience: float = 120.0) -> None:
        """Started once more, and a step further."""
        end, step = time.monotonic() + patience, None
        while True:
            if self.num_starts() > starts:
                step = self.last_step() if step is None else step
                if self.last_step() > step:
                    break
            if time.monotonic() > end:
                raise TimeoutError(f"the run does not train; its last words: {self.told()[-1500:]}")
            time.sleep(0.02)
        if self.broken is not None:
            after = self.told().rsplit("going on from step ", 1)[1]
            if after.startswith(f"{int(self.broken)}\n") or f"checkpoint step-{self.broken} is not used" not in self.told():
                self.problems.append(f"the broken checkpoint step-{self.broken} was used")
            self.broken = None

    def processes(self) -> dict[int, int]:
        """Pids of the training processes by rank."""
        assert self.launcher is not None
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == self.launcher.pid:
                    found[int(re.search(r"\0RANK=(\d+)\0", (path / "environ").read_text())[1])] = int(path.name)  # pyright: ignore
            except (OSError, TypeError, ValueError):
                continue
        return found

    def end_all(self, number: int) -> None:
        assert self.launcher is not None
        processes = self.processes()  # each leads a session of its own
        os.killpg(self.launcher.pid, number)
        if number == signal.SIGKILL:
            for pid in processes.values():
                os.kill(pid, number)
        self.launcher.wait(60)

    def rot(self) -> bool:
        """Break one file of the newest checkpoint; False where there is no older one to go on from."""
        paths = steps_in(self.run / "checkpoints")
        if len(paths) < 2:
            return False
        file = self.draw.choice([path for path in paths[0].iterdir() if path.stat().st_size > 0])
        content = bytearray(file.read_bytes())
        if self.draw.random() < 0.5:
            content = content[: self.draw.randrange(len(content))]
        else:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        self.broken = paths[0].name.removeprefix("step-")
        return True

    def disturb(self, fault: str) -> None:
        """One fault, and wait until the run goes on."""
        starts = self.num_starts()
        if fault in ("kill", "hang"):
            processes = self.processes()
            if len(processes) < 2:
                return
            victim = processes[self.draw.randrange(2)]
            os.kill(victim, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            if fault == "hang":
                count, end = self.told().count("nothing has moved for"), time.monotonic() + 30
                while self.told().count("nothing has moved for") == count and time.monotonic() < end:
                    time.sleep(0.1)
                if time.monotonic() >= end:
                    self.problems.append("a hanging peer was not named")
                os.kill(victim, signal.SIGKILL)
        else:
            self.end_all(signal.SIGTERM if fault == "term" else signal.SIGKILL)
            if fault == "rot" and not self.rot():
                fault = "all"
            self.start()
        self.faults[fault] += 1
        self.wait_until_it_trains(starts)

    @property
    def num_kills(self) -> int:
        """Faults that were a kill -9."""
        return sum(self.faults[name] for name in ("kill", "all", "rot"))


def differences(disturbed: Path, undisturbed: Path) -> list[str]:
    """What is not as it should be."""
    problems = []
    lines = {run: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (disturbed, undisturbed)}
    losses = {run: [(e["step"], e["loss"], e["grad_norm"]) for e in entries if e["kind"] == "train"] for run, entries in lines.items()}
    steps = [step for step, _, _ in losses[disturbed]]
    if steps != list(range(1, len(steps) + 1)):
        problems.append("metrics.jsonl does not hold every step once, in order")
    if unequal := [a[0] for a, b in zip(losses[disturbed], losses[undisturbed], strict=False) if a != b]:
        problems.append(f"{len(unequal)} losses differ, the first at step {unequal[0]}")
    if len(losses[disturbed]) != len(losses[undisturbed]):
        problems.append(f"{len(losses[disturbed])} steps against {len(losses[undisturbed])}")
    newest = [steps_in(run / "checkpoints")[0] for run in (disturbed, undisturbed)]
    for name in ("reader-0000.json", "reader-0001.json", "model.safetensors", "optimizer.safetensors"):
        first, second = ((path / name).read_bytes() for path in newest)
        if first != second:
            problems.append(f"{name} of the last checkpoints differ")
    return problems


def main() -> int:
    """Disturb, compare, report."""
    parser = argparse.ArgumentParser("python tests/soak.py", description="Train under random faults; compare with an undisturbed run.")
    parser.add_argument("--minutes", type=float, default=30, help="for the disturbed run (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=10**9, help="stop after so many kill -9 (default: only the time counts)")
    parser.add_argument("--seed", type=int, default=0, help="of corpus, model and faults (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "evals" / "results" / "soak.json", help="results (default: %(default)s)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="minrnn-soak-"))
    soak, end = Soak(folder, arguments.seed), time.monotonic() + 60 * arguments.minutes
    soak.start()
    try:
        soak.wait_until_it_trains(0)
        with tqdm(desc="kills", total=None if arguments.kills > 10**6 else arguments.kills) as bar:
            while time.monotonic() < end and soak.num_kills < arguments.kills:
                time.sleep(soak.draw.uniform(0.0, 1.5))
                soak.disturb(soak.draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0])
                bar.update(soak.num_kills - bar.n)
                bar.set_postfix(step=soak.last_step(), refresh=False)
        soak.end_all(signal.SIGTERM)
    finally:
        if soak.launcher is not None and soak.launcher.poll() is None:
            os.killpg(soak.launcher.pid, signal.SIGKILL)
    step = soak.last_step()
    undisturbed = folder / "undisturbed"
    subprocess.run(soak.command(undisturbed, "--train.steps", str(step)), env=ENVIRONMENT, check=True, stderr=subprocess.DEVNULL)
    cut = [int(number) for number in re.findall(r"warning: (\d+) lines of", soak.told())]
    results = {
        "command": f"python tests/soak.py --minutes {arguments.minutes:g} --kills {arguments.kills} --seed {arguments.seed}",
        "faults": dict(soak.faults),
        "kills": soak.num_kills,
        "starts": soak.num_starts(),
        "steps": step,
        "steps_repeated": sum(cut),
        "checkpoints_refused": len(re.findall(r"is not used", soak.told())),
        "problems": [*soak.problems, *differences(soak.run, undisturbed)],
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key not in ("machine", "versions")}, indent=1))
    if results["problems"]:
        print(f"the runs are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
