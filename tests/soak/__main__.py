"""Compare a run under random faults with an undisturbed one: `make soak`, or `python tests/soak`.

Two processes under an elastic launcher train a small model, each with a data worker, and save in the
background every few steps. Faults happen at random moments, also during a save:

    kill         SIGKILL to one training process; the launcher restarts both
    all          SIGKILL to the launcher and all its processes; the same command is started again
    preempt      SIGTERM to the launcher, as at a preemption: the processes agree on a step, save and exit;
                 the same command is started again
    SIGTERM, SIGINT, SIGHUP, SIGUSR1
                 to one training process: both save the same step and exit; the launcher restarts them
    stop         SIGSTOP to one process: the other names it and exits
    rot          after `all`, one bit of the newest checkpoint is flipped, or a file of it is truncated; the
                 run must not use it
    full disk    writes below the run's folder fail until a save has failed: training continues, and the
                 next checkpoint is written
    sync error   the same for fsync
    read error   after `all`, reads below the run's folder fail while the run starts; the newest checkpoint
                 must be used in the end

At the end the run is stopped, and an undisturbed run takes the same number of steps. Losses and validations
must be equal to the bit, every step must be there once, and the positions of the readers and the settings
must be equal. Writes evals/results/soak.json. The exit status is 1 if anything differs. The faults of the
disk need a C compiler.
"""

import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from disturbed import ENVIRONMENT, EVAL_EVERY, WEIGHTS, DisturbedRun, command
from results import origin, soak_parser
from tqdm import tqdm

from minrnn.common.files import write_json
from minrnn.pipeline.checkpoint import checkpoint_paths

MAY_DIFFER = {"run.dir", "train.steps", "optim.schedule_steps"}  # settings


def _metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind, without measured times."""
    timed = {"tokens_per_second", "matmul_fraction", "data_seconds", "seconds"}
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in entry.items() if key not in timed}
        for entry in entries
        if entry["kind"] == kind
    ]


def _settings(path: Path) -> dict[str, Any]:
    sections = yaml.safe_load(path.read_text()).items()
    flat = {f"{section}.{name}": value for section, fields in sections for name, value in fields.items()}
    return {key: value for key, value in flat.items() if key not in MAY_DIFFER}


def differences(disturbed: Path, undisturbed: Path) -> list[str]:
    """Differences between the two runs, and steps that are missing or repeated."""
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
    newest = [checkpoint_paths(run / "checkpoints")[0] for run in (disturbed, undisturbed)]
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
    """Train under faults, train undisturbed, compare, write the results. Returns the exit status."""
    parser = soak_parser(
        "python tests/soak",
        "Train under random faults; compare with an undisturbed run.",
        "corpus, model and faults",
        "soak.json",
    )
    parser.add_argument(
        "--minutes", type=float, default=30, help="for the disturbed run (default: %(default)s)"
    )
    parser.add_argument(
        "--kills", type=int, default=10**9, help="stop after this number of kill -9 (default: no limit)"
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
    repeated = [int(number) for number in re.findall(r"warning: (\d+) lines of", soak.output())]
    options = f"--minutes {arguments.minutes:g} --kills {arguments.kills} --seed {arguments.seed}"
    results = {
        "command": f"python tests/soak {options}",
        "faults": dict(soak.faults),
        "kills": soak.num_kills,
        "starts": soak.num_starts(),
        "steps": step,
        "steps_repeated": sum(repeated),
        "checkpoints_refused": len(re.findall(r"is not used", soak.output())),
        "problems": [*soak.errors, *differences(soak.run, undisturbed)],
        **origin(),
    }
    write_json(arguments.out, results)
    summary = {key: value for key, value in results.items() if key not in ("machine", "versions")}
    print(json.dumps(summary, indent=1))
    if results["problems"]:
        print(f"the runs are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
