"""The processes of a run: who they are, what they share, what they agree on.

W processes are W / C groups of C neighbours (C = parallel.context). A group shares its readers; each of its processes has 1 / C of the time of
every chunk.
"""

import dataclasses
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from ..common.errors import StorageError, UserError
from ..data import Chunk
from ..models.context_parallel import ContextGroup
from .machine import num_cores, resolve_device, share_of_threads

T = TypeVar("T")


def world_size() -> int:
    """Processes that the launcher started, known before any of them is connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher_holds_store() -> bool:
    """Whether the store that processes meet in is the launcher's, not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1", "yes")


@dataclass(frozen=True)
class ProcessLayout:
    """Which readers and which piece of their chunks are this process's."""

    rank: int = 0
    num_processes: int = 1
    context: int = 1
    """Processes that share a sequence."""
    group: ContextGroup | None = None
    """Those of this process; None where context is 1."""

    @property
    def context_rank(self) -> int:
        return self.rank % self.context

    def readers(self, num_readers: int) -> range:
        """Readers of this process's group."""
        per_group = num_readers * self.context // self.num_processes
        first = self.rank // self.context * per_group
        return range(first, first + per_group)

    def piece(self, chunk: Chunk) -> Chunk:
        """This process's part of a chunk: [lanes, time / context]. `chunk.state` stays that of the whole."""
        if self.context == 1:
            return chunk
        length = chunk.input_ids.shape[1] // self.context
        columns = slice(self.context_rank * length, (self.context_rank + 1) * length)
        arrays = {
            name: np.ascontiguousarray(getattr(chunk, name)[:, columns])
            for name in ("input_ids", "shift_labels", "document_starts")
        }
        return dataclasses.replace(chunk, **arrays)


