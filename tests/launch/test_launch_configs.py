"""Accelerate's own parser reads its configuration files. The Slurm script runs with stand-ins for Slurm's
commands."""

import os
import re
import shlex
import signal
import subprocess
import tomllib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from slurm import REPOSITORY, job_environment, requeued, signal_when
from torch.distributed.run import get_args_parser

from minrnn.launch.cli import main
from minrnn.pipeline import launch_checks
from minrnn.pipeline.recipe import read_recipe

CONFIGS = sorted((REPOSITORY / "launch" / "accelerate").glob("*.yaml"))
DOCUMENT = REPOSITORY / "docs" / "scaling.md"
SCRIPT = REPOSITORY / "launch" / "slurm" / "train.sbatch"
ZERO_STAGE = {"zero1": "1", "zero2": "2", "zero3": "3", "zero3-offload": "3", "cpu-zero2": "2"}


def command_in(path: Path) -> list[str]:
    """The `accelerate launch` command in a file's comment: the words after `launch`."""
    comment = " ".join(
        line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#")
    )
    match = re.search(
        r"accelerate launch (--config_file .*?-m minrnn\.pipeline\.train (?:--[a-z.]+ \S+ ?|\.\.\.)*)",
        comment.replace("\\", ""),
    )
    assert match, f"{path.name} shows no command"
    return shlex.split(match[1].replace("RANK", "1"))


@pytest.fixture
def dry_run(monkeypatch) -> Callable[[list[str]], tuple[Namespace, dict[str, str]]]:
    """`accelerate launch` up to torchrun: torchrun's arguments, and the environment of the processes."""
    monkeypatch.chdir(REPOSITORY)

    def run(words: list[str]) -> tuple[Namespace, dict[str, str]]:
        calls = []
        monkeypatch.setattr(
            "torch.distributed.run.run", lambda arguments: calls.append((arguments, dict(os.environ)))
        )
        launch_command(launch_command_parser().parse_args(words))
        return calls[0]

    return run


def test_every_engine_has_its_file():
    assert {path.stem for path in CONFIGS} == {"cpu", "ddp", "multi-node", *ZERO_STAGE}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_file_and_its_command(path: Path, dry_run):
    """Number of processes, stage and devices are as intended; what the recipe decides is left open."""
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert (config.mixed_precision, config.use_cpu) == ("no", False)
    words = command_in(path)
    assert words[words.index("--config_file") + 1] == str(path.relative_to(REPOSITORY))
    arguments, environment = dry_run(words)
    assert arguments.training_script == "minrnn.pipeline.train"
    assert int(arguments.nproc_per_node) * config.num_machines == config.num_processes
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    if path.stem.startswith("cpu"):
        assert environment["CUDA_VISIBLE_DEVICES"] == "-1,-1", "a machine's GPUs are not seen"
    if path.stem not in ZERO_STAGE:
        assert config.distributed_type == DistributedType.MULTI_GPU
        assert "ACCELERATE_USE_DEEPSPEED" not in environment
        return
    variables = {
        key.removeprefix("ACCELERATE_DEEPSPEED_"): value
        for key, value in environment.items()
        if key.startswith("ACCELERATE_")
    }
    assert (variables["ACCELERATE_USE_DEEPSPEED"], variables["ZERO_STAGE"]) == ("true", ZERO_STAGE[path.stem])
    assert variables["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in variables, "Accelerate reads it as a number"
    offloaded = "cpu" if path.stem == "zero3-offload" else "none"
    assert (
        variables.get("OFFLOAD_OPTIMIZER_DEVICE", "none")
        == variables.get("OFFLOAD_PARAM_DEVICE", "none")
        == offloaded
    )
    assert variables.get("ACCELERATE_USE_CPU", "false").lower() == "false"


@pytest.mark.parametrize("engine", ["multi-node", "zero1", "zero2", "zero3"])
def test_several_machines_connect_through_torchrun(engine: str, dry_run):
    """Not through DeepSpeed's own launcher, which needs ssh and a host file."""
    machines = (
        "--num_machines 4 --num_processes 32 --machine_rank 2 --main_process_ip first --main_process_port "
        "23456 --rdzv_backend c10d"
    )
    arguments, _ = dry_run(
        [
            "--config_file",
            f"launch/accelerate/{engine}.yaml",
            *machines.split(),
            "-m",
            "minrnn.pipeline.train",
        ]
    )
    assert (arguments.nnodes, arguments.nproc_per_node) == ("4", "8")
    assert (arguments.rdzv_endpoint, arguments.rdzv_backend) == ("first:23456", "c10d")


def commands_in_docs() -> list[str]:
    lines = (
        "\n".join(re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL))
        .replace("\\\n", " ")
        .splitlines()
    )
    return [
        command
        for line in lines
        if (command := line.split("#")[0].strip()) and not command.startswith("export ")
    ]


@pytest.mark.parametrize("command", commands_in_docs())
def test_the_commands_in_docs_parse(command: str, dry_run, capsys):
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    if words[:2] == ["accelerate", "launch"]:
        read_recipe(dry_run(words[2:])[0].training_script_args)
    elif words[0] == "torchrun":
        arguments = get_args_parser().parse_args(words[1:])
        assert (arguments.module, arguments.training_script) == (True, "minrnn.pipeline.train")
        read_recipe(arguments.training_script_args)
    elif words[0] == "sbatch":
        script = words.index("launch/slurm/train.sbatch")
        read_recipe(["--config", *words[script + 1 :]])
    else:
        assert words[:2] == ["minrnn", "plan"]
        main([*words[1:], "--vocab-size", "50264"])
        if "--tflops" not in words:
            assert capsys.readouterr().out in DOCUMENT.read_text()


