"""The files of a prepared corpus.

    DIR/manifest.json        what it was made of, and for each file its size and SHA-256
    DIR/tokenizer/           the tokenizer, as it is saved with a run
    DIR/shard-00000.arrow    the documents of the source's first shard, one a row

A shard is an Arrow IPC file. Arrow is memory-mapped, holds lists of a narrow integer type without copies, and
is read by other libraries (pandas, polars). Its footer is written last, so a truncated file is
recognized. A slice of tokens is a NumPy view of the mapped file, as it would be of an .npy file, and the
index of the documents needs no format of its own.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.errors import UserError
from ...common.files import user_path
from ..tokenizer import BYTES

if TYPE_CHECKING:
    from ..corpus import CorpusSpec

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
KIND = "minrnn_prepared"
"""The key that marks a manifest as that of a prepared corpus."""
FREE_FIELDS = ("corpus", "held_out", "hold_out", "excluded", "network", "passages")
"""The fields of a CorpusSpec that do not decide the documents. All others are fixed when the corpus is
prepared."""


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"shard-{shard:05}.arrow"


def token_type(encoder: Any) -> str:
    """The narrowest unsigned integer type that holds the ids of every text."""
    num_ids = 256 if encoder.backend_json is None else encoder.num_ids()
    return "uint8" if num_ids <= 2**8 else "uint16" if num_ids <= 2**16 else "uint32"


def schema(dtype: str) -> Any:
    """The columns of a shard (pyarrow.Schema)."""
    import pyarrow as pa

    return pa.schema(
        [
            ("tokens", pa.large_list(pa.from_numpy_dtype(dtype))),  # of the text, without bos and eos
            ("index", pa.int64()),  # of the document in the source's shard
            ("place", pa.int64()),  # in the units in which the shard can be cut (places.py)
            ("name", pa.string()),
            ("num_bytes", pa.int64()),  # of the text in UTF-8
            ("digest", pa.uint64()),  # of the text; decides whether it is held out
            ("num_skipped", pa.int32()),  # broken parts that were left out
            ("num_filtered", pa.int32()),  # parts that data.filter left out
            ("is_left_out", pa.bool_()),
            ("is_validation", pa.bool_()),  # where files, not digests, decide what is held out
        ]
    )


def is_prepared(corpus: str) -> bool:
    """Whether a corpus name is the folder of a prepared corpus, finished or not."""
    path = user_path(corpus) / MANIFEST
    try:
        return path.is_file() and KIND in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def prepared_corpora(corpus: object) -> list[str]:
    """The prepared corpora that `data.corpus` names: itself, or those of a list of names or mappings."""
    names = corpus if isinstance(corpus, list) else [corpus]
    names = [name.get("corpus") if isinstance(name, dict) else name for name in names]
    return [name for name in names if isinstance(name, str) and is_prepared(name)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished prepared corpus whose files have their sizes.

    Raises:
        UserError: the corpus is unfinished, has another format, or lacks files.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest[KIND] != FORMAT:
        message = f"{folder} has format {manifest[KIND]} of prepared corpora, and this minrnn reads {FORMAT}"
        raise UserError("data.corpus", f"{message}; prepare it again into another folder")
    if not manifest["complete"]:
        message = f"{folder} is unfinished; the same minrnn prepare command finishes it"
        raise UserError("data.corpus", message)
    for name, file in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != file["size"]:
            problem = "is missing" if size is None else f"has {size:,} bytes, not {file['size']:,}"
            advice = "run the same minrnn prepare command again, which makes it anew"
            raise UserError("data.corpus", f"{path} {problem}; {advice}")
    return manifest


def source_fields(spec: "CorpusSpec") -> dict[str, Any]:
    """What decides the documents of a corpus, apart from its name: settings of the `data` section, JSON."""
    values = {name: value for name, value in asdict(spec).items() if name not in (*FREE_FIELDS, "rules")}
    return values | spec.rules.as_settings()


def check_source_fields(spec: "CorpusSpec", manifest: dict[str, Any]) -> None:
    """Check that settings that are fixed in a prepared corpus are left out, or those that it was made with.

    Raises:
        UserError: each setting that differs.
    """
    values, defaults, made = source_fields(spec), source_fields(type(spec)(spec.corpus)), manifest["source"]
    errors = [
        (
            f"data.{name}",
            f"is {value!r}, but {spec.corpus} was prepared with {made.get(name)!r}; leave it out",
        )
        for name, value in values.items()
        if value not in (defaults[name], made.get(name))
    ]
    if errors:
        raise UserError.from_list(errors)


def prepared_tokenizer(corpus: str) -> str:
    """The name of a prepared corpus's tokenizer, as `data.tokenizer`: bytes, or the folder of its copy."""
    folder = user_path(corpus)
    name = json.loads((folder / MANIFEST).read_text())["tokenizer"]["name"]
    return BYTES if name == BYTES else str(folder / TOKENIZER)


def check_prepared_tokenizer(corpus: str, name: str, fingerprint: str) -> None:
    """Check that a tokenizer is the one that a prepared corpus was made with.

    Args:
        corpus: the folder of the prepared corpus.
        name: of the tokenizer, for messages.
        fingerprint: of the tokenizer.

    Raises:
        UserError: it is another tokenizer.
    """
    made = read_manifest(user_path(corpus))["tokenizer"]
    if made["fingerprint"] != fingerprint:
        message = f"{name} is not the tokenizer that {corpus} was prepared with ({made['name']})"
        raise UserError("data.tokenizer", f"{message}; leave it out, or prepare the corpus with this one")
