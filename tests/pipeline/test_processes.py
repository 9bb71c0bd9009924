"""Real processes: several at once, and killed ones."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_helpers import Values, losses, recipe_file

Run = Callable[[Values], Path]
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.xdist_group("launcher")  # not in parallel: launchers use the same port


def launch(recipe: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Train a recipe file through `accelerate launch`, to its end."""
    config = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"
    launcher = (
        ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes), "-m"]
        if processes > 1
        else []
    )
    command = [sys.executable, "-m", *launcher, "minrnn.pipeline.train", "--config", str(recipe), *overrides]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(values: Values, run_recipe: Run, tmp_path: Path):
    """In fp64 with dropout: 1 process, 2 processes, and 2 processes whose run 1 process finishes."""
    values["train"] |= {"precision": "fp64", "steps": 20, "save_every": 10}
    single = run_recipe(values)
    two = launch(recipe_file(values, tmp_path), "--run.dir", str(tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    assert "2 processes on cpu, DDP, fp64" in two.stderr
    for kind in ("train", "validation"):
        np.testing.assert_allclose(losses(tmp_path / "two", kind), losses(single, kind), rtol=1e-9)
    half = ("--run.dir", str(tmp_path / "half"))
    assert (
        launch(
            recipe_file(values, tmp_path),
            *half,
            "--optim.schedule",
            "constant",
            "--train.steps",
            "10",
            processes=2,
        ).returncode
        == 0
    )
    values["optim"]["schedule"], values["run"]["dir"] = "constant", str(tmp_path / "half")
    run_recipe(values)
    undisturbed = run_recipe({**values, "run": {"dir": str(tmp_path / "undisturbed")}})
    np.testing.assert_allclose(losses(tmp_path / "half"), losses(undisturbed), rtol=1e-9)
    reader = (tmp_path / "two" / "checkpoints" / "step-000020" / "reader-0001.json").read_text()
    assert json.loads(reader) == json.loads(
        (single / "checkpoints" / "step-000020" / "reader-0001.json").read_text()
    )


@pytest.mark.slow
def test_two_processes_report_an_error_once(values: Values, tmp_path: Path):
    values["batch"]["readers"] = 3
    stderr = launch(recipe_file(values, tmp_path), processes=2).stderr
    assert stderr.count("error: batch.readers: 3 readers cannot be shared evenly by 2 processes") == 1


@pytest.mark.slow
def test_recipes_that_differ_between_machines_are_refused(values: Values, tmp_path: Path):
    """Each rank reads its own recipe from the same path, as on machines with separate disks."""
    for rank, lanes in enumerate((2, 3)):
        (tmp_path / f"recipe-{rank}.yaml").write_text(
            yaml.safe_dump({**values, "batch": {**values["batch"], "lanes": lanes}})
        )
    program = tmp_path / "own_recipe.py"
    program.write_text(
        "import os\nfrom minrnn.pipeline.train import main\n"
        f"main(['--config', {str(tmp_path)!r} + '/recipe-' + os.environ['RANK'] + '.yaml'])\n"
    )
    config = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(program)]
    ended = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200, check=False
    )
    assert ended.returncode != 0
    assert (
        ended.stderr.count(
            "error: batch.lanes: is 2 on rank 0, but 3 on rank 1; give all machines the same recipe"
        )
        == 1
    )
    assert not Path(values["run"]["dir"]).exists()


@pytest.mark.slow
def test_a_failed_write_of_the_main_process_is_reported_once_and_ends_all(values: Values, tmp_path: Path):
    """A folder has the name of the temporary file of config.yaml, which rank 0 writes while the other rank
    waits."""
    (tmp_path / "run" / ".config.yaml.part").mkdir(parents=True)
    result = launch(recipe_file(values, tmp_path), processes=2)
    assert result.returncode == 1
    assert result.stderr.count("error: training: [Errno 21] Is a directory") == 1, result.stderr
    assert "broadcast" not in result.stderr  # the error of a process that waited for one that exited


