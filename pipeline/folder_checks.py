"""Whether a run may write in a folder. Errors that would stop it at its end are reported at its start, and
files that no run has written are not touched."""

import errno
import os
from pathlib import Path

import yaml

from ..data import is_held_out_folder
from .checkpoint import checkpoint_paths

FILES = (
    "config.yaml",
    "metrics.jsonl",
    "loss.png",
    "accuracy_by_length.png",
    "samples.txt",
    "mlflow.json",
    "push.json",
    "trackers.json",
    ".finished",
    ".run.json",
    ".lock",
)
FOLDERS = ("checkpoints", "model", "validation", "tensorboard", "wandb")
LONGEST_NAME = Path("checkpoints", ".step-00000000.building", "optimizer.safetensors")
# Sections of every config.yaml that a run has written, in any version.
OLDEST_SECTIONS = {"run", "model", "data", "batch", "optim", "train"}


def folder_errors(path: Path) -> list[str]:
    """Why a run cannot or must not write in this folder; empty if it may."""
    try:
        os.lstat(path / LONGEST_NAME)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            return [f"cannot use {path}: {error.strerror}"]
    if not os.path.lexists(path):
        parent = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        return _path_errors(parent, is_folder=True)
    if errors := _path_errors(path, is_folder=True):
        return errors
    existing = [name for name in (*FILES, *FOLDERS) if os.path.lexists(path / name)]
    errors = [error for name in existing for error in _path_errors(path / name, is_folder=name in FOLDERS)]
    if errors:
        return errors
    empty = [name for name in existing if name in FOLDERS and not any((path / name).iterdir())]
    # a run writes these before its config.yaml
    own = [".lock", *(["validation"] if is_held_out_folder(path / "validation") else [])]
    foreign = [name for name in existing if name not in (*own, *empty)]
    if foreign and not _is_of_a_run(path):
        return [
            f"{path} holds {', '.join(foreign)}, which the run would overwrite, but no config.yaml or "
            "checkpoint that a run has written; name a folder of the run's own, e.g. runs/NAME"
        ]
    return []


def _path_errors(path: Path, is_folder: bool) -> list[str]:
    """Why an existing path cannot be a folder, or a file, that a run writes; one error at most."""
    if not path.exists():
        return [f"{path} is a link to {os.readlink(path)}, which is not there; make that, or remove the link"]
    if not (path.is_dir() if is_folder else path.is_file()):
        kind = "folder" if is_folder else "regular file"
        return [f"{path} is no {kind}; move it away, or name another folder"]
    if not os.access(path, os.R_OK | os.W_OK | (os.X_OK if is_folder else 0)):
        return [f"{path} cannot be written by this user; change its permissions, or name another folder"]
    return []


def _is_of_a_run(path: Path) -> bool:
    """Whether the folder, or a checkpoint in it, has a config.yaml that a run has written.

    Such a file is resolved: it has every section and setting.
    """
    for config in (
        path / "config.yaml",
        *(step / "config.yaml" for step in checkpoint_paths(path / "checkpoints")),
    ):
        try:
            values = yaml.safe_load(config.read_text()) if config.exists() else None
        except (yaml.YAMLError, UnicodeDecodeError):
            continue
        if (
            isinstance(values, dict)
            and values.keys() >= OLDEST_SECTIONS
            and all(isinstance(values[name], dict) for name in OLDEST_SECTIONS)
        ):
            return {"dir", "seed", "resume"} <= values["run"].keys()
    return False
