"""Checks of the launcher's environment against the recipe, before any process is connected.

Some settings exist in both: batch, clipping, precision, optimizer. The recipe decides. A setting that the
launcher leaves open ("auto" or missing) is filled in from the recipe; a different value is an error. All
errors are reported at once.
"""

import ipaddress
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..common.errors import UserError
from ..models.dtypes import DTYPES
from .config import Recipe
from .launcher_engines import deepspeed_key_errors, engine_errors
from .machine import device_name, supports
from .other_trackers import tracker_errors
from .processes import all_gather_objects, launcher_holds_store, local_device, uses_deepspeed, world_size
from .recipe import flatten, resolved_config

Errors = list[tuple[str, str]]


def check_launch(recipe: Recipe) -> None:
    """Check everything that this process can see without the others.

    Raises:
        UserError: all errors.
    """
    device, device_errors = _check_device(recipe)
    errors = (
        engine_errors(device.type, world_size())
        + layout_errors(recipe, world_size())
        + _precision_errors(recipe)
        + tracker_errors(recipe)
    )
    if uses_deepspeed():
        errors += _deepspeed_errors(recipe)
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if device_errors and local_rank == "0" != rank:  # rank 0, which prints errors, cannot see these
        print(*(f"error: {key}: {message}" for key, message in device_errors), sep="\n", file=sys.stderr)
    if errors or device_errors:
        raise UserError.from_list([*errors, *device_errors])


def check_same_recipe(recipe: Recipe, accelerator: Accelerator) -> None:
    """Check that all processes read the same recipe, since each reads it from its own machine. Collective.

    Raises:
        UserError: in every process, each setting that differs, and on which rank.
    """
    recipes = all_gather_objects(accelerator, [flatten(resolved_config(recipe))])
    errors: dict[str, str] = {}
    for rank, other in enumerate(recipes[1:], start=1):
        for key in recipes[0].keys() | other.keys():
            first, second = recipes[0].get(key), other.get(key)
            if first != second:
                message = (
                    f"is {first!r} on rank 0, but {second!r} on rank {rank}; give all machines the same "
                    "recipe"
                )
                errors.setdefault(key, message)
    if errors:
        raise UserError.from_list(sorted(errors.items()))


def layout_errors(recipe: Recipe, num_processes: int) -> Errors:
    """Whether processes, context groups, readers, lanes and chunks divide."""
    context, batch, micro_lanes = recipe.parallel.context, recipe.batch, recipe.train.micro_lanes
    errors: Errors = []
    if micro_lanes is not None and batch.lanes % micro_lanes:
        divisors = [str(n) for n in range(1, batch.lanes + 1) if batch.lanes % n == 0]
        message = f"{micro_lanes} does not divide batch.lanes {batch.lanes}; use {' or '.join(divisors)}"
        errors.append(("train.micro_lanes", message))
    if num_processes % context:
        message = f"{num_processes} processes cannot form groups of {context}"
        errors.append(("parallel.context", message))
    elif batch.readers % (groups := num_processes // context):
        sharing = f"{groups} groups of {context} processes" if context > 1 else f"{num_processes} processes"
        possible = [n * context for n in range(1, batch.readers + 1) if batch.readers % n == 0]
        message = f"{batch.readers} readers cannot be shared evenly by {sharing}"
        errors.append(("batch.readers", f"{message}; use {possible} processes or more readers"))
    reach, reader = _longest_reach(recipe)
    if context > 1 and (batch.chunk % context or batch.chunk // context < reach):
        message = f"{batch.chunk} tokens must divide by the {context} processes of parallel.context"
        if reach > 1:
            message += f" and leave each at least the {reach} tokens that the {reader} looks back"
        errors.append(("batch.chunk", message))
    return errors


def _longest_reach(recipe: Recipe) -> tuple[int, str]:
    """How many tokens before its own a layer of the model reads at once, and which layer that is."""
    fields = recipe.resolved_model_fields()
    reach = {"convolution": fields.get("conv_kernel", 0) - 1}
    if fields.get("attention_every"):
        reach["attention"] = fields["attention_window"] - 1
    return max((tokens, reader) for reader, tokens in reach.items())


def _machine_errors(device: torch.device) -> Errors:
    """Errors of this machine's part of the launch."""
    local_size, num_machines, max_restarts = (
        int(os.environ.get(name, "0"))
        for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")
    )
    errors: Errors = []
    if device.type != "cpu" and local_size > (num_devices := torch.accelerator.device_count()):
        message = f"started {local_size} processes on a machine with {num_devices} GPUs"
        errors.append(("launcher", f"{message}; lower --num_processes, or use train.device cpu"))
    if num_machines > 1 and max_restarts > 0 and launcher_holds_store():
        message = (
            "machines that restart their processes could meet in different places; use rdzv_backend c10d "
            "and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all of them, or max_restarts 0"
        )
        errors.append(("launcher", message))
    if num_machines > 1 and not _is_loopback(os.environ["MASTER_ADDR"]):
        configured = os.environ.get("GLOO_SOCKET_IFNAME")
        interfaces = [name for _, name in socket.if_nameindex()]
        errors += _interface_errors(configured, interfaces, _is_loopback(socket.gethostname()))
    return errors


def _is_loopback(host: str) -> bool:
    """Whether a name leads to this machine only."""
    try:
        addresses = [information[4][0] for information in socket.getaddrinfo(host, None)]
    except OSError:  # gloo uses the loopback interface then
        return True
    return all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in addresses)


def _interface_errors(configured: str | None, interfaces: list[str], name_is_loopback: bool) -> Errors:
    """Whether the processes of other machines can reach this machine over gloo.

    Args:
        configured: GLOO_SOCKET_IFNAME; without it, gloo uses the interface of the host's name.
        interfaces: of this machine.
        name_is_loopback: whether the host's name leads to the loopback interface.
    """
    host = socket.gethostname()
    advice = (
        f"set GLOO_SOCKET_IFNAME to the interface that the machines share ({host} has "
        f"{', '.join(interfaces)})"
    )
    if configured is None:
        reason = (
            f"the name {host} leads to {host} itself (127.0.0.1), so the processes of other machines cannot "
            "reach it"
        )
        return [("launcher", f"{reason}; {advice}")] if name_is_loopback else []
    if unknown := [name for name in configured.split(",") if name not in interfaces]:
        reason = f"GLOO_SOCKET_IFNAME says {configured}, but {host} has no {' and no '.join(unknown)}"
        return [("launcher", f"{reason}; {advice}")]
    return []


def _precision_errors(recipe: Recipe) -> Errors:
    """Whether the launcher's mixed precision is off or the recipe's."""
    launcher, own = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), recipe.train.precision
    if launcher in ("no", "", own):
        return []
    message = (
        f"is {own}, but the launcher's mixed_precision is {launcher}; leave it 'no' there, the recipe decides"
    )
    return [("train.precision", message)]


