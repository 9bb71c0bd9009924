"""A run's folder: its lock, and the checkpoint to resume from."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from accelerate import Accelerator

from ..common.errors import StorageError, UserError
from ..common.files import make_folder, read_with_retries, write_text
from ..common.locks import lock
from ..common.output import warn
from .checkpoint import checkpoint_paths, newest_valid
from .config import Recipe
from .export_folder import check_export
from .folder_checks import folder_errors
from .metrics import MetricsFile, cut_metrics
from .processes import run_on_main
from .recipe import resolved_config
from .recipe_on_resume import check_unchanged
from .run_id import new_run_id, read_run_id, write_run_id


@dataclass
class RunFolder:
    """A run's folder, locked until it is closed or the process ends."""

    path: Path
    checkpoint: Path | None
    """The checkpoint to resume from; None for a new run."""
    manifest: dict[str, Any]
    """The checkpoint's manifest; empty without one."""
    saved: dict[str, Any]
    """The checkpoint's resolved recipe; empty without one."""
    is_finished: bool
    """Whether everything after the last step is done: exported model, samples, artifacts."""
    lock: IO[str] | None
    metrics: MetricsFile
    run_id: str = ""
    """Known to the main process only."""
    _config: str = ""

    def begin(self, recipe: Recipe) -> None:
        """Cut the metrics to the checkpoint's step and write config.yaml. Called when everything else is set
        up."""
        if num_cut := cut_metrics(self.metrics.path, self.manifest.get("step", 0)):
            warn(f"{num_cut} lines of {self.metrics.path} came after the checkpoint; they are written again")
        self._config = yaml.safe_dump(resolved_config(recipe), sort_keys=False)
        write_text(self.path / "config.yaml", self._config)
        write_run_id(self.path, self.run_id)

    def mark_finished(self, step: int) -> None:
        """Record that everything after the last step is done. Until then, the next start repeats it.

        Raises:
            StorageError: the record could not be written.
        """
        try:
            write_text(self.path / ".finished", str(step))
        except OSError as error:
            raise StorageError(f"The end of the run could not be noted ({error}); start it again.") from error

    def restore(self) -> None:
        """Create the folder, lock and config.yaml again if they were removed during the run.

        Raises:
            UserError: another run uses the folder now.
        """
        if self.lock is None or _is_lock_of(self.lock, self.path):
            return
        was_removed = not (self.path / "config.yaml").exists()
        try:
            lock = _lock(self.path)
            self.lock.close()
            self.lock = lock
            write_text(self.path / "config.yaml", self._config)
            write_run_id(self.path, self.run_id)
        except OSError:  # the next write reports it
            return
        if was_removed:
            warn(
                f"{self.path} was removed while the run goes on; it is made again, "
                "without the metrics and checkpoints that were in it"
            )

    def close(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.close()


def open_folder(recipe: Recipe, accelerator: Accelerator) -> RunFolder:
    """Create or reopen `run.dir`. All processes agree on the checkpoint to resume from.

    Raises:
        UserError: the folder cannot be used or is not a run's, another run is using it, run.resume does not
            allow its content, or the run was started with other settings.
        StorageError: a checkpoint cannot be read now, but may be valid.
    """
    path = Path(recipe.run.dir)
    folder = RunFolder(path, None, {}, {}, False, None, MetricsFile(path / "metrics.jsonl", warn))
    try:
        resume_point, folder.is_finished = run_on_main(accelerator, lambda: _lock_and_check(folder, recipe))
    except BaseException:
        folder.close()
        raise
    folder.checkpoint, folder.manifest, folder.saved = resume_point or (None, {}, {})
    return folder


ResumePoint = tuple[Path, dict[str, Any], dict[str, Any]]
"""A checkpoint, its manifest and its resolved recipe."""


def _lock_and_check(folder: RunFolder, recipe: Recipe) -> tuple[ResumePoint | None, bool]:
    """Lock the folder; returns where to resume, if anywhere, and whether the run is finished."""
    path = folder.path
    try:
        if errors := folder_errors(path):
            raise UserError.from_list(("run.dir", message) for message in errors)
        folder.lock = _lock(path)
        recover_export(path / "model")
        resume_point = _resume_point(path, recipe)
        folder.run_id = (read_run_id(path) if resume_point is not None else None) or new_run_id()
        step = resume_point[1]["step"] if resume_point is not None else 0
        is_finished = resume_point is not None and step >= recipe.train.steps and _is_finished(path, step)
        if not is_finished:
            check_export((path / "model").resolve(), "run.dir")
    except StorageError:
        raise
    except OSError as error:
        raise UserError("run.dir", f"cannot use {path}: {error.strerror}") from None
    return resume_point, is_finished


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
    """Whether the folder still contains the file that was locked. True if the file system does not answer."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path / ".lock"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def recover_export(folder: Path) -> None:
    """Rename an exported model back, if an older version's export was killed between its two renames."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if os.path.lexists(replaced) and not os.path.lexists(folder):
        os.rename(replaced, folder)


def _is_finished(path: Path, step: int) -> bool:
    """Whether everything after the last step was done at this step, and the model still exists."""
    note, model = path / ".finished", path / "model"
    return (
        note.exists()
        and note.read_text() == str(step)
        and (model / "config.json").exists()
        and any(model.glob("*.safetensors"))
    )


def _resume_point(path: Path, recipe: Recipe) -> ResumePoint | None:
    """Where to resume, as run.resume says; None for a new run."""
    folder, resume = path / "checkpoints", recipe.run.resume
    if resume == "never":
        if checkpoints := checkpoint_paths(folder):
            message = f"never, but {path} already holds {checkpoints[0].name}"
            raise UserError("run.resume", f"{message}; remove the folder or name another run.dir")
        return None
    newest = newest_valid(folder, warn, rename_invalid=True)
    if newest is not None:
        checkpoint, manifest = newest
        saved = yaml.safe_load(read_with_retries(checkpoint / "config.yaml", Path.read_text))
        check_unchanged(saved, recipe, str(path))
        return checkpoint, manifest, saved
    if resume == "must":
        raise UserError("run.resume", f"must, but {path} holds no valid checkpoint")
    if invalid := checkpoint_paths(folder):
        message = f"none of the {len(invalid)} checkpoints in {folder} is valid (see above)"
        raise UserError("run.dir", f"{message}; remove them to begin anew")
    return None
