"""The launcher's engines are supported, or refused before the processes are connected."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from run_helpers import Values, recipe_file
from test_engines import launch

from minrnn.common.errors import UserError
from minrnn.pipeline import launcher_engines
from minrnn.pipeline.launch_checks import check_launch
from minrnn.pipeline.launcher_engines import ENGINES, SUPPORTED, check_engine, engine_errors
from minrnn.pipeline.recipe import build_recipe

PARALLELISM = [
    "--use_fsdp",
    "--fsdp_version",
    "2",
    "--use_parallelism_config",
    "--parallelism_config_tp_size",
    "2",
]
REQUESTS = {  # options for `accelerate launch`, and the feature that the error names
    "FSDP": (["--use_fsdp"], ["FSDP"]),
    "Megatron-LM": (["--use_megatron_lm"], ["Megatron-LM"]),
    "tensor parallelism": (PARALLELISM, ["FSDP", "a parallelism config (tp_size 2)"]),
    "dynamo": (
        ["--multi_gpu", "--dynamo_backend", "inductor"],
        ["torch.compile of the whole model (dynamo_backend inductor)"],
    ),
    "nvme": (
        ["--use_deepspeed", "--zero_stage", "3", "--offload_param_device", "nvme"],
        ["DeepSpeed's offload to nvme"],
    ),
}


def environment_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that `accelerate launch` with these options gives to its processes."""
    environments = []
    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.run.run", lambda arguments: environments.append(dict(os.environ)))
        command = [
            *words,
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "-m",
            "minrnn.pipeline.train",
        ]
        launch_command(launch_command_parser().parse_args(command))
    return environments[0]


def refusals(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> list[str]:
    with monkeypatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        patched.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError) as raised:
            check_launch(build_recipe({"batch": {"readers": 2}}))
    assert not torch.distributed.is_initialized()
    return str(raised.value).splitlines()


@pytest.mark.parametrize("name", REQUESTS)
def test_unsupported_options_of_accelerate_are_refused(name: str, monkeypatch):
    words, expected = REQUESTS[name]
    lines = refusals(monkeypatch, environment_of(words, monkeypatch))
    assert len(lines) == len(expected)
    for line, feature in zip(lines, expected, strict=True):
        assert line.startswith(f"error: launcher: asks for {feature}; minrnn has {ENGINES}: ")


def test_unsupported_environments_without_a_launcher_are_refused(monkeypatch):
    for environment, feature in (
        ({"ACCELERATE_USE_SAGEMAKER": "true"}, "SageMaker"),
        ({"ACCELERATE_IN_TPU_POD": "1"}, "XLA"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision is fp8"),
    ):
        (line,) = refusals(monkeypatch, environment)
        assert feature in line
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ((_, message),) = engine_errors("cpu", 1)
    assert message.startswith("asks for 4 processes of MPI")


DEVICES = {  # types that Accelerate names after a device with several processes
    **{
        DistributedType(f"MULTI_{name}"): name.lower()
        for name in ("NPU", "MLU", "SDAA", "MUSA", "XPU", "HPU", "NEURON")
    },
    DistributedType.XLA: "xla",
}
BY_OPTION = {DistributedType.FSDP: "FSDP", DistributedType.MEGATRON_LM: "Megatron-LM"}


@pytest.mark.parametrize("kind", list(DistributedType))
def test_every_distributed_type_is_supported_or_refused(kind: DistributedType):
    """Before and after connecting. A new type in a later Accelerate fails here until it is classified."""
    if kind in SUPPORTED:
        check_engine(kind)
        return
    with pytest.raises(UserError, match=f"connected as {kind.value}"):
        check_engine(kind)
    if kind in DEVICES:
        ((_, message),) = engine_errors(DEVICES[kind], 2)
        assert f"asks for 2 processes on {DEVICES[kind]}" in message
    else:
        assert BY_OPTION[kind] in REQUESTS


def test_supported_environments_are_not_refused(monkeypatch):
    for words in (["--multi_gpu"], ["--use_deepspeed", "--zero_stage", "3", "--offload_param_device", "cpu"]):
        environment = environment_of([*words, "--dynamo_backend", "no"], monkeypatch)
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            assert engine_errors("cpu", 2) == engine_errors("cuda", 2) == []
    assert engine_errors("npu", 1) == [], "one process is no engine"


def test_parts_of_a_deepspeed_file_that_change_the_engine(tmp_path: Path):
    zero = {
        "stage": 3,
        "overlap_comm": True,
        "zero_hpz_partition_size": 1,
        "offload_param": {"device": "cpu"},
    }
    good = {"zero_optimization": zero, "train_batch_size": "auto", "steps_per_print": 100}
    assert launcher_engines.deepspeed_key_errors(good, "x.json") == []
    variant = {
        **zero,
        "zero_quantized_gradients": True,
        "mics_shard_size": 4,
        "offload_optimizer": {"device": "nvme"},
    }
    bad = {
        **good,
        "tensor_parallel": {"autotp_size": 2},
        "pipeline": {"stages": 2},
        "zero_optimization": variant,
    }
    assert [key for key, _ in launcher_engines.deepspeed_key_errors(bad, "x.json")] == [
        "deepspeed.tensor_parallel",
        "deepspeed.pipeline",
        "deepspeed.zero_optimization.zero_quantized_gradients",
        "deepspeed.zero_optimization.mics_shard_size",
        "deepspeed.zero_optimization.offload_optimizer.device",
    ]


@pytest.mark.slow
def test_fsdp_is_refused_with_one_message(values: Values, tmp_path: Path):
    done = launch(
        ["--use_fsdp", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"],
        recipe_file(values, tmp_path),
    )
    assert done.returncode != 0
    assert done.stderr.count("error: launcher: asks for FSDP; minrnn has one process, DDP on CPUs") == 1, (
        done.stderr[-2000:]
    )
    assert not Path(values["run"]["dir"]).exists()
