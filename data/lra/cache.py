"""Labelled examples are made once and kept in a cache folder.

    CACHE/lra/listops-3f2a.../   tokens-train.npy ... manifest.json

The folder's name holds a hash of all that decides its content (`fingerprint`). It is made under a lock by one
process, in several worker processes where examples are generated, in a hidden folder that is renamed at the
end. So a folder of this name is complete.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...common.errors import UserError
from ...common.files import make_folder, sha256_of, sync, write_json
from ...common.locks import lock
from ..corpus import CorpusSpec
from ..fingerprint import corpus_fingerprint
from ..worker_process import Job, WorkerProcess
from .examples import ARRAYS, SPLITS, Example, Examples, read_examples, write_examples
from .reader import LabelledReader, LabelledSet
from .task import GeneratedTask, LabelledTask

FORMAT = 2  # of the files, and of what the generators draw: a change makes new folders
FIRST_BLOCKS = {"test": 0, "validation": 1 << 32, "train": 1 << 33}
"""Where each split of a generated task begins, so that its examples do not depend on the others' sizes. An
example that is drawn in two splits is kept in the first of this order."""
MANIFEST = "manifest.json"
KEY = "data.cache"
MAX_REPEATED = 20  # blocks in a row without a new example
WORKER_ADVICE = "restrict the process to fewer cores (taskset), each of which runs one"
POLL_SECONDS = 0.5  # how often a process that waits looks for the lock


def cache_folder(setting: str | None) -> Path:
    """The cache: `data.cache`, else MINRNN_CACHE, else XDG_CACHE_HOME/minrnn, else ~/.cache/minrnn."""
    if named := setting or os.environ.get("MINRNN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minrnn"


def fingerprint(task: LabelledTask) -> dict[str, Any]:
    """All that decides the stored examples; JSON."""
    files = None
    if task.folder is not None:
        files = corpus_fingerprint(CorpusSpec(str(task.folder_path())))
    return {"format": FORMAT, "task": task.NAME, "source": task.source, "files": files}


@dataclass(frozen=True)
class LabelledData:
    """A task and the folder with its examples."""

    task: LabelledTask
    folder: Path

    def examples(self, split: str) -> Examples:
        """The examples of a split, as many as the task's options ask for."""
        stored = read_examples(self.folder, split, self.task.TOWERS)
        return stored.subset(self.task.limit(split))

    def manifest(self) -> dict[str, Any]:
        """Number of examples by split, size and SHA-256 by file, and what they were made from."""
        return json.loads((self.folder / MANIFEST).read_text())

    def open_reader(
        self, reader: int, num_readers: int, lanes: int, seed: int, state: dict[str, Any] | None
    ) -> LabelledReader:
        """The training reader `reader`, after `state`."""
        examples = self.examples("train")
        return LabelledReader(examples, reader, num_readers, lanes, self.task.pad, seed, state)

    def sets(self, split: str, readers: range, num_readers: int, lanes: int) -> list[LabelledSet]:
        """The shares of these readers of a split that is scored."""
        examples, task = self.examples(split), self.task
        return [LabelledSet(examples, task.num_labels, r, num_readers, lanes, task.pad) for r in readers]


def open_data(
    task: LabelledTask, cache: Path, on_progress: Callable[[], object] = lambda: None
) -> LabelledData:
    """The examples of a task, made now if the cache lacks them. One process makes them, others wait.

    Args:
        on_progress: called now and then while they are made, also in a process that waits.

    Raises:
        UserError: rows of the task's files are wrong or too few, the source or the cache cannot be used, or
            stored files are damaged.
    """
    try:
        return _open(task, cache, on_progress)
    except UserError as error:  # the files are those of data.task
        raise error.with_keys({"data.corpus": "data.task"}) from None


def _open(task: LabelledTask, cache: Path, on_progress: Callable[[], object]) -> LabelledData:
    made_from = fingerprint(task)
    digest = hashlib.blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=8).hexdigest()
    data = LabelledData(task, cache / "lra" / f"{task.NAME}-{digest}")
    try:
        if not data.folder.exists():
            make_folder(data.folder.parent)
            with (data.folder.parent / f".{data.folder.name}.lock").open("w") as file:
                if _wait_for_lock(file, on_progress):
                    _remove_unfinished(data.folder)
                if not data.folder.exists():
                    _make(task, data.folder, made_from, on_progress)
        _check_sizes(data)
        _check_numbers(data)
    except OSError as error:
        message = f"{data.folder} cannot be used ({error.strerror or error}); name another folder"
        raise UserError(KEY, message) from None
    return data


def _wait_for_lock(file: IO[str], on_progress: Callable[[], object]) -> bool:
    """Wait until the file is locked; False if locks are not supported here."""
    while True:
        try:
            return lock(file, wait=False) is None
        except BlockingIOError:
            on_progress()
            time.sleep(POLL_SECONDS)


