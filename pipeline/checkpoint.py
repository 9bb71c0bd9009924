"""Checkpoints: their format, writing them, validating them, loading them.

    checkpoints/step-000200/
        model.safetensors         parameters, under their names
        optimizer.safetensors     exp_avg.NAME, exp_avg_sq.NAME, step.NAME; momentum_buffer.NAME with Muon
        reader-0000.safetensors   the carried state of a reader's lanes
        reader-0000.json          the reader's position in the corpus
        config.yaml               the resolved recipe
        model.json                the model's configuration, of a family whose defaults transformers decides
        manifest.json             every file's size and SHA-256, written last

A checkpoint is built in a hidden folder, synced to disk and renamed (`saving.Saver`), so a folder of this
name is complete. A checkpoint is valid if its manifest agrees with every file and with its own checksum.
Older checkpoints are removed only after the new one is valid. A damaged one is renamed to
step-000200.invalid-1. The content does not depend on the number of processes or on the engine: processes
share the writing only.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..common.files import read_with_retries, sha256_of, sync
from ..models import MinRNNCache

MANIFEST = "manifest.json"
MODEL_CONFIG = "model.json"
FORMAT = 2  # of the manifest, which has its own checksum since format 2
INVALID_KEPT = 3  # number of newest damaged checkpoints to keep


@dataclass
class ReaderState:
    """The state of one reader between two steps."""

    position: dict[str, Any] | None
    """Where the corpus continues; None before the first chunk."""
    cache: MinRNNCache | None
    """The carried state of its lanes; None if nothing is carried."""


def checkpoint_name(step: int) -> str:
    """The folder name of a step."""
    return f"step-{step:06d}"


def write_file(path: Path, write: Callable[[Path], object]) -> tuple[str, dict[str, Any]]:
    """Write and sync a file; returns its entry in the manifest."""
    write(path)
    sync(path)
    return path.name, {"size": path.stat().st_size, "sha256": sha256_of(path)}


def publish(building: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a built folder and rename the folder to its final name."""
    (building / MANIFEST).write_text(_with_checksum({"format": FORMAT, **manifest}))
    sync(building / MANIFEST)
    sync(building)
    if final.exists():  # it is invalid, otherwise the run would have resumed from it
        mark_invalid(final)
    building.rename(final)
    sync(final.parent)


def _with_checksum(manifest: dict[str, Any]) -> str:
    """The text of a manifest, including the SHA-256 of its fields."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)


def remove_old(folder: Path, keep: int, step: int, always_keep: frozenset[int] = frozenset()) -> None:
    """Keep the newest `keep` checkpoints up to `step`, and those of the steps in `always_keep`. Rename newer
    ones than `step` as invalid.

    A newer one cannot be valid, otherwise the run would have resumed from it.
    """
    paths = checkpoint_paths(folder)
    for path in [p for p in paths if _step_number(p) > step]:
        mark_invalid(path)
    for path in [p for p in paths if _step_number(p) <= step][keep:]:
        if _step_number(path) not in always_keep:
            _remove(path)
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left while it built or removed checkpoints."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def make_room(folder: Path, newest: int | None, always_keep: frozenset[int] = frozenset()) -> str | None:
    """Remove the least useful checkpoint: a damaged one, else the oldest, but never the newest valid one, and
    none of the steps in `always_keep`.

    Returns:
        Its name, or None if nothing could be removed.
    """
    others = [
        path
        for path in reversed(checkpoint_paths(folder))
        if newest is not None and _step_number(path) not in {newest, *always_keep}
    ]
    for path in [*reversed(_invalid_in(folder)), *others]:
        _remove(path)
        return path.name
    return None


def _remove(path: Path) -> None:
    trash = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    path.rename(trash / path.name)  # so that no half-removed folder keeps the name
    shutil.rmtree(trash, ignore_errors=True)


def mark_invalid(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not used but can be examined. The newest INVALID_KEPT are
    kept.

    Returns:
        Its new path.
    """
    numbers = [int(old.name.rpartition("-")[2]) for old in _invalid_in(path.parent) if old.stem == path.name]
    number = max(numbers, default=0) + 1
    aside = path.with_name(f"{path.name}.invalid-{number}")
    path.rename(aside)
    sync(path.parent)
    for old in _invalid_in(path.parent)[INVALID_KEPT:]:
        _remove(old)
    return aside


