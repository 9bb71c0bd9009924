"""Workers share a sweep's runs: none is lost, none is trained twice at a time."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from minrnn.common.locks import lock
from minrnn.launch.sweep.branch import has_branch_point, start_branch
from minrnn.launch.sweep.leases import Lease, Leases, host
from minrnn.launch.sweep.runner import Hardware, Runner, train_command
from minrnn.pipeline.checkpoint import checkpoint_name, publish, read_manifest, write_file

# In place of training: counts its starts; runs of some names fail always, or the first time.
FAKE = """
import os, sys
folder, name = sys.argv[1:]
starts = os.path.join(folder, "starts-" + name)
with open(starts, "a") as file:
    file.write("x")
if name.startswith("bad") or (name.startswith("flaky") and os.path.getsize(starts) == 1):
    sys.exit("error: the disk is on fire")
if name.startswith("refused"):
    print("error: optim.lr: is too high")
    sys.exit(2)
"""


def entry(name: str, **fields: Any) -> dict[str, Any]:
    run = {"name": name, "settings": {}, "sizes": {}, "trunk": None, "branch_step": 0, "save_at": []}
    return {**run, "flops": 1.0, "steps": 1, **fields}


def runner(folder: Path, runs: list[dict[str, Any]], program: str = FAKE, **options: Any) -> Runner:
    def command(run: dict[str, Any], recipe: Path) -> list[str]:
        assert recipe.exists()
        return [sys.executable, "-c", program, str(folder), run["name"]]

    leases = options.pop("leases", None) or Leases(folder / "leases", interval=0.05)
    return Runner(folder, runs, {}, command, options.pop("retries", 2), leases, poll=0.02)


def work(runners: list[Runner]) -> None:
    threads = [
        threading.Thread(target=each.work, args=(Hardware(str(i)),), daemon=True)
        for i, each in enumerate(runners)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for each in runners:
        assert not each.errors


def test_workers_train_every_run_once(tmp_path: Path):
    runs = [entry(f"run{i}") for i in range(6)]
    work([runner(tmp_path, runs) for _ in range(3)])
    assert {path.name: path.read_text() for path in tmp_path.glob("starts-*")} == {
        f"starts-run{i}": "x" for i in range(6)
    }
    states = Leases(tmp_path / "leases").survey(run["name"] for run in runs)
    assert all(state.is_done and not state.is_held for state in states.values())


def test_two_workers_train_different_runs_at_the_same_time(tmp_path: Path):
    """Each of the first two runs ends only after the other has begun."""
    program = """
import os, sys, time
folder, name = sys.argv[1:]
with open(os.path.join(folder, "starts-" + name), "a") as file:
    file.write("x")
other = {"run0": "run1", "run1": "run0"}.get(name, name)
end = time.monotonic() + 60
while not os.path.exists(os.path.join(folder, "starts-" + other)):
    if time.monotonic() > end:
        sys.exit("error: no other worker")
    time.sleep(0.01)
