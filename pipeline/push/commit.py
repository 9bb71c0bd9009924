"""A push: the repository is opened, the files are staged, one commit brings them.

    open_target -> stage -> create_commit, on top of the commit that open_target saw

The hub's client sends large files first, and the commit names them. So a push that is cut off leaves the
repository as it was, and the next one sends only what is missing.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..card import NAME as CARD
from ..run_id import new_run_id, read_run_id, write_run_id
from .files import (
    Checkpoint,
    checkpoint_of,
    stage_checkpoint,
    stage_export,
    staged_files,
    staging,
    weights_sha256,
    write_marker,
)
from .target import Identity, PushOptions, Target, call_hub, hub_api, open_target


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    repo: str
    commit: str
    """The branch's newest commit."""
    is_new: bool
    """Whether the push made it; otherwise the repository held the same files already."""
    kept_card: bool
    """A card that was written by hand stayed."""
    step: int | None
    revision: str | None = None
    """The branch; None for main."""


def push_run(
    run: Path,
    options: PushOptions,
    step: int | None = None,
    dtype: str = "fp32",
    trust_remote_code: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Pushed:
    """Push a checkpoint of a run, with its training record.

    Args:
        step: of the checkpoint; None for the newest valid one.
        dtype: of the weights.
        checkpoint: instead of `step`.

    Raises:
        UserError: there is no such checkpoint, another push is in progress, or as `open_target`.
    """
    checkpoint = checkpoint or checkpoint_of(run, step)
    with staging(run) as staged:
        run_id = read_run_id(run)
        if run_id is None:  # a run of an earlier version
            run_id = new_run_id()
            write_run_id(run, run_id)
        identity = Identity(run_id)
        target = open_target(options, identity)
        options = replace(options, repo=target.repo)
        stage_checkpoint(checkpoint, staged, options, dtype, trust_remote_code)
        write_marker(staged, identity, run.resolve().name, checkpoint.step, target.keeps_card)
        return _commit(target, staged, options, f"Step {checkpoint.step}", checkpoint.step)


def push_export(folder: Path, options: PushOptions, staged: Path) -> Pushed:
    """Push an export that belongs to no run. It has no training record.

    Args:
        staged: an empty folder.

    Raises:
        UserError: the folder holds no export, or as `open_target`.
    """
    stage_export(folder, staged)
    identity = Identity(None, weights_sha256(staged))
    target = open_target(options, identity)
    write_marker(staged, identity, folder.resolve().name, None, target.keeps_card)
    return _commit(target, staged, options, "Upload the model", None)


def _commit(target: Target, staged: Path, options: PushOptions, message: str, step: int | None) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    written = [path for path in staged_files(staged) if not (path == CARD and target.keeps_card)]
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=staged / path) for path in written
    ]
    operations += [CommitOperationDelete(path_in_repo=path) for path in sorted(target.own - set(written))]
    info = call_hub(
        options,
        hub_api().create_commit,
        target.repo,
        operations,
        commit_message=message,
        revision=options.revision,
        parent_commit=target.parent,
    )
    is_new = info.oid != target.parent
    return Pushed(target.repo, info.oid, is_new, target.keeps_card, step, options.revision)


def pushed_message(pushed: Pushed) -> str:
    """What a push did, in a line."""
    where = pushed.repo if pushed.revision is None else f"{pushed.repo}, branch {pushed.revision}"
    done = f"pushed to {where}" if pushed.is_new else f"{where} holds this model already"
    at = f", step {pushed.step}" if pushed.step is not None else ""
    return f"{done}{at} (commit {pushed.commit[:7]})"


def kept_card_message(pushed: Pushed, options: PushOptions) -> str:
    """The warning about a card of the repository that stayed."""
    return f"{CARD} in {pushed.repo} was written by hand and is kept; {options.name('overwrite')} replaces it"