def _check_device(recipe: Recipe) -> tuple[torch.device, Errors]:
    """This process's device, and errors of the device and its machine."""
    try:
        device = local_device(recipe.train.device)
    except UserError as error:
        return torch.device("cpu"), error.errors
    if errors := _machine_errors(device):
        return device, errors
    if recipe.train.precision in DTYPES and not supports(device, recipe.train.precision):
        message = f"{device_name(device)} does not support {recipe.train.precision}"
        return device, [("train.precision", f"{message}; use train.precision auto")]
    return device, []


def deepspeed_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's batch and clipping as keys of a DeepSpeed configuration."""
    batch = recipe.batch
    lanes = recipe.train.micro_lanes or batch.lanes
    micro_batches = batch.readers * batch.backprop_chunks * (batch.lanes // lanes)
    accumulation = micro_batches * recipe.parallel.context // world_size()
    return {
        "train_micro_batch_size_per_gpu": lanes,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": lanes * accumulation * world_size(),
        "gradient_clipping": recipe.optim.clip or 0.0,
    }


def _deepspeed_errors(recipe: Recipe) -> Errors:
    errors: Errors = []
    if recipe.train.precision == "fp64":
        errors.append(("train.precision", "fp64 is for DDP: DeepSpeed keeps its weights and moments in fp32"))
    if recipe.train.skip_spikes is not None:
        message = "is for DDP: DeepSpeed's ZeRO has shared out a batch's gradient before its loss is known"
        errors.append(("train.skip_spikes", message))
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        clip = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
        config: dict[str, Any] = {} if clip in ("none", "auto") else {"gradient_clipping": float(clip)}
        errors += _stage_errors(recipe, os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        return errors + _config_errors(recipe, config, "the launcher")
    try:
        config = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        return [*errors, ("deepspeed", f"cannot read {file}: {error}")]
    errors += _stage_errors(recipe, config.get("zero_optimization", {}).get("stage", 0))
    return errors + deepspeed_key_errors(config, file) + _config_errors(recipe, config, file)


def _stage_errors(recipe: Recipe, stage: int | str) -> Errors:
    """Settings that do not work with a stage of ZeRO.

    Stage 3 gathers weights ahead of their use, in an order that it learns from the passes before. With passes
    without gradients among them, it gathers in other blocks when they run again, and torch's selective
    checkpoints (2.13) refuse to allocate there ("encountered during backward but not found in storage").
    """
    if str(stage) != "3" or recipe.batch.backprop_chunks == 1 or recipe.train.recompute != "selective":
        return []
    message = "selective does not work with batch.backprop_chunks under ZeRO-3; use full or none, or ZeRO-2"
    return [("train.recompute", message)]


def _config_errors(recipe: Recipe, config: dict[str, Any], source: str) -> Errors:
    """Values of a DeepSpeed configuration that differ from the recipe.

    Args:
        source: of the configuration, for messages.
    """
    errors: Errors = []
    for key, own in deepspeed_values(recipe).items():
        value = config.get(key, "auto")
        if value != "auto" and float(value) != own:
            message = f"is {value} in {source}, but the recipe makes it {own}"
            errors.append((f"deepspeed.{key}", f"{message}; say auto there, or change the recipe"))
    for key in ("optimizer", "scheduler"):
        if key in config:
            message = f"{source} has one of its own, but the recipe's optim section decides; remove it"
            errors.append((f"deepspeed.{key}", message))
    is_own = recipe.optim.name == "muon" or recipe.optim.cautious_decay
    if is_own and config.get("zero_force_ds_cpu_optimizer") is True:
        own = "Muon" if recipe.optim.name == "muon" else "the one with cautious decay"
        message = f"is true in {source}, which would replace {own} by DeepSpeed's Adam; remove it"
        errors.append(("deepspeed.zero_force_ds_cpu_optimizer", message))
    for key in ("bf16", "fp16"):
        if config.get(key, {}).get("enabled") is True:
            message = (
                f"is enabled in {source}; remove it: train.precision decides (bf16 is autocast over fp32 "
                "weights)"
            )
            errors.append((f"deepspeed.{key}", message))
    return errors
