"""A run: everything that lasts from the first step to the last."""

from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from ..data import ChunkLoader, LabelledSet
from .checkpoint import ReaderState
from .config import Recipe
from .engine import Engine
from .evaluation import ValidationSets
from .folder import RunFolder
from .other_trackers import OtherTrackers
from .processes import ProcessLayout
from .push.beside import Pusher
from .run_log import RunLog
from .saving import Saver
from .task_evaluation import EvaluatedTasks
from .tracking import Tracker
from .watchdog import Watchdog


@dataclass(frozen=True)
class RunData:
    """What this process reads."""

    tokenizer: Any
    corpus: dict[str, Any] | None
    """The corpus's fingerprint at this start; None for a synthetic task."""
    loader: ChunkLoader
    readers: dict[int, ReaderState]
    """This process's readers: position and carried state of each."""
    validation: ValidationSets
    test: list[LabelledSet]
    """What is scored once, after the last step; empty for a language model."""


@dataclass(frozen=True)
class RunOutput:
    """What this process writes. Only the main process has trackers, a log and a pusher."""

    folder: RunFolder
    saver: Saver
    tracker: Tracker | None
    others: OtherTrackers | None
    log: RunLog | None
    pusher: Pusher | None = None


@dataclass
class Progress:
    """How far the run is. The loop updates it, a checkpoint's manifest records it."""

    step: int = 0
    tokens: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Of the latest steps, newest last: the reference for spikes."""
    num_skips: int = 0
    """Batches skipped in a row."""

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> "Progress":
        """The progress that a checkpoint recorded; an empty manifest gives the beginning."""
        recorded = ("step", "tokens", "recent_losses", "num_skips")
        return cls(**{name: manifest[name] for name in recorded if name in manifest})


@dataclass(frozen=True)
class Run:
    """Everything that lasts as long as the run."""

    recipe: Recipe
    accelerator: Accelerator
    layout: ProcessLayout
    data: RunData
    engine: Engine
    output: RunOutput
    watchdog: Watchdog
    matmul_rate: float
    """Of one process's device, in FLOP/s."""
    progress: Progress
    tasks: EvaluatedTasks
    """Of lm-eval, evaluated during training."""

    @property
    def step(self) -> int:
        """Number of the last step taken."""
        return self.progress.step

    @property
    def unit(self) -> str:
        """What a loss is the mean of."""
        return "example" if self.data.test else "token"

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def close(self, status: str) -> None:
        """Stop the loader, the saver and the trackers.

        Args:
            status: of the MLflow run: FINISHED, KILLED or FAILED.
        """
        self.data.loader.close()
        self.output.saver.join(timeout=60)
        if self.is_main:
            self.output.folder.metrics.close()
        if self.output.log is not None:
            self.output.log.close()
        if self.output.pusher is not None and status != "FINISHED":  # else the last push is to come
            self.output.pusher.close()
        if self.output.others is not None:
            self.output.others.close()
        if self.output.tracker is not None:
            self.output.tracker.close(status)

    def report(self, message: str) -> None:
        """Print a line, in the main process only."""
        if self.output.log is not None:
            self.output.log.report(message)
