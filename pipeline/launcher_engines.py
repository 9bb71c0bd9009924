"""The launcher's engines that minrnn supports. Others are refused before the processes are connected.

Accelerate takes an engine from its configuration file, from options and from the environment, and silently
wraps the model in it. With an engine that minrnn does not know, the replicas would diverge, and only one of
the shards would be saved.
"""

import os
from collections.abc import Iterator
from typing import Any

from accelerate.utils import DistributedType, is_torch_xla_available

from ..common.errors import UserError

Errors = list[tuple[str, str]]
ENGINES = "one process, DDP on CPUs or CUDA/ROCm GPUs, and DeepSpeed ZeRO 0 to 3"
SUPPORTED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
}
DEVICES = {"cpu", "cuda", "mps"}  # MPS for one process only (processes.local_device)

# Keys of a DeepSpeed configuration that were tested, or only affect reports. `launch_checks` and DeepSpeed
# check their values.
DEEPSPEED_KEYS = {
    *(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ),
    *(
        "optimizer",
        "scheduler",
        "bf16",
        "fp16",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ),
    *(
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "comms_logger",
        "flops_profiler",
    ),
    *("tensorboard", "csv_monitor", "wandb"),
}
ZERO_VARIANTS = {  # keys of zero_optimization, with the values that disable them
    "zero_hpz_partition_size": (1,),
    "zero_quantized_weights": (False,),
    "zero_quantized_nontrainable_weights": (False,),
    "zero_quantized_gradients": (False,),
    "zeropp_loco_param": (None,),
    "mics_shard_size": (-1, 0, 1),
    "zenflow": (None,),
}


def engine_errors(device_type: str, num_processes: int) -> Errors:
    """An error for each feature that the launcher requests and minrnn does not support.

    Args:
        device_type: of this process's device, as torch names it.
    """
    return [
        ("launcher", f"asks for {feature}; minrnn has {ENGINES}: {advice}")
        for feature, advice in _unsupported(device_type, num_processes)
    ]


def check_engine(distributed_type: DistributedType) -> None:
    """Check the engine that Accelerate has connected, in case `engine_errors` missed a feature.

    Raises:
        UserError: the engine is not supported.
    """
    if distributed_type not in SUPPORTED:
        message = f"connected as {distributed_type.value}; minrnn has {ENGINES}"
        raise UserError("launcher", f"{message}: change the launcher's configuration")


def deepspeed_key_errors(config: dict[str, Any], source: str) -> Errors:
    """An error for each key of a DeepSpeed configuration that changes the engine into one that was not
    tested.

    Args:
        source: of the configuration, for messages.
    """
    keys = [key for key in config if key not in DEEPSPEED_KEYS]
    zero = config.get("zero_optimization", {})
    keys += [
        f"zero_optimization.{key}" for key, off in ZERO_VARIANTS.items() if zero.get(key, off[0]) not in off
    ]
    for part in ("offload_optimizer", "offload_param"):
        device = (zero.get(part) or {}).get("device", "none")
        keys += [f"zero_optimization.{part}.device"] if device not in ("none", "cpu", "auto", None) else []
    message = f"is set in {source}, but was not tried with minrnn (it has {ENGINES}); remove it"
    return [(f"deepspeed.{key}", message) for key in keys]


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes", "on", "y", "t")


def _unsupported(device_type: str, num_processes: int) -> Iterator[tuple[str, str]]:
    """(requested feature, what to do instead)."""
    sharding = "launch/accelerate/zero3.yaml shards weights, gradients and moments alike"
    if _is_on("ACCELERATE_USE_FSDP"):
        yield "FSDP", f"take it out of the launcher's configuration; {sharding}"
    if _is_on("ACCELERATE_USE_MEGATRON_LM"):
        yield "Megatron-LM", f"take it out of the launcher's configuration; {sharding}"
    if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = [
            f"{name} {os.environ[key]}"
            for name, key in _parallel_sizes()
            if os.environ.get(key, "1") not in ("1", "")
        ]
        instead = "parallel.context of the recipe shares a sequence among processes"
        yield (
            f"a parallelism config ({', '.join(sizes) or 'all sizes 1'})",
            f"take it out of the launcher's configuration; {instead}",
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        backend = os.environ["ACCELERATE_DYNAMO_BACKEND"].lower()
        yield (
            f"torch.compile of the whole model (dynamo_backend {backend})",
            "say no there; train.compile compiles each block",
        )
    if _is_on("ACCELERATE_USE_SAGEMAKER"):
        yield "SageMaker's launcher", "start with accelerate launch or torchrun"
    if _is_on("ACCELERATE_IN_TPU_POD") or is_torch_xla_available():
        yield "XLA (torch_xla is installed)", "set USE_TORCH_XLA=0, or use an environment without torch_xla"
    for part in ("OPTIMIZER", "PARAM"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none")
        if _is_on("ACCELERATE_USE_DEEPSPEED") and device not in ("none", "cpu"):
            yield f"DeepSpeed's offload to {device}", f"set offload_{part.lower()}_device to cpu or none"
    mpi = max(
        int(os.environ.get(name, "1")) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    if mpi > 1 and "WORLD_SIZE" not in os.environ:
        yield f"{mpi} processes of MPI", "start them with accelerate launch or torchrun"
    if num_processes > 1 and device_type not in DEVICES:
        yield f"{num_processes} processes on {device_type}", "start one, or use CPUs"


def _parallel_sizes() -> list[tuple[str, str]]:
    names = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
    return [(name, f"PARALLELISM_CONFIG_{name.upper()}") for name in names]
