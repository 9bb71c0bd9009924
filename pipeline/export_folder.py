"""The folder of an export. An export replaces its own files, one by one, and leaves all others unchanged.

    .minrnn-export.new/    the new files, synced to disk before any other file is changed
    .minrnn-export.json    {"files": {name: [SHA-256, ...]}}: files that exports wrote here; during the
                           replacement, with old and new hashes

Weights and configuration must match, but two files cannot be replaced at once. So if the configuration
changes, it names the new weights in `.minrnn-export.new/` (transformers reads `transformers_weights`) until
they have their final name:

    config.json -> new, with transformers_weights
    model.safetensors -> new
    config.json -> new
    .minrnn-export.new/ -> removed

So an export that is killed leaves a model that loads, and the next export recognizes every file as its own.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import make_folder, sha256_of, sync, write_text
from .card import NAME as CARD
from .card import is_earlier_card

LIST, STAGED = ".minrnn-export.json", ".minrnn-export.new"
CONFIG, WEIGHTS, POINTER = "config.json", "model.safetensors", "transformers_weights"


def check_export(folder: Path, key: str, force: bool = False, names: Iterable[str] = ()) -> None:
    """Check that an export may be written to a folder.

    Args:
        key: the setting that names the folder, for messages.
        force: also replace files that no export wrote.
        names: files to write, in addition to those that exist.

    Raises:
        UserError: the folder holds other files but no export, or a file to replace was changed since an
            export wrote it.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(key, f"{folder} is a file; name a folder")
    entries = sorted(path.name for path in folder.iterdir() if path.name != STAGED)
    written = _written_files(folder, names)
    if folders := [name for name in {CONFIG, WEIGHTS, *names} if (folder / name).is_dir()]:
        raise UserError(key, f"{folder / folders[0]} is a folder where a file is to be written; move it away")
    if entries and written is None and not force:
        shown = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
        raise UserError(
            key,
            f"{folder} holds no export, but other files ({shown}); name another folder{_force_advice(key)}",
        )
    every: set[str] = {*names, *(written or {})} - {CARD}
    foreign = sorted(name for name in every if not _is_unchanged(folder / name, written or {}))
    if foreign and not force:
        verb = "is" if len(foreign) == 1 else "are"
        message = f"{', '.join(foreign)} in {folder} {verb} not as an export wrote it; move it away"
        raise UserError(key, message + _force_advice(key))


def _force_advice(key: str) -> str:
    return ", or replace it with --force" if key.startswith("--") else ""


def write_export(folder: Path, write: Callable[[Path], object], key: str, force: bool = False) -> bool:
    """Write an export; returns whether the card was written (one that was changed by hand is kept).

    Args:
        write: writes the files, config.json and model.safetensors among them, to an empty folder.
        key, force: as in `check_export`.

    Raises:
        UserError: as `check_export`; nothing was changed.
    """
    make_folder(folder)
    _finish_replacement(folder)
    staged = folder / STAGED
    names = _stage(folder, write, key, force)
    written = _written_files(folder, names) or {}
    keeps_card = (folder / CARD).exists() and not _is_unchanged(folder / CARD, written)
    own = [name for name in names if not (name == CARD and keeps_card)]
    hashes = {name: sha256_of(staged / name) for name in own}
    old_hashes = {
        name: sha256_of(folder / name)
        for name in {*own, *written}
        if (folder / name).is_file() and (name != CARD or not keeps_card)
    }
    interim_config = _interim_config(staged)
    both = {
        name: {files[name] for files in (hashes, old_hashes) if name in files}
        for name in sorted({*hashes, *old_hashes})
    }
    both[CONFIG].add(hashlib.sha256(interim_config.encode()).hexdigest())
    _write_list(folder, {name: sorted(values) for name, values in both.items()})
    _replace_files(folder, own, interim_config)
    for name in old_hashes.keys() - hashes.keys():
        (folder / name).unlink()
    _write_list(folder, {name: [value] for name, value in hashes.items()})
    shutil.rmtree(staged, ignore_errors=True)
    sync(folder)
    return not keeps_card


