"""What the launcher and the recipe both say: told before any process is connected, all at once.

The recipe decides what both could: batch, clipping, precision, optimizer. What the launcher leaves open
("auto", or not said) is filled from
it; what it says differently is a mistake.
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
from .processes import all_gather_objects, launcher_holds_store, local_device, uses_deepspeed, world_size
from .recipe import flatten, resolved

Problem = tuple[str, str]


def check_launch(recipe: Recipe) -> None:
    """Raises UserError with everything that does not fit together."""
    device, here = _this_device(recipe)
    errors = engine_errors(device.type, world_size())
    errors += [
        *_layout_errors(recipe),
        *_precision_errors(recipe),
        *(_deepspeed_errors(recipe) if uses_deepspeed() else []),
    ]
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if here and local_rank == "0" != rank:  # rank 0, which tells the others, cannot know of them
        print(*(f"error: {key}: {problem}" for key, problem in here), sep="\n", file=sys.stderr)
    if errors or here:
        raise UserError.from_list([*errors, *here])


def check_same_recipe(recipe: Recipe, accelerator: Accelerator) -> None:
    """Each process has read the recipe from its own machine: they must be the same. Called by all processes
    alike.

    Raises:
        UserError: in every process, each setting that differs and where.
    """
    recipes = all_gather_objects(accelerator, [flatten(resolved(recipe))])
    errors = []
    for rank, other in enumerate(recipes[1:], start=1):
        for key in recipes[0].keys() | other.keys():
            first, second = recipes[0].get(key), other.get(key)
            if first != second:
                errors.append(
                    (
                        key,
                        f"is {first!r} on rank 0, but {second!r} on rank {rank}; give all machines the same recipe",
                    )
                )
    if errors:
        raise UserError.from_list(
            {key: (key, problem) for key, problem in sorted(errors, reverse=True)}.values()
        )


def _layout_errors(recipe: Recipe) -> list[Problem]:
    world, context, batch = world_size(), recipe.parallel.context, recipe.batch
    errors = []
    if world % context:
        errors.append(
            (
                "parallel.context",
                f"{context} processes to a sequence do not divide the {world} that were started",
            )
        )
    elif batch.readers % (world // context):
        groups = world // context
        sharing = f"{groups} groups of {context} processes" if context > 1 else f"{world} processes"
        fitting = [n * context for n in range(1, batch.readers + 1) if batch.readers % n == 0]
        advice = f"use {fitting} processes or more readers"
        errors.append(
            ("batch.readers", f"{batch.readers} readers cannot be shared evenly by {sharing}; {advice}")
        )
    reach = recipe.model_fields_resolved()["conv_kernel"] - 1
    if context > 1 and (batch.chunk % context or batch.chunk // context < reach):
        at_least = (
            f" and leave each at least the {reach} tokens that the convolution looks back"
            if reach > 1
            else ""
        )
        errors.append(
            (
                "batch.chunk",
                f"{batch.chunk} tokens must divide by the {context} processes of parallel.context{at_least}",
            )
        )
    return errors


def _machine_errors(device: torch.device) -> list[Problem]:
    """What is wrong with this machine's part of the launch."""
    said = {
        name: int(os.environ.get(name, "0"))
        for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")
    }
    errors = []
    if device.type != "cpu" and said["LOCAL_WORLD_SIZE"] > (devices := torch.accelerator.device_count()):
        started = f"started {said['LOCAL_WORLD_SIZE']} processes on a machine with {devices} GPUs"
        errors.append(("launcher", f"{started}; lower --num_processes, or use train.device cpu"))
    if said["GROUP_WORLD_SIZE"] > 1 and said["TORCHELASTIC_MAX_RESTARTS"] > 0 and launcher_holds_store():
        advice = "use rdzv_backend c10d and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all of them, or max_restarts 0"
        errors.append(
            ("launcher", f"machines that restart their processes could meet in different places; {advice}")
        )
    if said["GROUP_WORLD_SIZE"] > 1 and not _is_loopback(os.environ["MASTER_ADDR"]):
        interfaces = [name for _, name in socket.if_nameindex()]
        errors += _interface_errors(
            os.environ.get("GLOO_SOCKET_IFNAME"), interfaces, _is_loopback(socket.gethostname())
        )
    return errors


