"""The processes of a run: who they are, what they agree on."""

import os
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from ..data.errors import UserError

T = TypeVar("T")


def world_size() -> int:
    """Processes that the launcher started, known before any of them is connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_readers(num_readers: int) -> None:
    """Every process must own the same number of readers.

    Raises:
        UserError: they do not divide.
    """
    if num_readers % world_size():
        fitting = [n for n in range(1, num_readers + 1) if num_readers % n == 0]
        raise UserError(
            (
                "batch.readers",
                f"{num_readers} readers cannot be shared evenly by {world_size()} processes; use {fitting} processes or more readers",
            )
        )


def start(precision: str) -> Accelerator:
    """Connect the processes: gloo on CPUs, nccl on GPUs; bf16 as autocast."""
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Accelerate imports DeepSpeed where it is installed, and that guesses aloud
    # Left to itself, a plain Accelerator() on CPUs would see one process in each of several, and train separate models.
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if precision == "bf16" else "no")
    if accelerator.num_processes != world_size():
        raise RuntimeError(f"The launcher started {world_size()} processes, but Accelerate connected {accelerator.num_processes}.")
    return accelerator


def check_wrapped(accelerator: Accelerator, model: nn.Module) -> None:
    """Several processes with a model that is not wrapped would train apart, in silence."""
    if accelerator.num_processes > 1 and model is accelerator.unwrap_model(model):
        raise RuntimeError("Accelerate did not wrap the model for several processes; gradients would not be shared.")


def total(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The sum of each value over all processes, in fp64."""
    if accelerator.num_processes == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def from_main(accelerator: Accelerator, value: T) -> T:
    """The main process's value, everywhere."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def gathered(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """All processes' values, in order of rank, everywhere."""
    return gather_object(values) if accelerator.num_processes > 1 else values


def to_device(array: Any, accelerator: Accelerator) -> Tensor:
    """A numpy array on this process's device."""
    return torch.from_numpy(array).to(accelerator.device, non_blocking=True)