def _invalid_in(folder: Path) -> list[Path]:
    """Renamed damaged checkpoints, newest first."""
    paths = (
        path for path in folder.glob("step-*.invalid-*") if re.fullmatch(r"step-\d+\.invalid-\d+", path.name)
    )
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def checkpoint_paths(folder: Path) -> list[Path]:
    """Folders named by `checkpoint_name`, newest first. `step-15` is not such a name."""
    paths = (
        path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name) and path.is_dir()
    )
    return sorted(
        (path for path in paths if path.name == checkpoint_name(_step_number(path))),
        key=_step_number,
        reverse=True,
    )


def _step_number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after checking itself and every file against it.

    Raises:
        ValueError: with the name of the file that is missing, truncated or changed.
        StorageError: a file cannot be read now, which says nothing about the checkpoint.
    """
    try:
        text = read_with_retries(path / MANIFEST, Path.read_text)
        manifest = json.loads(text)
        fields = {key: value for key, value in manifest.items() if key != "sha256"}
        is_sealed = "format" in manifest or "sha256" in manifest  # since format 2
        if is_sealed and text != _with_checksum(fields):
            raise ValueError("its own checksum differs")
        files = [(name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
        if (
            manifest["step"] != _step_number(path)
            or not {"model.safetensors", "optimizer.safetensors", "config.yaml"} <= manifest["files"].keys()
        ):
            raise ValueError("not this step's")
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST} is missing or damaged ({type(error).__name__})") from None
    for name, size, sha256 in files:
        try:
            actual_size, digest = read_with_retries(
                path / name, lambda file: (file.stat().st_size, sha256_of(file))
            )
        except FileNotFoundError:
            raise ValueError(f"{path / name} is missing") from None
        if actual_size != size:
            raise ValueError(
                f"{path / name} has {actual_size} bytes instead of {size}: it was cut short or changed"
            )
        if digest != sha256:
            raise ValueError(f"{path / name} is not what was written (its SHA-256 differs)")
    return manifest


def newest_valid(
    folder: Path, warn: Callable[[str], object], rename_invalid: bool = False
) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint and its manifest, or None.

    Args:
        warn: called with a message for each invalid one.
        rename_invalid: rename invalid ones, once a valid one is found. Only for a process that holds the
            run's lock.

    Raises:
        StorageError: the disk does not answer. Resuming from an older checkpoint would then lose the newer
            ones.
    """
    invalid = []
    for path in checkpoint_paths(folder):
        try:
            manifest = read_manifest(path)
        except ValueError as error:
            warn(f"checkpoint {path.name} is not used: {error}")
            invalid.append(path)
            continue
        if rename_invalid and invalid:
            names = ", ".join(mark_invalid(damaged).name for damaged in invalid)
            warn(f"damaged checkpoints were renamed to {names} in {folder}")
        return path, manifest
    return None


def load_parameters(path: Path, model: nn.Module) -> None:
    """Copy a checkpoint's parameters into the model.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    copy_parameters(read_with_retries(path / "model.safetensors", load_file), model, str(path))


def copy_parameters(saved: dict[str, Tensor], model: nn.Module, name: str) -> None:
    """Copy parameters by name into the model.

    Args:
        name: of where they are from, for messages.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    own = dict(model.named_parameters())
    if saved.keys() != own.keys():
        raise ValueError(f"{name} holds another model: {sorted(saved.keys() ^ own.keys())[:4]} differ")
    with torch.no_grad():
        for key, parameter in own.items():
            if parameter.shape != saved[key].shape:
                shapes = f"{tuple(saved[key].shape)}, not {tuple(parameter.shape)}"
                raise ValueError(f"{name} holds another model: {key} is {shapes}")
            parameter.copy_(saved[key])


def read_moments(path: Path) -> dict[str, Tensor]:
    """The optimizer's state: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`, or `momentum_buffer.NAME`."""
    return read_with_retries(path / "optimizer.safetensors", load_file)


def load_moments(saved: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load moments into a torch optimizer over the model's own parameters."""
    for name, parameter in model.named_parameters():
        state = {}
        for key in {full.split(".", 1)[0] for full in saved if full.split(".", 1)[1] == name}:
            tensor = saved[f"{key}.{name}"]
            state[key] = (
                tensor.to(parameter.device) if key != "step" or optimizer.defaults.get("fused") else tensor
            )
        optimizer.state[parameter] = state


def load_reader(path: Path, index: int, num_layers: int, device: torch.device) -> ReaderState:
    """Load one reader's position and carried state."""
    position = json.loads(read_with_retries(path / f"reader-{index:04d}.json", Path.read_text))
    carried = read_with_retries(path / f"reader-{index:04d}.safetensors", load_file)
    return ReaderState(
        position, MinRNNCache(num_layers).load_state_dict(carried, device) if carried else None
    )
