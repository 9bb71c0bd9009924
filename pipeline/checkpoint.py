"""Checkpoints: whole or not there.

    checkpoints/step-000200/
        model.safetensors         parameters, under their names
        optimizer.safetensors     exp_avg.NAME, exp_avg_sq.NAME, step.NAME
        reader-0000.safetensors   the carried state of a reader's lanes
        reader-0000.json          the reader's position in the corpus
        config.yaml               the resolved recipe
        manifest.json             every file's size and SHA-256, written last

A checkpoint is built in a hidden folder, synced to disk, and renamed (`saving.Saver`). Only a folder whose manifest holds for every file is
one; older ones are removed after the new one is valid. Nothing in it depends on the number of processes or on the engine: the writing is
shared, the result is not.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..models import MinRNNCache

MANIFEST = "manifest.json"


@dataclass
class ReaderState:
    """What one reader has at a cut."""

    position: dict[str, Any] | None
    """Where the corpus goes on; None before the first chunk."""
    cache: MinRNNCache | None
    """The carried state of its lanes; None where nothing is carried."""


def checkpoint_name(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:06d}"


def sync(path: Path) -> None:
    """To the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text)
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, write: Callable[[Path], object]) -> tuple[str, dict[str, Any]]:
    """Write and sync a file; returns its entry in the manifest."""
    write(path)
    sync(path)
    return path.name, {"size": path.stat().st_size, "sha256": _digest(path)}


def publish(building: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Seal a built folder with its manifest and give it its name."""
    write_file(building / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1)))
    sync(building)
    if final.exists():  # an invalid one of the same step, or the run would have gone on from it
        final.rename(final.with_name(f".{final.name}.replaced"))
    building.rename(final)
    sync(final.parent)


def remove_old(folder: Path, keep: int, step: int) -> None:
    """Keep the newest up to `step`; what claims to be newer is invalid, or the run would have gone on from it."""
    paths = steps_in(folder)
    for path in [p for p in paths if _step_of(p) > step] + [p for p in paths if _step_of(p) <= step][keep:]:
        grave = path.with_name(f".{path.name}.removing")
        path.rename(grave)  # so that no half-removed folder keeps the name
        shutil.rmtree(grave, ignore_errors=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def steps_in(folder: Path) -> list[Path]:
    """Folders that are named as checkpoints, newest first."""
    paths = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir())
    return sorted(paths, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after checking every file against it.

    Raises:
        ValueError: naming the file that is missing, cut short or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = [(name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
        if manifest["step"] != _step_of(path) or not {"model.safetensors", "optimizer.safetensors", "config.yaml"} <= manifest["files"].keys():
            raise ValueError("not this step's")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST} is missing or unreadable ({type(error).__name__})") from None
    for name, size, sha256 in files:
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes instead of {size}: it was cut short or changed")
        if _digest(file) != sha256:
            raise ValueError(f"{file} is not what was written (its SHA-256 differs)")
    return manifest


def newest_valid(folder: Path, warn: Callable[[str], object]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose every file is as it was written, and its manifest; `warn` hears of each that is not."""
    for path in steps_in(folder):
        try:
            return path, read_manifest(path)
        except (OSError, ValueError) as error:  # a sector that cannot be read, too
            warn(f"checkpoint {path.name} is not used: {error}")
    return None


def load_parameters(path: Path, model: nn.Module) -> None:
    """Copy the parameters into the model.

    Raises:
        ValueError: names or shapes that are not the model's.
    """
    saved, own = load_file(path / "model.safetensors"), dict(model.named_parameters())
    if saved.keys() != own.keys():
        raise ValueError(f"{path} holds another model: {sorted(saved.keys() ^ own.keys())[:4]} differ")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != saved[name].shape:
                raise ValueError(f"{path} holds another model: {name} is {tuple(saved[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(saved[name])


def read_moments(path: Path) -> dict[str, Tensor]:
    """The optimizer's state: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
    return load_file(path / "optimizer.safetensors")


def put_moments(saved: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give them to torch's optimizer over the model's own parameters."""
    for name, parameter in model.named_parameters():
        state = {}
        for key in {full.split(".", 1)[0] for full in saved if full.split(".", 1)[1] == name}:
            tensor = saved[f"{key}.{name}"]
            state[key] = tensor.to(parameter.device) if key != "step" or optimizer.defaults.get("fused") else tensor
        optimizer.state[parameter] = state


def load_reader(path: Path, index: int, num_layers: int, device: torch.device) -> ReaderState:
    """One reader's position and carried state."""
    position = json.loads((path / f"reader-{index:04d}.json").read_text())
    carried = load_file(path / f"reader-{index:04d}.safetensors")
    return ReaderState(position, MinRNNCache(num_layers).load_state_dict(carried, device) if carried else None)