def test_launch_files_are_in_the_package():
    """Every file of the folders is covered by the package data."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = REPOSITORY / "launch"
    shipped = {path for pattern in settings["package-data"]["minrnn.launch"] for path in folder.glob(pattern)}
    recipes = [path for kind in ("recipes", "sweeps", "ablations") for path in (folder / kind).glob("*.yaml")]
    assert shipped == {*CONFIGS, *recipes, SCRIPT, SCRIPT.with_name("sweep.sbatch")}


STANDINS = {
    "srun": """
trap 'kill -TERM $(jobs -p)' TERM
while [[ $1 == --* ]]; do echo "$1" >> "$LOG/srun"; shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do
    wait "$task" || status=$?
    while kill -0 "$task" 2>/dev/null; do status=0; wait "$task" || status=$?; done
done
exit $status
""",
    "scontrol": """
if [[ $1 == show ]]; then printf 'first\\nsecond\\n'; else echo "$@" >> "$LOG/scontrol"; fi
""",
    "squeue": 'echo "$JOB_STATE"',
    "accelerate": """
trap 'echo saved > "$LOG/saved.$SLURM_NODEID"; kill $(jobs -p); exit 1' TERM
printf '%s\\n' "$PET_RDZV_ID" "$PET_SHUTDOWN_TIMEOUT" "$@" > "$LOG/building.$SLURM_NODEID"
mv "$LOG/building.$SLURM_NODEID" "$LOG/launched.$SLURM_NODEID"
[[ $LASTS == 0 ]] || { sleep $LASTS & wait $!; }
exit $STATUS
""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two machines with four GPUs each."""
    return job_environment(
        tmp_path,
        STANDINS,
        SLURM_JOB_ID="4321",
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_GPUS_ON_NODE="4",
        SLURM_CPUS_PER_TASK="48",
    )


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_job_launches_the_recipe_on_every_machine(
    slurm: dict[str, str], tmp_path: Path, dry_run, monkeypatch
):
    done = submit(
        {**slurm, "ENGINE": "zero2", "SLURM_RESTART_COUNT": "3"}, "quickstart", "--run.dir", "runs/with space"
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        rendezvous, shutdown_timeout, command, *words = (
            (tmp_path / f"launched.{rank}").read_text().splitlines()
        )
        assert command == "launch"
        monkeypatch.setenv("PET_RDZV_ID", rendezvous)
        monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", shutdown_timeout)
        arguments, environment = dry_run(words)
        assert (arguments.node_rank, arguments.nnodes, arguments.nproc_per_node) == (rank, "2", "4")
        assert (arguments.rdzv_endpoint, arguments.rdzv_backend, arguments.max_restarts) == (
            "first:24321",
            "c10d",
            3,
        )
        assert (arguments.rdzv_id, arguments.shutdown_timeout) == ("4321-3", 150)
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
        assert read_recipe(arguments.training_script_args).run.dir == "runs/with space"
    assert not (tmp_path / "scontrol").exists()
    assert "--cpus-per-task=48" in (tmp_path / "srun").read_text().splitlines(), (
        "srun does not take it over from sbatch"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("state", "expected"), [("RUNNING", "requeue 4321\n"), ("COMPLETING", "")])
def test_a_signalled_job_saves_and_is_requeued(
    slurm: dict[str, str], tmp_path: Path, state: str, expected: str, number: signal.Signals
):
    """A cancelled job is not requeued, because its state is then completing."""
    command = ["bash", str(SCRIPT), "quickstart"]

    def has_started() -> bool:
        return len(list(tmp_path.glob("launched.*"))) == 2

    assert signal_when(has_started, number, command, {**slurm, "JOB_STATE": state}) != 0
    assert sorted(path.name for path in tmp_path.glob("saved.*")) == ["saved.0", "saved.1"]
    assert requeued(tmp_path) == expected


def test_a_failed_job_is_not_requeued(slurm: dict[str, str], tmp_path: Path):
    assert submit({**slurm, "STATUS": "7"}, "quickstart").returncode == 7
    assert not (tmp_path / "scontrol").exists()
    result = submit(slurm)
    assert result.returncode == 2
    assert "usage: sbatch" in result.stderr


@pytest.mark.parametrize(
    ("configured", "name_is_loopback", "message"),
    [
        (None, False, None),
        (None, True, "so the processes of other machines cannot reach it; set GLOO_SOCKET_IFNAME"),
        ("ib0", True, None),
        (
            "eth0,eth9",
            False,
            "GLOO_SOCKET_IFNAME says eth0,eth9, but .* has no eth9; set GLOO_SOCKET_IFNAME .* has lo, "
            "eth0, ib0",
        ),
    ],
)
def test_interfaces_that_others_cannot_reach_are_named(
    configured: str | None, name_is_loopback: bool, message: str | None
):
    errors = launch_checks._interface_errors(configured, ["lo", "eth0", "ib0"], name_is_loopback)
    assert len(errors) == (message is not None)
    assert message is None or re.search(message, errors[0][1])


def test_names_of_the_loopback_interface():
    assert launch_checks._is_loopback("localhost")
    assert launch_checks._is_loopback("no-such-host.invalid")
    assert not launch_checks._is_loopback("192.0.2.1")


def test_the_script_s_grace_is_that_of_its_signal():
    text = SCRIPT.read_text()
    assert re.findall(r"--signal=B:TERM@(\d+)|GRACE=(\d+)", text) == [("180", ""), ("", "180")]
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
