"""Whether a run may write in a folder: what keeps it from writing at the end is said at the start, and what
no run has made is left alone."""

import errno
import os
from pathlib import Path

import yaml

from .checkpoint import steps_in

FILES = (
    "config.yaml",
    "metrics.jsonl",
    "loss.png",
    "accuracy_by_length.png",
    "samples.txt",
    "mlflow.json",
    ".finished",
    ".lock",
)
FOLDERS = ("checkpoints", "model")
LONGEST_NAME = Path("checkpoints", ".step-00000000.building", "optimizer.safetensors")
OLDEST_SECTIONS = {
    "run",
    "model",
    "data",
    "batch",
    "optim",
    "train",
}  # of every config.yaml that a run has written


def folder_errors(path: Path) -> list[str]:
    """Why a run cannot write in this folder, or should not; empty if it may."""
    try:
        os.lstat(path / LONGEST_NAME)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            return [f"cannot use {path}: {error.strerror}"]
    if not os.path.lexists(path):
        parent = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        return [problem] if (problem := _place_problem(parent, is_folder=True)) else []
    if problem := _place_problem(path, is_folder=True):
        return [problem]
    there = [name for name in (*FILES, *FOLDERS) if os.path.lexists(path / name)]
    if errors := [
        problem for name in there if (problem := _place_problem(path / name, is_folder=name in FOLDERS))
    ]:
        return errors
    foreign = [
        name
        for name in there
        if name != ".lock" and not (name in FOLDERS and not any((path / name).iterdir()))
    ]
    if foreign and not _was_made_by_a_run(path):
        return [
            f"{path} holds {', '.join(foreign)}, which the run would overwrite, but no config.yaml or checkpoint that a run has written; "
            "name a folder of the run's own, e.g. runs/NAME"
        ]
    return []


def _place_problem(path: Path, is_folder: bool) -> str | None:
    """Why something that is there cannot be the folder, or the file, that a run writes."""
    if not path.exists():
        return f"{path} is a link to {os.readlink(path)}, which is not there; make that, or remove the link"
    if not (path.is_dir() if is_folder else path.is_file()):
        return f"{path} is {'no folder' if is_folder else 'no regular file'}; move it away, or name another folder"
    if not os.access(path, os.R_OK | os.W_OK | (os.X_OK if is_folder else 0)):
        return f"{path} cannot be written by this user; change its permissions, or name another folder"
    return None


def _was_made_by_a_run(path: Path) -> bool:
    """Whether a config.yaml here, or in a checkpoint, is one that a run has written: resolved, so with every
    section and setting."""
    for config in (path / "config.yaml", *(step / "config.yaml" for step in steps_in(path / "checkpoints"))):
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
