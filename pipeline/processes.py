"""The processes of a run: their ranks and devices, their shares of the data, their collectives.

With C = parallel.context, W processes form W / C groups of C neighbours. A group shares its readers. Each
process of a group has 1 / C of the time of every chunk.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from ..common.errors import StorageError, UserError
from ..data import Batch, Chunk
from ..models.context_parallel import ContextGroup
from .deepspeed_operator import compile_operator
from .machine import num_cores, resolve_device, share_of_threads

T = TypeVar("T")
B = TypeVar("B", bound=Batch)


def world_size() -> int:
    """Number of processes that the launcher started; known before they are connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher_holds_store() -> bool:
    """Whether the launcher, not rank 0, holds the store through which the processes find each other."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` was configured to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1", "yes")


@dataclass(frozen=True)
class ProcessLayout:
    """The readers of this process, and its piece of their chunks."""

    rank: int = 0
    num_processes: int = 1
    context: int = 1
    """Processes per sequence."""
    group: ContextGroup | None = None
    """The processes that share this one's sequences; None if context is 1."""

    @property
    def context_rank(self) -> int:
        return self.rank % self.context

    def readers(self, num_readers: int) -> range:
        """Readers of this process's group."""
        per_group = num_readers * self.context // self.num_processes
        first = self.rank // self.context * per_group
        return range(first, first + per_group)

    def piece(self, chunk: B) -> B:
        """This process's part of a chunk: [lanes, time / context]. `chunk.state` remains that of the whole
        chunk. Of several chunks, it is a part of each."""
        if self.context == 1:
            return chunk
        assert isinstance(chunk, Chunk)  # the examples of labelled tasks are not divided
        num_chunks = chunk.num_chunks

        def part(array: np.ndarray) -> np.ndarray:
            parts = array.reshape(len(array), num_chunks, self.context, -1)
            return parts[:, :, self.context_rank].reshape(len(array), -1)

        return cast(B, chunk.columns(part, num_chunks))


def build_layout(accelerator: Accelerator, context: int, timeout: timedelta) -> ProcessLayout:
    """Create the layout and its process groups. Collective: all processes must call it."""
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
    """This process's device, by a name as in `machine.resolve_device`. With several accelerators, LOCAL_RANK
    picks one.

    Processes cannot exchange tensors on MPS, so with several processes `auto` gives the CPU there.

    Raises:
        UserError: under `key`, if the device does not exist or several processes cannot work on it.
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
    """Connect the processes: gloo on CPUs, nccl on GPUs.

    Mixed precision is always off in Accelerate, because `engine.autocast` applies the recipe's.

    Args:
        timeout: after which an unanswered collective fails.
        device: of this process (`local_device`).

    Raises:
        OSError: if DeepSpeed's operator for CPUs cannot be compiled, because its folder is not writable.
    """
    on_cpu, deepspeed = device.type == "cpu", uses_deepspeed()
    if on_cpu:
        # With DeepSpeed, Accelerate would take a GPU if the machine has one.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        # Accelerate imports DeepSpeed if it is installed, which guesses its device with a message.
        os.environ["DS_ACCELERATOR"] = "cpu"
        if (threads := share_of_threads(os.environ, num_cores())) is not None:
            torch.set_num_threads(threads)
    if world_size() > 1:
        _init_process_group(device, timeout)
    if deepspeed and on_cpu:
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it, Accelerate silently ignores DeepSpeed
        compile_operator()
        PartialState(backend="gloo")
        accelerator = Accelerator(mixed_precision="no")
    else:
        # Without cpu=True, several processes on CPUs would each see one process and train separate models.
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
    if accelerator.num_processes != world_size():
        connected = accelerator.num_processes
        raise RuntimeError(
            f"The launcher started {world_size()} processes, but Accelerate connected {connected}."
        )
    if deepspeed != (accelerator.state.deepspeed_plugin is not None):
        raise RuntimeError("The launcher asks for DeepSpeed, but Accelerate left it out.")
    return accelerator


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    """Create the process group that Accelerate then uses.

    A store that the launcher holds can outlive a restart of its processes (torchrun's static rendezvous,
    Accelerate's default), and with it the addresses of dead processes. So each attempt uses its own prefix. A
    store that rank 0 holds is new at each attempt, and needs none: launchers of several machines count
    attempts separately, so their prefixes would differ.
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
    # For groups that DeepSpeed creates itself.
    setattr(c10d, "default_pg_nccl_timeout", timeout)  # noqa: B010 - private to type checkers
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def check_wrapped(accelerator: Accelerator, model: nn.Module) -> None:
    """Check that Accelerate wrapped the model. Without that, several processes would silently train separate
    models."""
    if accelerator.num_processes > 1 and model is accelerator.unwrap_model(model):
        raise RuntimeError(
            "Accelerate did not wrap the model for several processes; gradients would not be shared."
        )


def run_on_all_ranks(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function in every process; returns this process's result.

    Raises:
        UserError: in every process, with the errors of all of them.
        StorageError: in every process, if a file system failed in one of them. The others would otherwise
            wait for it.
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
    of_ranks = all_gather_objects(accelerator, [(errors, failures)])
    if failures := [failure for _, failures in of_ranks for failure in failures]:
        raise StorageError("; ".join(failures))
    if errors := list(dict.fromkeys(error for errors, _ in of_ranks for error in errors)):
        raise UserError.from_list(errors)
    return cast(T, result)


def all_reduce_sum(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The sum of each value over all processes, in fp64."""
    if accelerator.num_processes == 1:
        return values
    # Sent as int64 and added on the CPU, because not every device has fp64.
    bits = torch.from_numpy(np.array(values, dtype=np.float64).view(np.int64)).to(accelerator.device)
    rows = [torch.empty_like(bits) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(rows, bits)
    return torch.stack(rows).cpu().numpy().view(np.float64).sum(0).tolist()


def all_reduce_max(accelerator: Accelerator, value: int) -> int:
    """The maximum of a value over all processes."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return int(tensor)


def broadcast_from_main(accelerator: Accelerator, value: T) -> T:
    """The main process's value, in every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def run_on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function in the main process only; returns its result in every process.

    Raises:
        UserError, StorageError: in every process, if the function raised it or an OSError in the main
            process. The others would otherwise wait for the result.
    """
    result: Any = None
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as raised:
            error = raised
        except (OSError, SafetensorError) as raised:  # without errno, so that train.main prints it once
            error = StorageError(str(raised))
    result, error = broadcast_from_main(accelerator, (result, error))
    if error is not None:
        raise error
    return result


def all_gather_objects(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """The values of all processes in order of rank, in every process."""
    return gather_object(values) if accelerator.num_processes > 1 else values


def to_device(array: Any, accelerator: Accelerator) -> Tensor:
    """A numpy array on this process's device."""
    return torch.from_numpy(array).to(accelerator.device, non_blocking=True)
