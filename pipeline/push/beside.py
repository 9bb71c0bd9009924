"""Pushes while a run trains, each by a process of its own. The loop starts it and looks whether it has
ended; it never waits.

    saver thread   step-000200 is valid
    loop           links to its files -> starts the worker -> ... steps ... -> the worker has ended: a line of
                   the log, or a warning
    end of the run the last push

A process, not a thread, because building a model draws from torch's random numbers, which the training uses.
The links keep the checkpoint if the run removes it meanwhile. A push that fails is a warning, once for each
kind of failure; the next checkpoint is another try.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ...common.files import write_text
from ..checkpoint import checkpoint_name
from ..config import Recipe
from .errors import HubError
from .target import Identity, PushOptions, open_target

NICE = 5  # of the worker, while the run trains
LINKS = ".push-checkpoint"
NOTE = "push.json"
"""In the run's folder: {"repo", "step"} of the last push of a finished run."""
GOES_ON = "; training goes on, and the next push tries again"
# Of launchers, which would make the worker a rank of the training.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "GROUP_", "ROLE_")


def push_options(recipe: Recipe) -> PushOptions | None:
    """The options of a recipe's pushes; None if it has none."""
    push = recipe.push
    if push.repo is None:
        return None
    return PushOptions(
        push.repo, private=push.private, overwrite=push.overwrite, license=push.license, in_recipe=True
    )


def check_push(recipe: Recipe, run_id: str, is_resumed: bool, warn: Callable[[str], object]) -> None:
    """Check before the first step that the run may push: the token, its right to write, and what the
    repository holds. The repository is created if it is not there.

    Args:
        is_resumed: a hub that does not answer is a warning only, since the run was checked when it began.

    Raises:
        UserError: the run may not push.
    """
    if (options := push_options(recipe)) is None:
        return
    try:
        open_target(options, Identity(run_id))
    except HubError as error:
        if not (is_resumed and error.kind == "outage"):
            raise
        warn(f"push: {error.errors[0][1]}; training goes on")


