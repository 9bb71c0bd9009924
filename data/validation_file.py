"""Held-out text on disk, so that it is made once, whatever the number of processes and restarts.

    FOLDER/manifest.json        what it was made from, and the names of the other two; written last
    FOLDER/tokens-HASH.npy      integers [tokens], the narrowest type that holds them; memory-mapped
    FOLDER/documents-HASH.npy   int64 [documents, 3]: tokens, bytes and source of each

HASH is one of what it was made from. A file that was made from something else is made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import atomic_write, make_folder, write_json
from .corpus import CorpusSpec, Split
from .tokenizer import Encoder
from .validation import HeldOut

FORMAT = 2
_OWN_NAME = re.compile(r"\.?((tokens|documents)-[0-9a-f]{16}\.npy|manifest\.json)(\.part)?")


def made_from(
    spec: CorpusSpec,
    fingerprint: dict[str, Any] | None,
    part: Split,
    order: str,
    encoder: Encoder,
    max_tokens: int | None,
) -> dict[str, Any]:
    """What decides the content of the files; JSON. The place of a corpus with a fingerprint does not."""
    settings = dataclasses.asdict(spec)
    for name in ("excluded", "network"):
        settings.pop(name)
    if fingerprint is not None:
        settings.pop("corpus")
    tokenizer = json.dumps([encoder.bos, encoder.eos, encoder.backend_json])
    return {
        "format": FORMAT,
        "corpus": settings,
        "fingerprint": fingerprint,
        "part": part,
        "order": order,
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "max_tokens": max_tokens,
    }


def _hash(source: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def is_held_out_folder(folder: Path) -> bool:
    """Whether a folder holds only what `save_held_out` writes, finished or not."""
    return folder.is_dir() and all(_OWN_NAME.fullmatch(path.name) for path in folder.iterdir())


def save_held_out(folder: Path, held_out: HeldOut, source: dict[str, Any]) -> None:
    """Write the files, and remove those that were made from something else.

    Args:
        source: as returned by `made_from`.
    """
    make_folder(folder)
    name = _hash(source)
    tokens = held_out.tokens.astype(np.min_scalar_type(int(held_out.tokens.max(initial=0))))
    sources = np.zeros_like(held_out.lengths) if held_out.sources is None else held_out.sources
    columns = [held_out.lengths, held_out.sizes, sources]
    arrays = {"tokens": tokens, "documents": np.stack(columns, axis=1)}
    files = {kind: f"{kind}-{name}.npy" for kind in arrays}
    for kind, array in arrays.items():
        with atomic_write(folder / files[kind]) as unfinished, unfinished.open("wb") as file:
            np.save(file, array)
    manifest = {"made_from": source, "files": files, "num_read": held_out.num_read}
    write_json(folder / "manifest.json", manifest)
    for path in folder.glob("*.npy"):
        if path.name not in files.values():
            path.unlink(missing_ok=True)


def load_held_out(folder: Path, source: dict[str, Any]) -> HeldOut | None:
    """The held-out text, memory-mapped; None if the files are missing, damaged or of something else."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        manifest = json.loads((folder / "manifest.json").read_text())
        if json.dumps(manifest["made_from"], sort_keys=True) != json.dumps(source, sort_keys=True):
            return None
        tokens = np.load(folder / manifest["files"]["tokens"], mmap_mode="r").view(np.ndarray)
        documents = np.load(folder / manifest["files"]["documents"])
        if documents[:, 0].sum() != len(tokens):
            return None
        return HeldOut(tokens, documents[:, 0], documents[:, 1], manifest["num_read"], documents[:, 2])
    return None
