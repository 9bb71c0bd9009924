"""TensorBoard and Weights & Biases through Accelerate's trackers (`tracking.also`), besides MLflow.

Each gets the numbers of every line of metrics.jsonl as KIND/NAME. After a resume no step is shown twice:
TensorBoard hides what an earlier process wrote after the checkpoint (`purge_step`), and W&B takes no step
that is not after its last. A tracker that fails is left out for the rest of the run, with a warning.
"""

import importlib.util
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.errors import missing_package_error, one_line_message
from ..common.files import write_text
from .config import Recipe
from .metrics import numbers
from .public import public_config
from .recipe import flatten, resolved_config

NOTE = "trackers.json"


def tracker_errors(recipe: Recipe) -> list[tuple[str, str]]:
    """The trackers of `tracking.also` whose packages are not installed."""
    return [
        error
        for name in recipe.tracking.also
        if not _is_installed(name)
        for error in missing_package_error("tracking.also", name, extra=name).errors
    ]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class OtherTrackers:
    """The trackers of a run, in its main process.

    Args:
        folder: the run's. TensorBoard writes to its folder tensorboard/, W&B to wandb/.
        step: that the run resumes from.
        warn: called with a message when a tracker fails.
    """

    def __init__(self, recipe: Recipe, folder: Path, step: int, warn: Callable[[str], object]):
        self._folder, self._warn = folder, warn
        self._trackers: dict[str, Any] = {}
        config = flatten(public_config(resolved_config(recipe)))
        for name in recipe.tracking.also:
            try:
                self._trackers[name] = self._start(name, recipe.tracking.experiment, config, step)
            except Exception as error:  # each library raises its own
                self._leave_out(name, error)

    def log(self, entry: dict[str, Any]) -> None:
        """Send the numbers of a line of metrics.jsonl."""
        if values := numbers(entry):
            self._call_each(lambda tracker: tracker.log(values, step=entry["step"]))

    def close(self) -> None:
        """Write what is left and end the trackers."""
        self._call_each(lambda tracker: tracker.finish())

    def _call_each(self, act: Callable[[Any], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        self._warn(f"tracking.also: {name} failed ({one_line_message(error)}); training goes on without it")

    def _start(self, name: str, experiment: str, config: dict[str, Any], step: int) -> Any:
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", self._folder, purge_step=step + 1)
            tracker.start()
            if step == 0:
                text = "".join(f"    {key}: {value}\n" for key, value in config.items())
                tracker.log({"config": text}, step=0)
            return tracker
        tracker = WandBTracker(
            experiment,
            id=self._wandb_id(step),
            resume="allow",
            name=self._folder.resolve().name,
            dir=str(self._folder),
            settings={"console": "off", "silent": True},
        )
        tracker.start()
        tracker.store_init_configuration(config)
        return tracker

    def _wandb_id(self, step: int) -> str:
        """The id of the W&B run: the same for all processes of a training, a new one for a new training."""
        path = self._folder / NOTE
        try:
            known = json.loads(path.read_text())["wandb"] if step else None
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        name = known or uuid.uuid4().hex
        write_text(path, json.dumps({"wandb": name}))
        return name