class Pusher:
    """Pushes the checkpoints of a run while it trains.

    Args:
        run: the run's folder.
        step: of the checkpoint that the run resumes from, or 0.
        warn, report: called with a message.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        step: int,
        warn: Callable[[str], object],
        report: Callable[[str], object],
    ):
        options = push_options(recipe)
        assert options is not None
        self.options, self.run, self.every = options, run, recipe.push.every
        self.trust = recipe.data.trust_remote_code
        self._warn, self._report = warn, report
        self._last = step
        """The newest checkpoint that was pushed or tried."""
        self._worker: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._warned: set[str] = set()

    def update(self, newest: int | None) -> None:
        """Look whether a push has ended, and start the next if one is due.

        Args:
            newest: step of the newest valid checkpoint.
        """
        if self._worker is not None:
            if self._worker.poll() is None:
                return
            self._end()
        if newest is not None and self.every and newest // self.every > self._last // self.every:
            self._last = newest
            try:
                self._start(newest)
            except OSError as error:
                self._warn_once("start", f"cannot be started ({error}){GOES_ON}")

    def push_last(self, step: int) -> None:
        """Push the checkpoint of the last step, after a push that is in progress. A failure is a warning with
        the command that finishes it."""
        failure: str | None = "it was interrupted"
        try:
            if self._worker is not None:
                self._worker.wait()
                self._end()
            self._start(step, nice=0)
            assert self._worker is not None
            self._worker.wait()
            failure = self._end(is_last=True)
        except OSError as error:
            failure = str(error)
        finally:
            self.close()
            if failure is not None:
                self._warn(f"push: {failure}; `{self._command()}` finishes it")

    def close(self) -> None:
        """End a push that is in progress. The repository is as it was."""
        if self._worker is not None:
            self._worker.terminate()
            self._worker.wait()
            self._worker = None
        shutil.rmtree(self.run / LINKS, ignore_errors=True)

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(f"push: {message}")

    def _start(self, step: int, nice: int = NICE) -> None:
        """Start the worker on a checkpoint.

        Raises:
            OSError: the checkpoint is gone, or no process can be started.
        """
        argument = {
            "run": str(self.run),
            "checkpoint": str(_linked(self.run, step)),
            "trust": self.trust,
            "nice": nice,
            "options": vars(self.options),
        }
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._worker = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", json.dumps(argument)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C is for the training, which saves first
        )

    def _end(self, is_last: bool = False) -> str | None:
        """Report how the worker ended; returns the failure of the last push."""
        assert self._worker is not None
        status, self._worker = self._worker.returncode, None
        result = self._result(status)
        shutil.rmtree(self.run / LINKS, ignore_errors=True)
        if "error" in result:
            if is_last:
                return result["error"]
            if result["kind"] != "busy":
                self._warn_once(result["kind"], result["error"] + GOES_ON)
            return None
        if result["warning"]:
            self._warn_once("card", result["warning"])
        self._report(result["message"])
        if is_last:
            self._note(result["step"])
        return None

    def _note(self, step: int) -> None:
        try:
            write_text(self.run / NOTE, json.dumps({"repo": self.options.repo, "step": step}) + "\n")
        except OSError as error:
            self._warn(f"push: {NOTE} cannot be written ({error}); the next start of the run pushes again")

    def _result(self, status: int) -> dict[str, Any]:
        """What the worker printed."""
        assert self._output is not None
        assert self._errors is not None
        texts = []
        for file in (self._output, self._errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace").strip())
            file.close()
        try:
            return json.loads(texts[0].splitlines()[-1])
        except (IndexError, ValueError):
            last = (texts[1].splitlines() or ["no message"])[-1]
            return {"kind": "crash", "error": f"its process ended with status {status}: {last}"}

    def _command(self) -> str:
        """The command that pushes the run."""
        options = self.options
        words = ["minrnn", "push", str(self.run), "--repo", options.repo]
        words += ["--private"] * options.private + ["--overwrite"] * options.overwrite
        words += ["--license", options.license] if options.license else []
        words += ["--trust-remote-code"] * self.trust
        return shlex.join(words)


def build_pusher(
    recipe: Recipe, run: Path, step: int, warn: Callable[[str], object], report: Callable[[str], object]
) -> Pusher | None:
    """The pusher of a run; None if its recipe has no push.repo."""
    return None if recipe.push.repo is None else Pusher(recipe, run, step, warn, report)


def push_missed(
    recipe: Recipe, run: Path, step: int, warn: Callable[[str], object], report: Callable[[str], object]
) -> None:
    """Push a run that is finished at `step`, unless push.json says that this was done."""
    pusher = build_pusher(recipe, run, step, warn, report)
    if pusher is not None and not _is_pushed(run, recipe.push.repo, step):
        pusher.push_last(step)


def _is_pushed(run: Path, repo: str | None, step: int) -> bool:
    try:
        note = json.loads((run / NOTE).read_text())
    except (OSError, ValueError):
        return False
    return note == {"repo": repo, "step": step}


def _linked(run: Path, step: int) -> Path:
    """A folder of hard links to a checkpoint's files; on a file system without links, the checkpoint itself.

    Raises:
        OSError: the checkpoint is not there.
    """
    checkpoint, links = run / "checkpoints" / checkpoint_name(step), run / LINKS
    files = sorted(checkpoint.iterdir())
    shutil.rmtree(links, ignore_errors=True)
    folder = links / checkpoint.name
    folder.mkdir(parents=True)
    try:
        for file in files:
            os.link(file, folder / file.name)
    except FileNotFoundError:
        raise
    except OSError:
        return checkpoint
    return folder


def _environment() -> dict[str, str]:
    """The environment of the worker: none of a launcher, no accelerator, one thread, no progress bars."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER and not name.startswith(LAUNCHER_PREFIXES)
    }
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
