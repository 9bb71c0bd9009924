"""All engines and layouts compute the same steps. Each test launches real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import Values, losses, recipe_file
from safetensors.torch import load_file

from minrnn.pipeline.checkpoint import checkpoint_paths

Run = Callable[[Values], Path]
CPU = Path(__file__).parents[2] / "launch" / "accelerate" / "cpu.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.xdist_group("launcher")  # not in parallel: launchers use the same port


def ddp(processes: int, *more: str) -> list[str]:
    return ["--config_file", str(CPU), "--num_processes", str(processes), *more]


def zero(stage: int, processes: int = 2) -> list[str]:
    options = {
        "use_deepspeed": None,
        "zero_stage": stage,
        "num_processes": processes,
        "num_machines": 1,
        "mixed_precision": "no",
    }
    return [
        *(word for key, value in options.items() for word in (f"--{key}", str(value)) if word != "None"),
        "--dynamo_backend",
        "no",
    ]


def command(launcher: list[str], recipe: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launcher,
        "-m",
        "minrnn.pipeline.train",
        "--config",
        str(recipe),
        *overrides,
    ]


def launch(
    launcher: list[str], recipe: Path, *overrides: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run(
        command(launcher, recipe, *overrides),
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def reader_positions(folder: Path) -> dict[str, dict]:
    """The position of every reader in the newest checkpoint."""
    newest = checkpoint_paths(folder / "checkpoints")[0]
    return {path.name: json.loads(path.read_text()) for path in newest.glob("reader-*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_resumes_with_other_engines_and_layouts(
    values: Values, run_recipe: Run, tmp_path: Path, optimizer: str
):
    """One process, ZeRO-1, ZeRO-3, four processes, context parallel, ZeRO-2, ZeRO-0, one process, in fp32,
    most of them with micro-batches of one lane. Every step is as in an undisturbed run."""
    values["batch"]["readers"] = 4
    values["model"]["dropout"] = 0.0  # its masks differ if processes share a sequence
    values["optim"] |= {"schedule": "constant", "name": optimizer}
    values["train"] |= {"steps": 24, "save_every": None, "eval_every": 3}
    undisturbed = run_recipe(values)
    run_recipe(
        {**values, "run": {"dir": str(tmp_path / "resumed")}, "train": {**values["train"], "steps": 3}}
    )
    recipe, folder = recipe_file(values, tmp_path), tmp_path / "resumed"
    one_lane = ["--train.micro_lanes", "1"]
    stages = [
        (zero(1), one_lane, "ZeRO-1"),
        (zero(3), one_lane, "ZeRO-3"),
        (ddp(4), one_lane, "4 processes on cpu, DDP"),
        (ddp(2), ["--parallel.context", "2", *one_lane], "2 to a sequence"),
        (zero(2), ["--parallel.context", "2"], "ZeRO-2, 2 to a sequence"),
        (zero(0), one_lane, "ZeRO-0"),
    ]
    for i, (launcher, options, engine) in enumerate(stages):
        result = launch(launcher, recipe, "--run.dir", str(folder), "--train.steps", str(3 * i + 6), *options)
        assert result.returncode == 0, (engine, result.stderr[-3000:])
        assert engine in result.stderr
    values["run"]["dir"] = str(folder)
    run_recipe(values)
    for kind in ("train", "validation"):
        np.testing.assert_allclose(losses(folder, kind), losses(undisturbed, kind), rtol=0, atol=1e-5)
    assert reader_positions(folder) == reader_positions(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_takes_the_steps_of_one_process_with_muon(
    values: Values, run_recipe: Run, tmp_path: Path, stage: int
):
    """From the first step, without a checkpoint of another engine; with options of the block."""
    values["model"] |= {"dropout": 0.0, "output_norm": True, "residual_scales": True, "logit_softcap": 15}
    values["model"] |= {"attention_every": 2, "attention_window": 20}
    values["optim"] |= {"name": "muon", "z_loss": 1e-3, "cautious_decay": True}
    values["train"] |= {"steps": 6, "save_every": None, "eval_every": None, "sample_tokens": 0}
    single = run_recipe(values)
    folder = tmp_path / "zero"
    result = launch(zero(stage), recipe_file(values, tmp_path), "--run.dir", str(folder))
    assert result.returncode == 0, result.stderr[-3000:]
    np.testing.assert_allclose(losses(folder), losses(single), rtol=0, atol=2e-5)
    weights, expected = (load_file(path / "model" / "model.safetensors") for path in (folder, single))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_context_parallel_is_exact_in_fp64(values: Values, run_recipe: Run, tmp_path: Path, optimizer: str):
    """Two groups of two processes give the losses, validations and positions of a single process."""
    values["model"]["dropout"] = 0.0
    values["optim"]["name"] = optimizer
    values["train"] |= {"precision": "fp64", "steps": 20, "save_every": 10, "eval_every": 10}
    single = run_recipe(values)
    two = launch(
        ddp(4), recipe_file(values, tmp_path), "--parallel.context", "2", "--run.dir", str(tmp_path / "two")
    )
    assert two.returncode == 0, two.stderr[-3000:]
    for kind in ("train", "validation"):
        np.testing.assert_allclose(losses(tmp_path / "two", kind), losses(single, kind), rtol=1e-10)
    assert reader_positions(tmp_path / "two") == reader_positions(single)


def metrics_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def workers(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of a launcher's training processes, by rank."""
    pids = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) != process.pid:
                continue
            environment = dict(
                pair.split("=", 1) for pair in (path / "environ").read_text().split("\0") if "=" in pair
            )
            pids[int(environment["RANK"])] = int(path.name)
        except (OSError, KeyError, ValueError):
            continue
    return pids


