"""A run under random faults against an undisturbed one: `make soak`, or `python tests/soak --minutes 30 --kills 100`.

Two processes under an elastic launcher train a small model with a data worker each, and save in the background every few steps. Faults come
at random moments, those of saving included:

    kill         SIGKILL of one training process; the launcher starts both anew
    all          SIGKILL of the launcher and all its processes; the same command is given again
    preempt      SIGTERM to the launcher, as a scheduler preempts: the processes agree on a step, save and leave; the same command again
    SIGTERM, SIGINT, SIGHUP, SIGUSR1
                 to one training process: both save the same step and leave; the launcher starts them anew
    stop         SIGSTOP of one process: the other names it and leaves
    rot          with all dead, one bit of the newest checkpoint is flipped, or a file of it is cut short: it must not be used
    full disk    nothing can be written below the run's folder until a save has failed: training goes on, and the next checkpoint lands
    sync error   the same with fsync
    read error   with all dead, nothing can be read below the run's folder while the run starts: the newest checkpoint must be used after all

At the end the run is told to stop, and an undisturbed run takes as many steps. Losses and validations must be equal to the bit, every step
there once, every reader at the same place, the settings the same. Writes evals/results/soak.json and ends with status 1 if anything differs.
Faults of the disk need a C compiler.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from disturbed import ENVIRONMENT, EVAL_EVERY, REPOSITORY, WEIGHTS, DisturbedRun, command
from tqdm import tqdm

from minrnn.evals.record import commit, machine, versions
from minrnn.pipeline.checkpoint import steps_in

FREE = {"run.dir", "train.steps", "optim.schedule_steps"}  # settings that differ between the two runs


def _metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of a kind, without what the clock decides."""
    timed = {"tokens_per_second", "matmul_fraction", "seconds"}
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in entry.items() if key not in timed}
        for entry in entries
        if entry["kind"] == kind
    ]


def _settings(path: Path) -> dict[str, Any]:
    sections = yaml.safe_load(path.read_text()).items()
    flat = {f"{section}.{name}": value for section, fields in sections for name, value in fields.items()}
    return {key: value for key, value in flat.items() if key not in FREE}


def differences(disturbed: Path, undisturbed: Path) -> list[str]:
    """What is not as it should be."""
    errors = []
    for kind in ("train", "validation"):
        ours, others = _metrics(disturbed, kind), _metrics(undisturbed, kind)
        if kind == "validation":  # the undisturbed run validates after its last step, too
            ours, others = (
                [entry for entry in entries if entry["step"] % EVAL_EVERY == 0] for entries in (ours, others)
            )
        if kind == "train" and [entry["step"] for entry in ours] != list(range(1, len(ours) + 1)):
            errors.append("metrics.jsonl does not hold every step once, in order")
        if unequal := [a["step"] for a, b in zip(ours, others, strict=False) if a != b]:
            errors.append(f"{len(unequal)} {kind} lines differ, the first at step {unequal[0]}")
        if len(ours) != len(others):
            errors.append(f"{len(ours)} {kind} lines against {len(others)}")
    newest = [steps_in(run / "checkpoints")[0] for run in (disturbed, undisturbed)]
    for name in ("reader-0000.json", "reader-0001.json", "model.safetensors", "optimizer.safetensors"):
        first, second = ((path / name).read_bytes() for path in newest)
        if first != second:
            errors.append(f"{name} of the last checkpoints differ")
    for first, second in (
        (newest[0] / "config.yaml", newest[1] / "config.yaml"),
        (disturbed / "config.yaml", undisturbed / "config.yaml"),
    ):
        if _settings(first) != _settings(second):
            errors.append(f"the settings in {first.relative_to(disturbed)} differ")
    return errors


def main() -> int:
    """Disturb, compare, report."""
    parser = argparse.ArgumentParser(
        "python tests/soak", description="Train under random faults; compare with an undisturbed run."
    )
    parser.add_argument(
        "--minutes", type=float, default=30, help="for the disturbed run (default: %(default)s)"
    )
    parser.add_argument(
        "--kills", type=int, default=10**9, help="stop after so many kill -9 (default: only the time counts)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of corpus, model and faults (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=REPOSITORY / "evals" / "results" / "soak.json",
        help="results (default: %(default)s)",
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="minrnn-soak-"))
    soak, end = DisturbedRun(folder, arguments.seed), time.monotonic() + 60 * arguments.minutes
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
        soak.disk.switch_off()
        if soak.launcher is not None and soak.launcher.poll() is None:
            soak.end_all(signal.SIGKILL)
    step = soak.last_step()
    undisturbed = folder / "undisturbed"
    subprocess.run(
        command(soak.recipe, undisturbed, "--train.steps", str(step)),
        env=ENVIRONMENT,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    cut = [int(number) for number in re.findall(r"warning: (\d+) lines of", soak.output())]
    results = {
        "command": f"python tests/soak --minutes {arguments.minutes:g} --kills {arguments.kills} --seed {arguments.seed}",
        "faults": dict(soak.faults),
        "kills": soak.num_kills,
        "starts": soak.num_starts(),
        "steps": step,
        "steps_repeated": sum(cut),
        "checkpoints_refused": len(re.findall(r"is not used", soak.output())),
        "problems": [*soak.errors, *differences(soak.run, undisturbed)],
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(
        json.dumps(
            {key: value for key, value in results.items() if key not in ("machine", "versions")}, indent=1
        )
    )
    if results["problems"]:
        print(f"the runs are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