def _check_sizes(data: LabelledData) -> None:
    for name, (size, _) in data.manifest()["files"].items():
        actual = (data.folder / name).stat().st_size
        if actual != size:
            message = (
                f"{data.folder / name} has {actual} bytes, not {size}: remove that folder to make it again"
            )
            raise UserError(KEY, message)


def _check_numbers(data: LabelledData) -> None:
    """Check that there are as many examples as the task's options ask for."""
    task, stored = data.task, data.manifest()["examples"]
    source = f"the files of {task.folder}" if task.folder else f"lra/{task.NAME}"
    errors = [
        ("data.task", f"{split}_examples: {limit:,} of {source}, which have {stored[split]:,}; use fewer")
        for split in SPLITS
        if (limit := task.limit(split)) is not None and limit > stored[split]
    ]
    if errors:
        raise UserError.from_list(errors)


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left. The caller holds the lock."""
    for unfinished in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _make(
    task: LabelledTask, folder: Path, made_from: dict[str, Any], on_progress: Callable[[], object]
) -> None:
    """Write a task's examples, then rename the folder. Without locks, two processes may do so."""
    unfinished = folder.with_name(f".{folder.name}.{socket.gethostname()}-{os.getpid()}.part")
    unfinished.mkdir()
    try:
        counts = {}
        seen: set[bytes] = set()
        is_generated = isinstance(task, GeneratedTask) and task.folder is None
        for split in FIRST_BLOCKS if is_generated else SPLITS:
            examples = _take(task, split, seen) if is_generated else task.examples(split)
            counts[split] = write_examples(unfinished, split, _counted(examples, task, split, on_progress))
            if not counts[split]:
                raise UserError("data.task", f"the {split} split of lra/{task.NAME} has no examples")
        files = {}
        for name in (f"{array}-{split}.npy" for split in SPLITS for array in ARRAYS):
            sync(unfinished / name)
            files[name] = [(unfinished / name).stat().st_size, sha256_of(unfinished / name)]
        write_json(unfinished / MANIFEST, {"made_from": made_from, "examples": counts, "files": files})
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
            shutil.rmtree(unfinished, ignore_errors=True)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _counted(
    examples: Iterator[Example], task: LabelledTask, split: str, on_progress: Callable[[], object]
) -> Iterator[Example]:
    """The examples, with a progress bar."""
    from tqdm import tqdm

    total = task.sizes()[split] if isinstance(task, GeneratedTask) and task.folder is None else None
    name = f"lra/{task.NAME}, {split}"
    for example in tqdm(examples, name, total, unit=" examples", leave=False, disable=None):
        on_progress()
        yield example


def _take(task: LabelledTask, split: str, seen: set[bytes]) -> Iterator[Example]:
    """The examples of a split, which are in no split that was made before."""
    assert isinstance(task, GeneratedTask)
    with contextlib.closing(generate(task, FIRST_BLOCKS[split], seen)) as drawn:
        yield from itertools.islice(drawn, task.sizes()[split])


def generate(
    task: LabelledTask, first_block: int = 0, seen: set[bytes] | None = None, processes: int | None = None
) -> Generator[Example, None, None]:
    """Different examples, endlessly, in the order of their blocks.

    Args:
        seen: digests of examples that are left out; those of the new ones are added.
        processes: number of processes that generate; by default one for each core, if there are enough
            blocks for them.
    """
    assert isinstance(task, GeneratedTask)
    seen = set() if seen is None else seen
    if processes is None:  # starting a process takes longer than a few blocks
        processes = min(_num_cores(), -(-sum(task.sizes().values()) // task.BLOCK) // 8)
    with contextlib.closing(_blocks(task, first_block, processes)) as blocks:
        num_repeated = 0
        for block in blocks:
            num_repeated += 1
            if num_repeated > MAX_REPEATED:
                message = f"{task.NAME} has too few different examples with these options: ask for fewer"
                raise UserError("data.task", message)
            for texts, label in block:
                digest = hashlib.blake2b(b"\xff".join(texts), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    num_repeated = 0
                    yield texts, label


def _blocks(task: GeneratedTask, first: int, processes: int) -> Generator[list[Example], None, None]:
    """The blocks of a task in order. Of several worker processes, each makes every n-th, a few ahead."""
    if processes < 2:
        yield from _every_block(task, first, 1)
        return
    source = f"lra/{task.NAME}"
    workers = []
    try:
        for number in range(processes):
            job = Job(_every_block, (task, first + number, processes), source, "data.task", WORKER_ADVICE)
            workers.append(WorkerProcess(job, lambda block: f"a block of {len(block)} examples"))
        for worker in itertools.cycle(workers):
            yield worker.take()
    finally:
        for worker in workers:
            worker.close()


def _every_block(task: GeneratedTask, first: int, step: int) -> Iterator[list[Example]]:
    return map(task.block, itertools.count(first, step))


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