def build_layout(accelerator: Accelerator, context: int, timeout: timedelta) -> ProcessLayout:
    """The layout, its process groups made. Called by all processes alike."""
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    if context == 1:
        return ProcessLayout(rank, num_processes)
    starts = range(0, num_processes, context)
    groups: list[Any] = [
        torch.distributed.new_group(list(range(first, first + context)), timeout) for first in starts
    ]
    return ProcessLayout(
        rank, num_processes, context, ContextGroup(groups[rank // context], rank % context, context)
    )


def local_device(name: str, key: str = "train.device") -> torch.device:
    """This process's device, of a name as in `machine.resolve_device`: of several accelerators, that of its number on the machine.

    Processes cannot send each other what is on MPS, so several of them take the CPU instead where the name is `auto`.

    Raises:
        UserError: under `key`, if there is no such device here, or several processes cannot work on it.
    """
    device = resolve_device(name, key)
    if device.type == "mps" and world_size() > 1:
        if name != "auto":
            raise UserError(key, f"several processes cannot work on {name}; start one, or use cpu")
        return torch.device("cpu")
    if device.type == "cpu" or device.index is not None or world_size() == 1:
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


def connect(timeout: timedelta, device: torch.device) -> Accelerator:
    """Connect the processes: gloo on CPUs, nccl on GPUs. Precision is ours (`engine.autocast`), whatever the launcher says.

    Args:
        timeout: after which a collective that nobody answers fails.
        device: this process's (`local_device`).
    """
    on_cpu, deepspeed = device.type == "cpu", uses_deepspeed()
    if on_cpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = (
            "cpu"  # where DeepSpeed is on, Accelerate takes a GPU if the machine has one
        )
        os.environ["DS_ACCELERATOR"] = (
            "cpu"  # Accelerate imports DeepSpeed where it is installed, and that guesses aloud
        )
        if (threads := share_of_threads(os.environ, num_cores())) is not None:
            torch.set_num_threads(threads)
    if world_size() > 1:
        _init_process_group(device, timeout)
    if deepspeed and on_cpu:
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it, DeepSpeed would be left out in silence
        PartialState(backend="gloo")
        accelerator = Accelerator(mixed_precision="no")
    else:
        # Left to itself, a plain Accelerator() on CPUs would see one process in each of several, and train separate models.
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
    if accelerator.num_processes != world_size():
        raise RuntimeError(
            f"The launcher started {world_size()} processes, but Accelerate connected {accelerator.num_processes}."
        )
    if deepspeed != (accelerator.state.deepspeed_plugin is not None):
        raise RuntimeError("The launcher asks for DeepSpeed, but Accelerate left it out.")
    return accelerator


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    """Make the process group, which Accelerate then uses.

    A store that the launcher holds may outlive a restart of its processes (it does with torchrun's static rendezvous, Accelerate's default),
    and so do the addresses of the dead ones in it: each attempt has a corner of its own. One that rank 0 holds is new each time; it must not
    be divided, since the launchers of several machines count their attempts apart.
    """
    rank, size = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    backend = "gloo" if device.type == "cpu" else torch.distributed.get_default_backend_for_device(device)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = rank == 0 and not launcher_holds_store()
    store = torch.distributed.TCPStore(host, port, size, is_master, timeout=timeout, wait_for_workers=False)  # pyright: ignore
    if launcher_holds_store():
        store = c10d.PrefixStore(f"minrnn/attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    setattr(c10d, "default_pg_nccl_timeout", timeout)  # noqa: B010 - private to type checkers; of the groups that DeepSpeed makes itself
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def check_wrapped(accelerator: Accelerator, model: nn.Module) -> None:
    """Several processes with a model that is not wrapped would train apart, in silence."""
    if accelerator.num_processes > 1 and model is accelerator.unwrap_model(model):
        raise RuntimeError(
            "Accelerate did not wrap the model for several processes; gradients would not be shared."
        )


def run_on_all_ranks(
    accelerator: Accelerator, function: Callable[[], T]
) -> tuple[T | None, list[tuple[str, str]]]:
    """The function's result, and what the user must mend: in whichever process it raised UserError, all hear of it.

    Raises:
        StorageError: in every process, where a file system of one of them failed. The others would wait for it.
    """
    result, errors, failures = None, [], []
    try:
        result = function()
    except UserError as error:
        errors = error.errors
    except (OSError, SafetensorError) as error:
        several = accelerator.num_processes > 1
        failures = [
            f"rank {accelerator.process_index} on {socket.gethostname()}: {error}" if several else str(error)
        ]
    everywhere = all_gather_objects(accelerator, [(errors, failures)])
    if failures := [failure for _, failures in everywhere for failure in failures]:
        raise StorageError("; ".join(failures))
    return result, list(dict.fromkeys(problem for errors, _ in everywhere for problem in errors))


def all_reduce_sum(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The sum of each value over all processes, in fp64."""
    if accelerator.num_processes == 1:
        return values
    bits = torch.from_numpy(np.array(values, dtype=np.float64).view(np.int64)).to(
        accelerator.device
    )  # not every device has fp64
    rows = [torch.empty_like(bits) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(rows, bits)
    return torch.stack(rows).cpu().numpy().view(np.float64).sum(0).tolist()


def all_reduce_max(accelerator: Accelerator, value: int) -> int:
    """The largest of all processes' values."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return int(tensor)


def broadcast_from_main(accelerator: Accelerator, value: T) -> T:
    """The main process's value, everywhere."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def run_on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What the function returns in the main process, which alone calls it; everywhere.

    Raises:
        UserError, StorageError: in every process, where the main one met a user's mistake or a disk's error: the others
            would wait for it.
    """
    result: Any = None
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as raised:
            error = raised
        except (OSError, SafetensorError) as raised:  # without its number: train.main prints it once
            error = StorageError(str(raised))
    result, error = broadcast_from_main(accelerator, (result, error))
    if error is not None:
        raise error
    return result


def all_gather_objects(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """All processes' values, in order of rank, everywhere."""
    return gather_object(values) if accelerator.num_processes > 1 else values


def to_device(array: Any, accelerator: Accelerator) -> Tensor:
    """A numpy array on this process's device."""
    return torch.from_numpy(array).to(accelerator.device, non_blocking=True)
