"""Which part of a corpus is for validation, and which for training.

    python-stdlib    whole modules, chosen by name
    documents        those whose text has a small hash: exact, and copies of a document are treated alike, but
                     finding them means to read everything before them
    shards           whole shards, or the last units (row groups, pieces of JSON lines) of one shard: nothing
                     else is read for validation

`auto` is shards for what would take long to read, if at most a tenth of it is held out, and documents
otherwise. All of it is a function of the corpus and the recipe, the same for every process and run.seed.
"""

import hashlib
import math
from typing import Literal

import numpy as np

from ..common.errors import UserError
from .parts import joined_units, units_of
from .sources import Part, Source

HoldOut = Literal["auto", "documents", "shards"]
HOLD_OUT_SEED = (0, 1)  # of the order of the shards: the same for every run
LARGEST_SHARE = 0.1  # of a corpus that `auto` holds out if the fraction cannot be met exactly


def text_digest(text: str) -> int:
    """A hash of a text, uniform in [0, 2^64)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_held_out(text: str | int, fraction: float) -> bool:
    """Whether a document is for validation, by its text or the digest of it.

    Depends on its text alone, so copies of a document are treated alike.
    """
    return (text_digest(text) if isinstance(text, str) else text) < fraction * 2**64


def are_held_out(digests: np.ndarray, fraction: float) -> np.ndarray:
    """As `is_held_out` of each digest, uint64 -> bool."""
    limit = math.ceil(fraction * 2**64)  # exact, unlike a comparison with the float
    return digests < np.uint64(limit) if limit < 2**64 else np.ones(len(digests), bool)


def held_out_parts(
    source: Source, fraction: float, hold_out: HoldOut
) -> tuple[list[Part], list[Part]] | None:
    """The parts of a source for training and those for validation; None: choose documents by `is_held_out`.

    Raises:
        UserError: `hold_out` is shards, and the source has too few parts that can be read separately.
    """
    # a source that takes long to read says so; wrappers of sources may not
    is_stream = getattr(source, "is_stream", False)
    if fraction == 0 or hold_out == "documents" or (hold_out == "auto" and not is_stream):
        return None
    shards = np.random.default_rng(HOLD_OUT_SEED).permutation(source.num_shards).tolist()
    num_whole = int(fraction * len(shards))
    if num_whole:
        train, validation = sorted(shards[:-num_whole]), sorted(shards[-num_whole:])
        return list(map(Part, train)), list(map(Part, validation))
    units = units_of(source, Part(shards[-1]))
    num_units = max(round(fraction * len(shards) * len(units)), 1)
    share = num_units / (len(units) * len(shards))
    if share > max(2 * fraction, LARGEST_SHARE):
        if hold_out == "auto":
            return None
        raise UserError(
            "data.hold_out",
            f"shards would hold out {share:.0%} of the corpus, which has too few shards, row groups or "
            "megabytes; use documents",
        )
    rest = joined_units(units[:-num_units])
    train = [part for shard in sorted(shards) for part in (rest if shard == shards[-1] else [Part(shard)])]
    return train, joined_units(units[-num_units:])
