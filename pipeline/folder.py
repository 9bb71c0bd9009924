"""A run's folder: who may write in it, and where to go on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from accelerate import Accelerator

from ..common.errors import StorageError, UserError
from ..common.files import make_folder, read, replace
from ..common.locks import lock
from ..common.output import warn
from .checkpoint import newest_valid, steps_in
from .config import Recipe
from .export_folder import check_export
from .folder_checks import folder_errors
from .metrics import MetricsFile, cut_metrics
from .processes import run_on_main
from .recipe import check_unchanged, resolved


@dataclass
class RunFolder:
    """An opened folder, locked until it is closed or the process ends."""

    path: Path
    checkpoint: Path | None
    """Where to go on, or None to begin."""
    manifest: dict[str, Any]
    """Of the checkpoint; empty without one."""
    saved: dict[str, Any]
    """Resolved recipe of the checkpoint; empty without one."""
    is_finished: bool
    """Whether what follows the last step is there: exported model, samples, artifacts."""
    lock: IO[str] | None
    metrics: MetricsFile
    _config: str = ""

    def begin(self, recipe: Recipe) -> None:
        """Everything is ready: cut the metrics to the checkpoint's step and write down the settings that hold
        from here on."""
        if num_cut := cut_metrics(self.metrics.path, self.manifest.get("step", 0)):
            warn(f"{num_cut} lines of {self.metrics.path} came after the checkpoint; they are written again")
        self._config = yaml.safe_dump(resolved(recipe), sort_keys=False)
        replace(self.path / "config.yaml", self._config)

    def mark_finished(self, step: int) -> None:
        """Note that what follows the last step is there. What a kill before this leaves undone is done at the
        next start.

        Raises:
            StorageError: this could not be written.
        """
        try:
            replace(self.path / ".finished", str(step))
        except OSError as error:
            raise StorageError(f"The end of the run could not be noted ({error}); start it again.") from error

    def restore(self) -> None:
        """Make the folder again, with its lock and settings, if it was removed while the run goes on.

        Raises:
            UserError: another run has taken its place.
        """
        if self.lock is None or _is_lock_of(self.lock, self.path):
            return
        was_removed = not (self.path / "config.yaml").exists()
        try:
            lock = _lock(self.path)
            self.lock.close()
            self.lock = lock
            replace(self.path / "config.yaml", self._config)
        except OSError:  # what is written next says why
            return
        if was_removed:
            warn(
                f"{self.path} was removed while the run goes on; it is made again, without the metrics and checkpoints that were in it"
            )

    def close(self) -> None:
        """Let others write there."""
        if self.lock is not None:
            self.lock.close()


def open_folder(recipe: Recipe, accelerator: Accelerator) -> RunFolder:
    """Create or reopen `run.dir`; all processes agree on the checkpoint to go on from.

    Raises: UserError: the folder is of no use or not a run's, another run is writing there, run.resume does
        not allow what is there, or the run was
            started with other settings.
        StorageError: a checkpoint cannot be read now, and might be in order.
    """
    path = Path(recipe.run.dir)
    folder = RunFolder(path, None, {}, {}, False, None, MetricsFile(path / "metrics.jsonl", warn))
    try:
        found, folder.is_finished = run_on_main(accelerator, lambda: _take(folder, recipe))
    except BaseException:
        folder.close()
        raise
    folder.checkpoint, folder.manifest, folder.saved = found or (None, {}, {})
    return folder


Found = tuple[Path, dict[str, Any], dict[str, Any]]
"""A checkpoint, its manifest and its resolved recipe."""


def _take(folder: RunFolder, recipe: Recipe) -> tuple[Found | None, bool]:
    """Lock the folder; returns where to go on, if anywhere, and whether the run is finished."""
    path = folder.path
    try:
        if errors := folder_errors(path):
            raise UserError.from_list(("run.dir", problem) for problem in errors)
        folder.lock = _lock(path)
        recover_export(path / "model")
        found = _where_to_go_on(path, recipe)
        is_finished = (
            found is not None
            and found[1]["step"] >= recipe.train.steps
            and _is_finished(path, found[1]["step"])
        )
        if not is_finished:
            check_export((path / "model").resolve(), "run.dir")
    except StorageError:
        raise
    except OSError as error:
        raise UserError("run.dir", f"cannot use {path}: {error.strerror}") from None
    return found, is_finished


def _lock(path: Path) -> IO[str]:
    make_folder(path)
    file = (path / ".lock").open("a")
    try:
        unlocked = lock(file, wait=False)
    except BlockingIOError:
        file.close()
        raise UserError(
            "run.dir", f"another process is training in {path}; wait for it, or name another folder"
        ) from None
    if unlocked is not None:
        warn(f"{path} is not locked, since {unlocked}; see to it that no other process trains in it")
    return file


def _is_lock_of(file: IO[str], path: Path) -> bool:
    """Whether the folder still holds the file that was locked; a file system that gives no answer does not
    say otherwise."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path / ".lock"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def recover_export(folder: Path) -> None:
    """Give an exported model its name back, if the export that was to replace it was killed between its
    renames."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if os.path.lexists(replaced) and not os.path.lexists(folder):
        os.rename(replaced, folder)


def _is_finished(path: Path, step: int) -> bool:
    """Whether what follows the last step was done at this step, and the model is still there."""
    note, model = path / ".finished", path / "model"
    return (
        note.exists()
        and note.read_text() == str(step)
        and (model / "config.json").exists()
        and any(model.glob("*.safetensors"))
    )


def _where_to_go_on(path: Path, recipe: Recipe) -> Found | None:
    folder, resume = path / "checkpoints", recipe.run.resume
    if resume == "never":
        if steps_in(folder):
            raise UserError(
                "run.resume",
                f"never, but {path} already holds {steps_in(folder)[0].name}; remove the folder or name another run.dir",
            )
        return None
    found = newest_valid(folder, warn, rename_invalid=True)
    if found is not None:
        saved = yaml.safe_load(read(found[0] / "config.yaml", Path.read_text))
        check_unchanged(saved, recipe, str(path))
        return *found, saved
    if resume == "must":
        raise UserError("run.resume", f"must, but {path} holds no valid checkpoint")
    if broken := steps_in(folder):
        raise UserError(
            "run.dir",
            f"none of the {len(broken)} checkpoints in {folder} is valid (see above); remove them to begin anew",
        )
    return None
