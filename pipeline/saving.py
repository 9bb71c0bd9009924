"""Writing checkpoints in a thread, during training.

    training thread:  snapshot (copies in main memory) -> next steps .......... -> join, before the next
    saver thread:     own files -> all ranks done? -> manifest, rename, remove old -> all ranks know

The saver threads of all processes communicate through a gloo group of their own, so they cannot interfere
with the training's collectives. If the disk is full, the least useful checkpoint is removed
(`checkpoint.make_room`) and the new one is written again. A failed save leaves the newest valid checkpoint
unchanged.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import save_file

from ..common.files import NO_SPACE, make_folder, system_error
from . import checkpoint
from .checkpoint import MODEL_CONFIG, ReaderState, checkpoint_name
from .engine import Engine
from .families.registry import OURS
from .families.saved import saved_config
from .processes import ProcessLayout

Files = dict[str, Callable[[Path], object]]
"""Files that this process writes: a function for each name."""


def snapshot(
    engine: Engine, readers: dict[int, ReaderState], layout: ProcessLayout, config: dict[str, Any]
) -> Files:
    """This process's files of a checkpoint, from copies that training does not change. Collective.

    The first process of each context group writes its readers, rank 0 the weights, the last rank the moments.
    """
    files: Files = {}
    for index, reader in readers.items() if layout.context_rank == 0 else ():
        carried = {} if reader.cache is None else reader.cache.state_dict()
        position = json.dumps(reader.position)
        files[f"reader-{index:04d}.safetensors"] = lambda path, carried=carried: save_file(carried, path)
        files[f"reader-{index:04d}.json"] = lambda path, position=position: path.write_text(position)
    is_first, is_last = layout.rank == 0, layout.rank == layout.num_processes - 1
    weights, moments = engine.weights(is_first), engine.moments(is_last)
    if is_first:
        files["model.safetensors"] = lambda path: save_file(weights, path, metadata={"format": "pt"})
        files["config.yaml"] = lambda path: path.write_text(yaml.safe_dump(config, sort_keys=False))
        if (model := saved_config(config["model"].get("family", OURS), engine.module.config)) is not None:
            files[MODEL_CONFIG] = lambda path: path.write_text(model)
    if is_last:
        files["optimizer.safetensors"] = lambda path: save_file(moments, path)
    return files


class Saver:
    """Writes checkpoints in a thread.

    Args:
        folder: `checkpoints/` of the run.
        keep: number of newest checkpoints to keep.
        in_background: write during training; otherwise `start` returns when everything is written.
        newest: step of the newest valid checkpoint, if any.
        timeout: how long processes wait for each other.
        warn: called with a message when a checkpoint is removed to make room.
        before_publishing: called by the first process when all files are written; if it raises, the
            checkpoint fails.
        always_keep: steps whose checkpoints are never removed.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        keep: int,
        in_background: bool,
        newest: int | None,
        timeout: timedelta,
        warn: Callable[[str], object],
        before_publishing: Callable[[], object],
        always_keep: frozenset[int] = frozenset(),
    ):
        self.always_keep = always_keep
        self.folder, self.keep, self.in_background, self.newest = folder, keep, in_background, newest
        self.warn, self.before_publishing = warn, before_publishing
        self.rank, self.num_processes = accelerator.process_index, accelerator.num_processes
        self.group = (
            torch.distributed.new_group(backend="gloo", timeout=timeout) if self.num_processes > 1 else None
        )
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []

    def start(self, step: int, files: Files, info: dict[str, Any]) -> None:
        """Start to write the checkpoint of a step. `join` must have been called for the one before.

        Args:
            files: from `snapshot`.
            info: more fields for the manifest.
        """
        assert self._thread is None
        self._thread = threading.Thread(
            target=self._work, args=(step, files, info), name="saver", daemon=True
        )
        self._thread.start()
        if not self.in_background:
            self._thread.join()

    def join(self, timeout: float | None = None) -> list[str]:
        """Wait until nothing is being written; returns the failures of all processes."""
        if self._thread is not None:
            self._thread.join(timeout)
            self._thread = None
        failures, self._failures = self._failures, []
        return failures

    def _work(self, step: int, files: Files, info: dict[str, Any]) -> None:
        try:
            self._failures = self._write(step, files, info)
        except BaseException as error:  # a process that died; the training's collectives fail too
            self._failures = [f"{type(error).__name__}: {error} (rank {self.rank})"]
        if not self._failures:
            self.newest = step

    def _write(self, step: int, files: Files, info: dict[str, Any]) -> list[str]:
        while True:
            failures, is_full = self._write_once(step, files, info)
            if not is_full or not self._gather(self.rank == 0 and self._make_room())[0]:
                break
        if self.rank == 0 and not failures:
            with contextlib.suppress(OSError):  # tried again after the next checkpoint
                checkpoint.remove_old(self.folder, self.keep, step, self.always_keep)
        return failures

    def _write_once(self, step: int, files: Files, info: dict[str, Any]) -> tuple[list[str], bool]:
        """Write the checkpoint once; returns the failures of all processes, and whether a disk is full."""
        final = self.folder / checkpoint_name(step)
        building = self.folder / f".{checkpoint_name(step)}.building"
        if self.rank == 0:
            with contextlib.suppress(OSError):  # then no file can be written either, which is reported below
                checkpoint.remove_leftovers(self.folder)
                make_folder(self.folder)
                building.mkdir()
        self._gather(None)
        entries: dict[str, Any] = {}
        failure = None
        try:
            for name, write in files.items():
                entries.update([checkpoint.write_file(building / name, write)])
        except Exception as error:  # safetensors raises its own errors for a full disk
            failure = self._failure(error)
        parts = self._gather((entries, failure))
        failures = [failure for _, failure in parts if failure]
        if self.rank == 0:
            if not failures:
                try:
                    manifest = {
                        **info,
                        "step": step,
                        "files": dict(sorted(item for entries, _ in parts for item in entries.items())),
                    }
                    self.before_publishing()
                    checkpoint.publish(building, final, manifest)
                except Exception as error:  # the other processes wait for the result
                    failures.append(self._failure(error))
            if failures:
                shutil.rmtree(building, ignore_errors=True)  # a full disk needs the room
        failures = self._gather(failures)[0]
        return [text for text, _ in failures], any(is_full for _, is_full in failures)

    def _failure(self, error: Exception) -> tuple[str, bool]:
        """An error as a message, and whether the disk is full."""
        failure = system_error(error)
        return (
            f"{type(error).__name__}: {error} (rank {self.rank})",
            failure is not None and failure.errno in NO_SPACE,
        )

    def _make_room(self) -> bool:
        """Remove a checkpoint so that the new one can be written again; returns whether one was removed."""
        try:
            removed = checkpoint.make_room(self.folder, self.newest, self.always_keep)
        except OSError:
            return False
        if removed is not None:
            self.warn(f"{self.folder} is full: {removed} was removed for the next checkpoint")
        return removed is not None

    def _gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.num_processes
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values
