"""A run's folder: who may write in it, and where to go on."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from accelerate import Accelerator

from ..data import UserError
from .checkpoint import newest_valid, replace, steps_in
from .config import Recipe
from .locks import lock
from .metrics import MetricsFile, cut_metrics
from .processes import from_main
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
    lock: IO[str] | None
    metrics: MetricsFile

    def begin(self, recipe: Recipe) -> None:
        """Everything is ready: cut the metrics to the checkpoint's step and write down the settings that hold from here on."""
        if num_cut := cut_metrics(self.metrics.path, self.manifest.get("step", 0)):
            warn(f"{num_cut} lines of {self.metrics.path} came after the checkpoint; they are written again")
        replace(self.path / "config.yaml", yaml.safe_dump(resolved(recipe), sort_keys=False))

    def finished_step(self) -> int | None:
        """The step whose model was exported, if any was."""
        note = self.path / ".finished"
        return int(note.read_text()) if note.exists() and note.read_text().isdigit() else None

    def mark_finished(self, step: int) -> None:
        """The model of this step is exported."""
        replace(self.path / ".finished", str(step))

    def close(self) -> None:
        """Let others write there."""
        if self.lock is not None:
            self.lock.close()


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"warning: {message}", file=sys.stderr)


def open_folder(recipe: Recipe, accelerator: Accelerator) -> RunFolder:
    """Create or reopen `run.dir`; all processes agree on the checkpoint to go on from.

    Raises:
        UserError: another run is writing there, run.resume does not allow what is there, or the run was started with other settings.
    """
    path = Path(recipe.run.dir)
    held, found, problems = None, None, []
    if accelerator.is_main_process:
        try:
            held = _lock(path)
            found = _where_to_go_on(path, recipe)
        except UserError as error:
            problems = error.problems
        except OSError as error:
            problems = [("run.dir", f"cannot write to {path}: {error.strerror}")]
    found, problems = from_main(accelerator, (found, problems))
    if problems:
        if held is not None:
            held.close()
        raise UserError(*problems)
    checkpoint, manifest, saved = found or (None, {}, {})
    return RunFolder(path, checkpoint, manifest, saved, held, MetricsFile(path / "metrics.jsonl", warn))


def _lock(path: Path) -> IO[str]:
    path.mkdir(parents=True, exist_ok=True)
    file = (path / ".lock").open("w")
    try:
        unlocked = lock(file, wait=False)
    except BlockingIOError:
        raise UserError(("run.dir", f"another process is training in {path}; wait for it, or name another folder")) from None
    if unlocked is not None:
        warn(f"{path} is not locked, since {unlocked}; see to it that no other process trains in it")
    return file


def _where_to_go_on(path: Path, recipe: Recipe) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    folder, resume = path / "checkpoints", recipe.run.resume
    if resume == "never":
        if steps_in(folder):
            raise UserError(
                ("run.resume", f"never, but {path} already holds {steps_in(folder)[0].name}; remove the folder or name another run.dir")
            )
        return None
    found = newest_valid(folder, warn)
    if found is not None:
        saved = yaml.safe_load((found[0] / "config.yaml").read_text())
        check_unchanged(saved, recipe, str(path))
        return *found, saved
    if resume == "must":
        raise UserError(("run.resume", f"must, but {path} holds no valid checkpoint"))
    if broken := steps_in(folder):
        raise UserError(("run.dir", f"none of the {len(broken)} checkpoints in {folder} is valid (see above); remove them to begin anew"))
    return None
