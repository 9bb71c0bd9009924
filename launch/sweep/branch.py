"""A decay that starts from the checkpoint of a longer run.

With the schedule wsd, a run of S steps is the same as a longer one until its decay begins. So the shorter run
starts there from a copy of the longer run's checkpoint, and is equal to a direct run to the bit.
"""

import json
import shutil
from pathlib import Path

from ...common.files import make_folder, sync, write_text
from ...pipeline.checkpoint import MANIFEST, checkpoint_name, checkpoint_paths, read_manifest

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"


def has_branch_point(trunk: Path, step: int) -> bool:
    """Whether the longer run has saved the step."""
    return (trunk / CHECKPOINTS / checkpoint_name(step) / MANIFEST).exists()


def start_branch(trunk: Path, run: Path, step: int) -> None:
    """Copy a checkpoint of the longer run, and its metrics up to it, unless the run has one already.

    The checkpoint is renamed last, so a copy that was interrupted is made again.

    Raises:
        ValueError: the checkpoint is damaged.
        OSError: it cannot be copied.
    """
    folder, name = run / CHECKPOINTS, checkpoint_name(step)
    if checkpoint_paths(folder):
        return
    source = trunk / CHECKPOINTS / name
    read_manifest(source)
    make_folder(folder)
    lines = (trunk / METRICS).read_text().splitlines(keepends=True)
    write_text(run / METRICS, "".join(line for line in lines if json.loads(line)["step"] <= step))
    copy = folder / f".{name}.copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    for file in copy.iterdir():
        sync(file)
    sync(copy)
    copy.rename(folder / name)
    sync(folder)