def _stage(folder: Path, write: Callable[[Path], object], key: str, force: bool) -> list[str]:
    """Write the new files to the staging folder and sync them; returns their names."""
    staged = folder / STAGED
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        write(staged)
        names = sorted(path.name for path in staged.iterdir())
        check_export(folder, key, force, names)
        for name in names:
            sync(staged / name)
        sync(staged)
    except BaseException:  # a full disk needs the space
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return names


def _write_list(folder: Path, files: dict[str, list[str]]) -> None:
    write_text(folder / LIST, json.dumps({"files": files}, indent=1))


def _replace_files(folder: Path, names: list[str], interim_config: str) -> None:
    """Move the staged files to their names, weights and configuration as the module describes."""
    staged = folder / STAGED
    for name in names:
        if name not in (CONFIG, WEIGHTS):
            os.replace(staged / name, folder / name)
    sync(folder)
    if not (folder / CONFIG).exists() or (folder / CONFIG).read_bytes() == (staged / CONFIG).read_bytes():
        os.replace(staged / WEIGHTS, folder / WEIGHTS)
        sync(folder)
        os.replace(staged / CONFIG, folder / CONFIG)
    else:
        write_text(folder / CONFIG, interim_config)
        _finish_replacement(folder)
    sync(folder)


def _interim_config(staged: Path) -> str:
    """The new config.json, with the staged path of the new weights."""
    config = json.loads((staged / CONFIG).read_text())
    return json.dumps({**config, POINTER: f"{STAGED}/{WEIGHTS}"}, indent=2, sort_keys=True) + "\n"


def _finish_replacement(folder: Path) -> None:
    """Give configuration and weights their final names, if config.json names weights in
    `.minrnn-export.new/`."""
    if _read_config(folder).get(POINTER) != f"{STAGED}/{WEIGHTS}":
        return
    weights, link = folder / STAGED / WEIGHTS, folder / f".{WEIGHTS}.part"
    link.unlink(missing_ok=True)
    try:
        os.link(weights, link)
    except OSError:  # a file system without links
        shutil.copyfile(weights, link)
        sync(link)
    os.replace(link, folder / WEIGHTS)
    sync(folder)
    os.replace(folder / STAGED / CONFIG, folder / CONFIG)
    sync(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / CONFIG).read_text())
        return config if isinstance(config, dict) else {}
    return {}


def _written_files(folder: Path, names: Iterable[str]) -> dict[str, list[str]] | None:
    """Hashes by name of the files that exports wrote here; None if there was no export.

    Old exports have no list and are recognized by config.json. Files with names that exports write are then
    theirs, the README only if it is an unchanged card.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        files = json.loads((folder / LIST).read_text())["files"]
        return {
            name: [str(value) for value in values]
            for name, values in files.items()
            if Path(name).name == name
        }
    if _read_config(folder).get("model_type") != "minrnn":
        return None
    shards = [
        path.name
        for path in (*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors.index.json"))
    ]
    own = [name for name in {CONFIG, WEIGHTS, *shards, *names} - {CARD} if (folder / name).is_file()]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        own += [CARD] * is_earlier_card((folder / CARD).read_text())
    return {name: [sha256_of(folder / name)] for name in own}


def edited_card(folder: Path) -> str | None:
    """The text of an export's model card, if it was changed by hand since an export wrote it."""
    written = _written_files(folder, ())
    if written is None or _is_unchanged(folder / CARD, written):
        return None
    return (folder / CARD).read_text()


def exported_files(folder: Path) -> list[str] | None:
    """Names of the files of an export, in order, with the card; None if the folder has no list of them."""
    if not (folder / LIST).exists() or (written := _written_files(folder, ())) is None:
        return None
    return sorted(name for name in {*written, CARD} if (folder / name).is_file())


def _is_unchanged(path: Path, written: dict[str, list[str]]) -> bool:
    """Whether a file is unchanged since an export wrote it, or does not exist."""
    return not path.exists() or (path.is_file() and sha256_of(path) in written.get(path.name, []))