@pytest.mark.slow
def test_sigkill_at_random_times(values: Values, run_recipe: Run, tmp_path: Path):
    """The same command, started again and again, gives the metrics of an undisturbed run."""
    values["train"] |= {"steps": 300, "save_every": 15, "eval_every": 100, "sample_tokens": 0}
    values["data"]["workers"] = 1
    undisturbed = run_recipe({**values, "run": {"dir": str(tmp_path / "undisturbed")}})
    recipe, draw, kills = recipe_file(values, tmp_path), random.Random(0), 0
    command = [sys.executable, "-m", "minrnn.pipeline.train", "--config", str(recipe)]
    metrics = Path(values["run"]["dir"]) / "metrics.jsonl"
    while kills < 6:
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        reached = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        while process.poll() is None and (
            not metrics.exists() or len(metrics.read_text().splitlines()) <= reached
        ):
            time.sleep(0.01)
        try:
            process.wait(draw.uniform(0.0, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
            process.wait()
            continue
        if process.returncode == 0:
            break
    assert kills >= 2
    run_recipe(values)
    for kind in ("train", "validation"):
        assert losses(metrics.parent, kind) == losses(undisturbed, kind)


KILLER = """
import os, signal, sys
from minrnn.pipeline import checkpoint
original = checkpoint.sync
def sync(path):
    if path.parent.name == ".step-000008.building" and path.name == sys.argv[1]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path)
checkpoint.sync = sync
from minrnn.pipeline.train import main
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reader-0000.json", "model.safetensors", "manifest.json"])
def test_sigkill_while_saving(values: Values, run_recipe: Run, tmp_path: Path, name: str):
    """Killed while a reader's position, the weights or the manifest is half written."""
    undisturbed = run_recipe({**values, "run": {"dir": str(tmp_path / "undisturbed")}})
    recipe = recipe_file(values, tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, name, "--config", str(recipe)],
        env=ENVIRONMENT,
        check=False,
        timeout=600,
    )
    assert killed.returncode == -signal.SIGKILL
    folder = Path(values["run"]["dir"])
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))] == ["step-000004"]
    assert losses(run_recipe(values)) == losses(undisturbed)


@pytest.mark.slow
def test_sigterm_to_the_group_and_a_second_interrupt(values: Values, tmp_path: Path):
    values["train"] |= {"steps": 100_000, "save_every": None, "eval_every": None}
    values["data"]["workers"] = 1
    command = [sys.executable, "-m", "minrnn.pipeline.train", "--config", str(recipe_file(values, tmp_path))]
    metrics = Path(values["run"]["dir"]) / "metrics.jsonl"

    def start() -> subprocess.Popen[str]:
        size = metrics.stat().st_size if metrics.exists() else 0
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= size):
            time.sleep(0.02)
        return process

    process = start()
    os.killpg(process.pid, signal.SIGTERM)
    stderr = process.communicate(timeout=600)[1]
    assert process.returncode == 128 + signal.SIGTERM, stderr[-2000:]
    assert "SIGTERM: saving after this step" in stderr
    assert "the same command goes on from there" in stderr
    saved = sorted((metrics.parent / "checkpoints").iterdir())
    process = start()
    process.send_signal(signal.SIGSTOP)  # so that both signals arrive before the step ends
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT
    assert set(saved) <= set((metrics.parent / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["> /dev/full 2> /dev/full", "2>&1 | head -c 1", "<&- >&- 2>&-"])
def test_failing_output_does_not_stop_training(values: Values, tmp_path: Path, redirection: str):
    """The exit status is the training's, and a data worker's messages do not end up in a file of the run."""
    values["data"]["workers"] = 1
    training = f'"$0" -m minrnn.pipeline.train --config {recipe_file(values, tmp_path)}'
    command = f"{training} {redirection}; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", command, sys.executable],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=1200,
        check=False,
    )
    folder = Path(values["run"]["dir"])
    assert ended.returncode == 0
    assert (folder / "model" / "model.safetensors").exists()
    assert (folder / ".lock").read_text() == ""
    assert [step for step, _ in losses(folder)] == list(range(1, 13))