"""
    runs = [entry(f"run{i}", flops=9.0 - i) for i in range(5)]
    work([runner(tmp_path, runs, program) for _ in range(2)])
    assert [(tmp_path / f"starts-run{i}").read_text() for i in range(5)] == ["x"] * 5
    leases = Leases(tmp_path / "leases").survey(run["name"] for run in runs)
    workers = [leases[f"run{i}"].content["worker"].split("@")[0] for i in range(2)]
    assert sorted(workers) == ["0", "1"]


def test_a_run_that_fails_is_tried_again_then_marked_and_the_others_go_on(tmp_path: Path):
    runs = [entry("bad", flops=9.0), entry("flaky", flops=5.0), entry("good"), entry("refused")]
    runs.append(entry("branch", trunk="bad", branch_step=3))
    work([runner(tmp_path, runs)])
    starts = {path.name: len(path.read_text()) for path in tmp_path.glob("starts-*")}
    expected = {"bad": 3, "flaky": 2, "good": 1, "branch": 1, "refused": 1}
    assert starts == {f"starts-{name}": number for name, number in expected.items()}
    refused = json.loads((tmp_path / "failed" / "refused.json").read_text())["failures"]
    assert refused == ["error: optim.lr: is too high (exit status 2)"]
    failures = json.loads((tmp_path / "failed" / "bad.json").read_text())["failures"]
    assert failures == ["error: the disk is on fire (exit status 1)"] * 3
    assert not (tmp_path / "failed" / "flaky.json").exists()
    log = (tmp_path / "logs" / "branch.log").read_text()
    assert "branch starts from the beginning, with the same result: no checkpoint of bad at step 3" in log


def test_the_run_of_a_dead_worker_is_taken_over(tmp_path: Path):
    first = runner(tmp_path, [entry("run")])
    (tmp_path / "leases" / "run.000001").write_text(
        json.dumps({"worker": "0", "host": host(), "pid": 2**22 + 1, "started": 0.0, "heartbeat": 7})
    )
    (tmp_path / "leases" / "run.000002").touch()  # one that died before it wrote its name
    assert first.states()["run"].is_held
    clock = [0.0]
    work(
        [
            runner(
                tmp_path,
                [entry("run")],
                leases=Leases(tmp_path / "leases", expiry=-1, clock=lambda: clock[0]),
            )
        ]
    )
    assert (tmp_path / "starts-run").read_text() == "x"


def test_a_lease_expires_when_its_heartbeat_stands_still_on_the_observers_clock(tmp_path: Path):
    clock = [0.0]
    leases = Leases(tmp_path, expiry=90.0, clock=lambda: clock[0])
    path = tmp_path / "run.000001"

    def is_held(heartbeat: int, after: float) -> bool:
        clock[0] += after
        path.write_text(
            json.dumps({"worker": "0", "host": "elsewhere", "pid": 1, "started": 0, "heartbeat": heartbeat})
        )
        return leases.survey(["run"])["run"].is_held

    assert is_held(1, 0)
    assert is_held(1, 80)
    assert is_held(2, 80)
    assert is_held(2, 80)
    assert not is_held(2, 80)
    assert is_held(3, 0)


def test_one_of_many_takes_a_run_and_learns_when_it_has_lost_it(tmp_path: Path):
    leases = [Leases(tmp_path, interval=0.02) for _ in range(8)]
    states = [each.survey(["run"])["run"] for each in leases]
    taken = [each.take("run", state, "w") for each, state in zip(leases, states, strict=True)]
    (lease,) = [each for each in taken if isinstance(each, Lease)]
    state = leases[0].survey(["run"])["run"]
    assert state.is_held
    assert state.content["pid"] == os.getpid()
    second = leases[1].take("run", state, "w")
    assert second is not None
    assert lease.is_lost.wait(20)
    second.end("done")
    lease.end("stopped")
    assert leases[2].survey(["run"])["run"].is_done


def test_a_run_whose_folder_is_locked_is_left_alone(tmp_path: Path):
    """Training goes on when its worker was killed."""
    own = runner(tmp_path, [entry("run")])
    own.run_dir("run").mkdir()
    thread = threading.Thread(target=own.work, args=(Hardware("0"),), daemon=True)
    with (own.run_dir("run") / ".lock").open("a") as file:
        lock(file, wait=False)
        thread.start()
        time.sleep(0.2)
        assert not (tmp_path / "starts-run").exists()
    thread.join(60)
    assert (tmp_path / "starts-run").read_text() == "x"


def test_a_stopped_worker_stops_training_which_is_no_failure(tmp_path: Path):
    program = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open(sys.argv[1] + "/ready", "w").close()
time.sleep(60)
"""
    own = runner(tmp_path, [entry("run")], program)
    thread = threading.Thread(target=own.work, args=(Hardware("0"),), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    own.stop.set()
    thread.join(60)
    state = own.states()["run"]
    assert (state.is_done, state.is_held, state.failures) == (False, False, [])
    assert state.content["outcome"] == "stopped"


def write_checkpoint(run: Path, step: int) -> None:
    """A valid checkpoint of a few bytes, and metrics up to step 9."""
    building = run / "building"
    building.mkdir(parents=True)
    names = ("model.safetensors", "optimizer.safetensors", "config.yaml")
    entries = dict(write_file(building / name, lambda path: path.write_text(path.name)) for name in names)
    (run / "checkpoints").mkdir()
    publish(building, run / "checkpoints" / checkpoint_name(step), {"step": step, "files": entries})
    lines = [json.dumps({"kind": "train", "step": each}) for each in range(1, 10)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_branch_starts_from_a_copy_of_the_trunks_checkpoint_and_metrics(tmp_path: Path):
    trunk, run = tmp_path / "trunk", tmp_path / "run"
    write_checkpoint(trunk, 5)
    assert has_branch_point(trunk, 5)
    assert not has_branch_point(trunk, 6)
    leftover = run / "checkpoints" / ".step-000005.copy"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    start_branch(trunk, run, 5)
    copy = run / "checkpoints" / "step-000005"
    assert read_manifest(copy) == read_manifest(trunk / "checkpoints" / "step-000005")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 6)
    ]
    (run / "metrics.jsonl").write_text("")
    start_branch(trunk, run, 5)  # it has begun
    assert (run / "metrics.jsonl").read_text() == ""