@pytest.fixture
def background() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts launchers, and kills them at the end."""
    processes = []

    def start(words: list[str], folder: Path, **more: str) -> subprocess.Popen[str]:
        environment = ENVIRONMENT | more
        with (folder / "stderr.txt").open("w") as stderr:
            processes.append(
                subprocess.Popen(words, env=environment, stderr=stderr, text=True, start_new_session=True)
            )
        return processes[-1]

    yield start
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.mark.slow
def test_deepspeed_starts_after_a_kill_during_its_compilation(values: Values, tmp_path: Path, background):
    """The killed process leaves torch's file `lock` behind. The next launch must not wait for its removal."""
    values["train"] |= {"steps": 3, "save_every": None, "eval_every": None, "sample_tokens": 0}
    folder, recipe = tmp_path / "extensions", recipe_file(values, tmp_path)
    environment = {"TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu"}
    process = background(command(zero(1), recipe), tmp_path, **environment)
    wait_for(lambda: any(folder.rglob("lock")))
    for worker in workers(process).values():
        os.kill(worker, signal.SIGKILL)
    process.wait()
    assert any(folder.rglob("lock"))
    result = launch(zero(1), recipe, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not any(folder.rglob("lock"))


@pytest.mark.slow
def test_an_elastic_launcher_restarts_after_a_kill_and_after_a_hang(
    values: Values, run_recipe: Run, tmp_path: Path, background
):
    """One process is killed. Then one is stopped, and its peer names it and exits. The launcher restarts both
    times."""
    values["train"] |= {
        "steps": 600,
        "save_every": 20,
        "eval_every": None,
        "sample_tokens": 0,
        "peer_timeout": 20.0,
    }
    undisturbed = run_recipe({**values, "run": {"dir": str(tmp_path / "undisturbed")}})
    folder = Path(values["run"]["dir"])
    process = background(
        command(ddp(2, "--max_restarts", "5", "--monitor_interval", "0.5"), recipe_file(values, tmp_path)),
        tmp_path,
    )
    wait_for(lambda: metrics_lines(folder) > 25)
    os.kill(workers(process)[1], signal.SIGKILL)
    wait_for(lambda: "going on from step" in (tmp_path / "stderr.txt").read_text())
    os.kill(workers(process)[1], signal.SIGSTOP)
    assert process.wait(1200) == 0, (tmp_path / "stderr.txt").read_text()[-3000:]
    stderr = (tmp_path / "stderr.txt").read_text()
    assert "error: training: rank 0: nothing has moved for 20 seconds; waiting for rank 1 on" in stderr
    assert [step for step, _ in losses(folder)] == list(range(1, 601))
    np.testing.assert_allclose(losses(folder)[:20], losses(undisturbed)[:20], atol=1e-5)
    assert reader_positions(folder) == reader_positions(undisturbed)


NAN_IN_ONE = """
import sys, os, torch
from minrnn.pipeline import loop
original = loop.take_step
def one_step(run, step, batch, num_scored):
    if step == 5 and os.environ["RANK"] == "1":
        run.data.readers[batch[0].reader].cache.layers[0].recurrent.fill_(float("nan"))
    return original(run, step, batch, num_scored)
loop.take_step = one_step
from minrnn.pipeline.train import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_nan_in_one_process_stops_or_is_skipped_by_both(values: Values, tmp_path: Path):
    script = tmp_path / "nan_in_one.py"
    script.write_text(NAN_IN_ONE)
    recipe = recipe_file(values, tmp_path)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        str(script),
        "--config",
        str(recipe),
    ]
    stopped = subprocess.run(
        launcher, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200, check=False
    )
    assert stopped.stderr.count("error: training: step 5: loss nan. In reader 1: ") == 1, stopped.stderr[
        -3000:
    ]
    folder = Path(values["run"]["dir"])
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-000004"]
    skipping = [*launcher, "--train.skip_spikes", "3.0", "--run.change", "[train.skip_spikes]"]
    resumed = subprocess.run(
        skipping, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200, check=False
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stderr.count("step 5 is left out: loss nan") == 1
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "skipped" in entry] == [5]
    assert [step for step, _ in losses(folder)] == list(range(1, 13))
    assert np.isfinite(losses(folder)[-1][1])


@pytest.mark.slow
def test_all_conflicts_with_deepspeed_are_reported_once(values: Values, tmp_path: Path):
    values["train"] |= {"precision": "fp64", "skip_spikes": 2.0}
    config = {
        "train_micro_batch_size_per_gpu": 7,
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }
    (tmp_path / "deepspeed.json").write_text(json.dumps({**config, "optimizer": {"type": "Adam"}}))
    launcher = [
        "--use_deepspeed",
        "--deepspeed_config_file",
        str(tmp_path / "deepspeed.json"),
        "--num_processes",
        "2",
    ]
    stderr = launch(
        [*launcher, "--num_machines", "1", "--dynamo_backend", "no"],
        recipe_file(values, tmp_path),
        "--parallel.context",
        "5",
    ).stderr
    for error in (
        "error: parallel.context: 2 processes cannot form groups of 5",
        "error: batch.chunk: 24 tokens must divide by the 5 processes of parallel.context",
        "error: train.precision: fp64 is for DDP",
        "error: train.skip_spikes: is for DDP",
        "error: deepspeed.train_micro_batch_size_per_gpu: is 7 in",
        "error: deepspeed.optimizer: ",
        "error: deepspeed.bf16: is enabled in",
    ):
        assert stderr.count(error) == 1, stderr[-3000:]
