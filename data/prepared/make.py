"""Prepares a corpus: one file of tokens for each shard of its source, by several processes.

    manifest (unfinished) and tokenizer -> shards, each written whole or not at all -> manifest (complete)

A shard whose description exists is finished, so a run that was killed goes on with the others.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import atomic_write, make_folder, sha256_of, write_json
from ...common.locks import lock
from ..corpus import SPLIT_BY_FILE, CorpusSpec, open_source
from ..fingerprint import corpus_fingerprint
from ..joined import JoinedFiles
from ..sources import Source, TextFiles
from ..tokenizer import BYTES, Encoder, tokenizer_fingerprint
from ..worker_process import Job, WorkerProcess
from .manifest import FORMAT, KIND, MANIFEST, TOKENIZER, is_prepared, shard_name, source_fields, token_type
from .write import Shard, ShardJob, Written, summary_path, write_shards

ADVICE = "use fewer --workers, or smaller documents or row groups"
OUT, WORKERS = "--out", "--workers"  # the options that errors name


@dataclass
class Progress:
    """What has been prepared so far, of all workers."""

    shards: int = 0
    """Number of finished shards."""
    num_shards: int = 0
    tokens: int = 0
    name: str = ""
    """Of the last document that was written."""


def prepare(
    spec: CorpusSpec,
    tokenizer: Any,
    tokenizer_name: str,
    out: Path,
    workers: int | None = None,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    verify: bool = False,
) -> dict[str, Any]:
    """Write the tokens of a corpus to a folder, or finish what was begun there.

    Args:
        tokenizer: as `load_tokenizer(tokenizer_name)` returned it.
        out: is created; or holds an unfinished or finished preparation of the same corpus.
        workers: processes; 0 writes in this one; None for one a core, if there are as many shards.
        on_progress: called after each batch of documents.
        verify: read all finished files and make those anew whose SHA-256 is wrong.

    Returns:
        The manifest.

    Raises:
        UserError: the folder holds anything else, cannot be written or is in use; or the corpus cannot be
            read.
    """
    if is_prepared(spec.corpus):
        raise UserError("data.corpus", f"{spec.corpus} is prepared already; train from it")
    inside = replace(spec, excluded=(*spec.excluded, os.path.realpath(out)))
    encoder = Encoder.from_tokenizer(tokenizer, tokenizer_name)
    source = open_source(inside, "all")
    manifest: dict[str, Any] = {
        KIND: FORMAT,
        "complete": False,
        "corpus": spec.corpus,
        "source": source_fields(spec),
        "fingerprint": corpus_fingerprint(inside),
        "tokenizer": {"name": tokenizer_name, "fingerprint": tokenizer_fingerprint(tokenizer)},
        "dtype": token_type(encoder),
        "fixed_parts": spec.corpus in SPLIT_BY_FILE,
        "is_stream": getattr(source, "is_stream", False),
        "skips_unread": getattr(source, "skips_unread", False),
    }
    try:
        with _locked(out):
            manifest |= {"shards": [], "files": {}, **_begin(out, manifest, tokenizer, verify)}
            if not manifest["complete"]:
                job = ShardJob(inside, encoder, manifest["dtype"], out, _validation(inside, source))
                shards = _finish(job, source.num_shards, workers, on_progress)
                _complete(out, manifest, shards, tokenizer_name)
    except OSError as error:
        raise UserError(OUT, f"{out} cannot be written ({error.strerror or error})") from None
    return manifest


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Create the folder and lock it."""
    if out.exists() and not out.is_dir():
        raise UserError(OUT, f"{out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not is_prepared(str(out)):
        raise UserError(OUT, f"{out} holds other files; name a new folder")
    make_folder(out)
    with (out / ".lock").open("w") as file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise UserError(OUT, f"another process is preparing {out}; wait for it to end") from None
        yield


def _begin(out: Path, manifest: dict[str, Any], tokenizer: Any, verify: bool) -> dict[str, Any]:
    """Write the unfinished manifest, or read the one that is there.

    Raises:
        UserError: the folder holds another corpus, or one with other settings.
    """
    path = out / MANIFEST
    if not path.exists():
        # the manifest is first, so that the folder is known to be ours
        write_json(path, manifest)
        if manifest["tokenizer"]["name"] != BYTES:
            tokenizer.save_pretrained(out / TOKENIZER)
        return {}
    found = json.loads(path.read_text())
    _check_same(out, found, manifest)
    if verify or any(_size(out / name) != file["size"] for name, file in found.get("files", {}).items()):
        _discard_damaged(out, found, verify)
    if not found["complete"] and manifest["tokenizer"]["name"] != BYTES:
        tokenizer.save_pretrained(out / TOKENIZER)  # a kill may have left a part of it
    return found


def _check_same(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = [
        f"data.{name} {found['source'].get(name)!r}, not {value!r}"
        for name, value in wanted["source"].items()
        if found["source"].get(name) != value
    ]
    if found[KIND] != FORMAT:
        differences.append(f"format {found[KIND]}, not {FORMAT}")
    if found["tokenizer"]["fingerprint"] != wanted["tokenizer"]["fingerprint"]:
        differences.append(f"the tokenizer {found['tokenizer']['name']}, not {wanted['tokenizer']['name']}")
    if found["fingerprint"] is None and found["corpus"] != wanted["corpus"]:
        differences.append(f"the corpus {found['corpus']}, not {wanted['corpus']}")
    elif found["fingerprint"] != wanted["fingerprint"]:
        before, now = found["corpus"], wanted["corpus"]
        other = f"the corpus {before}, not {now}"
        differences.append(f"{before} as it was before it changed" if before == now else other)
    if differences:
        raise UserError(OUT, f"{out} was begun with {'; '.join(differences)}; name another folder")


def _discard_damaged(out: Path, found: dict[str, Any], verify: bool) -> None:
    """Mark damaged shards as unfinished, in the folder and in the manifest that was found."""
    shards = {shard_name(i): (i, Shard(**shard)) for i, shard in enumerate(found["shards"])}
    for path in sorted(out.glob("shard-*.json")):
        shards.setdefault(path.with_suffix(".arrow").name, (-1, Shard(**json.loads(path.read_text()))))
    for name, (number, shard) in shards.items():
        is_intact = _size(out / name) == shard.size and (not verify or sha256_of(out / name) == shard.sha256)
        if is_intact and number >= 0:
            write_json(summary_path(out, number), asdict(shard))
        elif not is_intact:
            (out / name).with_suffix(".json").unlink(missing_ok=True)
    found |= {"complete": False, "shards": [], "files": {}}
    write_json(out / MANIFEST, found)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _validation(spec: CorpusSpec, source: Source) -> frozenset[int] | None:
    """Indices of the documents that are held out, if files decide that."""
    if spec.corpus not in SPLIT_BY_FILE:
        return None

    def names(source: Source) -> list[Path]:
        """The path of each document: of its file, or of the group of files that it joins."""
        assert isinstance(source, TextFiles | JoinedFiles)
        return source.paths if isinstance(source, TextFiles) else source.group_paths

    held_out = set(names(open_source(spec, "validation")))
    return frozenset(index for index, name in enumerate(names(source)) if name in held_out)


def _finish(
    job: ShardJob, num_shards: int, workers: int | None, on_progress: Callable[[Progress], object]
) -> list[Shard]:
    """Write the shards that are not finished; returns all of them."""
    shards: dict[int, Shard] = {}
    for number in range(num_shards):
        path = summary_path(job.folder, number)
        if path.exists():
            shard = Shard(**json.loads(path.read_text()))
            if _size(job.folder / shard_name(number)) == shard.size:
                shards[number] = shard
    pending = [number for number in range(num_shards) if number not in shards]
    progress = Progress(len(shards), num_shards, sum(shard.tokens for shard in shards.values()))
    on_progress(progress)
    for written in _written(job, pending, workers):
        progress.tokens += written.tokens
        progress.name = written.name
        if written.finished is not None and written.shard is not None:
            shards[written.shard] = written.finished
            progress.shards += 1
        on_progress(progress)
    return [shards[number] for number in range(num_shards)]


def _written(job: ShardJob, pending: list[int], workers: int | None) -> Iterator[Written]:
    """The reports of all workers, which write these shards."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(cores if workers is None else workers, len(pending))
    if num_workers <= (1 if workers is None else 0):
        yield from write_shards(job, pending)
        return
    running: list[WorkerProcess] = []
    try:
        for worker in range(num_workers):
            arguments = (job, pending[worker::num_workers], num_workers > 1)
            task = Job(write_shards, arguments, job.spec.corpus, WORKERS, ADVICE)
            running.append(WorkerProcess(task, lambda written: written.name))
        while running:
            for process in list(running):
                written = process.take(timeout=0.2 / len(running))
                if written is not None and written.shard is None:
                    process.close()
                    running.remove(process)
                elif written is not None:
                    yield written
    finally:
        for process in running:
            process.close()


def _complete(out: Path, manifest: dict[str, Any], shards: list[Shard], tokenizer_name: str) -> None:
    """Write the complete manifest, with the hashes of all files."""
    files = {shard_name(i): {"size": s.size, "sha256": s.sha256} for i, s in enumerate(shards)}
    if tokenizer_name != BYTES:
        for path in sorted((out / TOKENIZER).rglob("*")):
            if path.is_file():
                digest = {"size": path.stat().st_size, "sha256": sha256_of(path)}
                files[path.relative_to(out).as_posix()] = digest
    manifest |= {"complete": True, "shards": [asdict(shard) for shard in shards], "files": files}
    with atomic_write(out / MANIFEST) as unfinished:
        unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
    for number in range(len(shards)):
        summary_path(out, number).unlink(missing_ok=True)