def test_a_branch_refuses_a_damaged_checkpoint(tmp_path: Path):
    write_checkpoint(tmp_path / "trunk", 5)
    (tmp_path / "trunk" / "checkpoints" / "step-000005" / "model.safetensors").write_text("other")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        start_branch(tmp_path / "trunk", tmp_path / "run", 5)
    assert not (tmp_path / "run").exists()


def test_a_branch_waits_for_its_trunk_and_its_recipe_changes_the_schedule_only(tmp_path: Path):
    program = """
import os, sys
folder, name = sys.argv[1:]
with open(os.path.join(folder, "order"), "a") as file:
    file.write(name + " ")
"""
    branch = entry("branch", trunk="trunk", branch_step=5, flops=9.0, settings={"optim.lr": 0.5})
    own = runner(tmp_path, [branch, entry("trunk")], program)
    write_checkpoint(own.run_dir("trunk"), 6)
    work([own])
    assert (tmp_path / "order").read_text() == "trunk branch "
    direct = yaml.safe_load((tmp_path / "recipes" / "branch.yaml").read_text())
    assert direct["optim"] == {"lr": 0.5}
    assert direct["run"] == {"change": [], "dir": str(own.run_dir("branch"))}
    other = runner(tmp_path / "other", [branch, entry("trunk")], program)
    write_checkpoint(other.run_dir("trunk"), 5)
    work([other])
    branched = yaml.safe_load((tmp_path / "other" / "recipes" / "branch.yaml").read_text())
    assert branched["run"]["change"] == ["optim.schedule_steps"]
    assert (other.run_dir("branch") / "checkpoints" / "step-000005").exists()


@pytest.mark.parametrize("has_gpus", [False, True])
def test_training_is_started_as_by_hand(tmp_path: Path, has_gpus: bool):
    recipe = tmp_path / "recipe.yaml"
    alone = train_command(1, None, has_gpus)({}, recipe)
    assert alone == [sys.executable, "-m", "minrnn.pipeline.train", "--config", str(recipe)]
    several = train_command(2, None, has_gpus)({}, recipe)
    assert several[1:3] == ["-m", "accelerate.commands.launch"]
    assert several[-4:] == alone[1:]
    assert ("--multi_gpu" in several) == has_gpus
    assert "my.yaml" in train_command(2, "my.yaml", has_gpus)({}, recipe)