def _is_loopback(host: str) -> bool:
    """Whether a name leads nowhere but to this machine itself."""
    try:
        addresses = [information[4][0] for information in socket.getaddrinfo(host, None)]
    except OSError:  # gloo takes the loopback interface then
        return True
    return all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in addresses)


def _interface_errors(wanted: str | None, interfaces: list[str], name_is_loopback: bool) -> list[Problem]:
    """Why the processes of other machines could not reach those of this one over gloo, which takes the host's
    name or GLOO_SOCKET_IFNAME."""
    host = socket.gethostname()
    advice = f"set GLOO_SOCKET_IFNAME to the interface that the machines share ({host} has {', '.join(interfaces)})"
    if wanted is None:
        reason = f"the name {host} leads to {host} itself (127.0.0.1), so the processes of other machines cannot reach it"
        return [("launcher", f"{reason}; {advice}")] if name_is_loopback else []
    missing = [name for name in wanted.split(",") if name not in interfaces]
    return (
        [
            (
                "launcher",
                f"GLOO_SOCKET_IFNAME says {wanted}, but {host} has no {' and no '.join(missing)}; {advice}",
            )
        ]
        if missing
        else []
    )


def _precision_errors(recipe: Recipe) -> list[Problem]:
    """The launcher leaves the precision to the recipe, or says the same."""
    theirs, ours = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), recipe.train.precision
    if theirs in ("no", "", ours):
        return []
    return [
        (
            "train.precision",
            f"is {ours}, but the launcher's mixed_precision is {theirs}; leave it 'no' there, the recipe decides",
        )
    ]


def _this_device(recipe: Recipe) -> tuple[torch.device, list[Problem]]:
    """This process's device, and what it and its machine cannot do."""
    try:
        device = local_device(recipe.train.device)
    except UserError as error:
        return torch.device("cpu"), error.errors
    if errors := _machine_errors(device):
        return device, errors
    if recipe.train.precision in DTYPES and not supports(device, recipe.train.precision):
        unsupported = f"{device_name(device)} does not support {recipe.train.precision}"
        return device, [("train.precision", f"{unsupported}; use train.precision auto")]
    return device, []


def deepspeed_values(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says in DeepSpeed's words."""
    accumulation = recipe.batch.readers * recipe.parallel.context // world_size()
    return {
        "train_micro_batch_size_per_gpu": recipe.batch.lanes,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": recipe.batch.lanes * accumulation * world_size(),
        "gradient_clipping": recipe.optim.clip or 0.0,
    }


def _deepspeed_errors(recipe: Recipe) -> list[Problem]:
    errors = []
    if recipe.train.precision == "fp64":
        errors.append(("train.precision", "fp64 is for DDP: DeepSpeed keeps its weights and moments in fp32"))
    if recipe.train.skip_spikes is not None:
        errors.append(
            (
                "train.skip_spikes",
                "is for DDP: DeepSpeed's ZeRO has shared out a batch's gradient before its loss is known",
            )
        )
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        clip = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
        said: dict[str, Any] = {} if clip in ("none", "auto") else {"gradient_clipping": float(clip)}
        where = "the launcher"
    else:
        try:
            said, where = json.loads(Path(file).read_text()), file
        except (OSError, ValueError) as error:
            return [*errors, ("deepspeed", f"cannot read {file}: {error}")]
        errors += deepspeed_key_errors(said, where)
    for key, ours in deepspeed_values(recipe).items():
        theirs = said.get(key, "auto")
        if theirs != "auto" and float(theirs) != ours:
            errors.append(
                (
                    f"deepspeed.{key}",
                    f"is {theirs} in {where}, but the recipe makes it {ours}; say auto there, or change the recipe",
                )
            )
    own = f"{where} has one of its own, but the recipe's optim section decides; remove it"
    enabled = (
        f"is enabled in {where}; remove it: train.precision decides (bf16 is autocast over fp32 weights)"
    )
    errors += [(f"deepspeed.{key}", own) for key in ("optimizer", "scheduler") if key in said]
    return errors + [
        (f"deepspeed.{key}", enabled) for key in ("bf16", "fp16") if said.get(key, {}).get("enabled") is True
    ]
