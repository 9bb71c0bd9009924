"""The folder of an export: its own files are replaced, one by one; everything else in it stays as it is.

    .minrnn-export.new/    the new files, on the disk before any other is touched
    .minrnn-export.json    {"files": {name: [SHA-256, ...]}}: what exports wrote here; old and new, while files are replaced

Weights and configuration belong together, and two names cannot be exchanged at once. Where the configuration
changes, it names the new weights in `.minrnn-export.new/` (transformers reads `transformers_weights`) until
they have their own name:

    config.json -> new, with transformers_weights;  model.safetensors -> new;  config.json -> new;
    .minrnn-export.new/ goes

So whenever an export is cut off, the folder holds a model that loads, and the next export knows every file as
its own.
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
from .card import is_card

LIST, STAGED = ".minrnn-export.json", ".minrnn-export.new"
CONFIG, WEIGHTS, POINTER = "config.json", "model.safetensors", "transformers_weights"


def check_export(folder: Path, key: str, force: bool = False, names: Iterable[str] = ()) -> None:
    """Whether an export may be written to a folder.

    Args:
        key: the setting that names the folder, for messages.
        force: replace files that no export wrote.
        names: of the files to write, beyond those that are there.

    Raises:
        UserError: it holds no export but something else, or a file to replace is not as an export wrote it.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(key, f"{folder} is a file; name a folder")
    entries = sorted(path.name for path in folder.iterdir() if path.name != STAGED)
    written = _written(folder, names)
    if folders := [name for name in {CONFIG, WEIGHTS, *names} if (folder / name).is_dir()]:
        raise UserError(key, f"{folder / folders[0]} is a folder where a file is to be written; move it away")
    if entries and written is None and not force:
        shown = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
        raise UserError(
            key, f"{folder} holds no export, but other files ({shown}); name another folder{_or_force(key)}"
        )
    every: set[str] = {*names, *(written or {})} - {CARD}
    foreign = sorted(name for name in every if not _is_own(folder / name, written or {}))
    if foreign and not force:
        verb = "is" if len(foreign) == 1 else "are"
        told = (
            f"{', '.join(foreign)} in {folder} {verb} not as an export wrote it; move it away{_or_force(key)}"
        )
        raise UserError(key, told)


def _or_force(key: str) -> str:
    return ", or replace it with --force" if key.startswith("--") else ""


def write_export(folder: Path, write: Callable[[Path], object], key: str, force: bool = False) -> bool:
    """Write an export; returns whether the card was written (one that was changed by hand is kept).

    Args:
        write: writes the files, config.json and model.safetensors among them, to a folder that is empty.
        key, force: as in `check_export`.

    Raises:
        UserError: as `check_export` does; nothing was changed.
    """
    make_folder(folder)
    _complete(folder)
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
    except BaseException:  # a full disk needs the room
        shutil.rmtree(staged, ignore_errors=True)
        raise
    written = _written(folder, names) or {}
    keeps_card = (folder / CARD).exists() and not _is_own(folder / CARD, written)
    own = [name for name in names if not (name == CARD and keeps_card)]
    hashes = {name: sha256_of(staged / name) for name in own}
    before = {
        name: sha256_of(folder / name)
        for name in {*own, *written}
        if (folder / name).is_file() and (name != CARD or not keeps_card)
    }
    pointing = _pointing(staged)
    both = {
        name: sorted({hashes.get(name, ""), before.get(name, "")} - {""})
        for name in sorted({*hashes, *before})
    }
    both[CONFIG] = sorted({*both[CONFIG], hashlib.sha256(pointing.encode()).hexdigest()})
    write_text(folder / LIST, json.dumps({"files": both}, indent=1))
    for name in own:
        if name not in (CONFIG, WEIGHTS):
            os.replace(staged / name, folder / name)
    sync(folder)
    if not (folder / CONFIG).exists() or (folder / CONFIG).read_bytes() == (staged / CONFIG).read_bytes():
        os.replace(staged / WEIGHTS, folder / WEIGHTS)
        sync(folder)
        os.replace(staged / CONFIG, folder / CONFIG)
    else:
        write_text(folder / CONFIG, pointing)
        _complete(folder)
    sync(folder)
    for name in before.keys() - hashes.keys():
        (folder / name).unlink()
    write_text(
        folder / LIST, json.dumps({"files": {name: [value] for name, value in hashes.items()}}, indent=1)
    )
    shutil.rmtree(staged, ignore_errors=True)
    sync(folder)
    return not keeps_card


def _pointing(staged: Path) -> str:
    """The new configuration, with the new weights by the name that they have for the time being."""
    config = json.loads((staged / CONFIG).read_text())
    return json.dumps({**config, POINTER: f"{STAGED}/{WEIGHTS}"}, indent=2, sort_keys=True) + "\n"


def _complete(folder: Path) -> None:
    """Where config.json names weights in `.minrnn-export.new/`: give both their own names."""
    if _config(folder).get(POINTER) != f"{STAGED}/{WEIGHTS}":
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


def _config(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / CONFIG).read_text())
        return config if isinstance(config, dict) else {}
    return {}


def _written(folder: Path, names: Iterable[str]) -> dict[str, list[str]] | None:
    """SHA-256 by name of what exports wrote here; None where there was none.

    An export of before there were lists is known by its config.json: files of the names that exports write
    are its own, the README only if it still is a card.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        files = json.loads((folder / LIST).read_text())["files"]
        return {
            name: [str(value) for value in values]
            for name, values in files.items()
            if Path(name).name == name
        }
    if _config(folder).get("model_type") != "minrnn":
        return None
    shards = [
        path.name
        for path in (*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors.index.json"))
    ]
    own = [name for name in {CONFIG, WEIGHTS, *shards, *names} - {CARD} if (folder / name).is_file()]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        own += [CARD] * is_card((folder / CARD).read_text())
    return {name: [sha256_of(folder / name)] for name in own}


def _is_own(path: Path, written: dict[str, list[str]]) -> bool:
    """Whether a file is as an export wrote it, or is not there."""
    return not path.exists() or (path.is_file() and sha256_of(path) in written.get(path.name, []))
