"""Datasets of the Hugging Face hub: resolved once a process, read shard by shard.

Parquet files, which nearly all datasets are made of, are read as in parquet.py, so that a shard can be cut
between its row groups. Other formats are streamed by `datasets`, whole shards only.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..common.errors import UserError, one_line_message
from .files import convert_read_errors
from .hub_network import retried_rows, retry_outages, set_up_hub
from .outages import DEFAULT_POLICY, RemoteError, RetryPolicy
from .parquet import Parquet
from .remote import path_of
from .row_filter import EVERY_ROW, RowRules
from .sources import Document, Part, Position, row_document


@dataclass
class HubDataset:
    """A dataset of the Hugging Face hub, or a local folder in its layout.

    Its shards are the dataset's, its documents the rows. The hint of a streamed shard is the state of the
    streamed dataset, so resuming does not read it from its beginning.
    """

    path: str
    subset: str | None
    split: str
    revision: str | None
    text_field: str
    skip_broken: bool = False
    group_field: str | None = None
    rules: RowRules = EVERY_ROW
    network: RetryPolicy = DEFAULT_POLICY
    skips_unread: ClassVar[bool] = False
    is_stream: ClassVar[bool] = True
    _reading: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._dataset, files = resolve_dataset(
            self.path, self.subset, self.split, self.revision, self.network
        )
        self._parquet = None
        if files is not None:
            paths = [path_of(file, self.network) for file in files]
            self._parquet = Parquet(
                paths, self.text_field, self.skip_broken, self.group_field, rules=self.rules
            )

    @property
    def num_shards(self) -> int:
        return self._dataset.num_shards

    def cuts(self, shard: int) -> Sequence[int]:
        return (0, 1) if self._parquet is None else self._parquet.cuts(shard)

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        return self.read_part(Part(shard), start)

    def read_part(self, part: Part, start: Position) -> Iterator[Document]:
        if self._parquet is not None:
            return self._parquet.read_part(part, start)
        return self._stream(part, start)

    def _stream(self, part: Part, start: Position) -> Iterator[Document]:
        shard = part.shard
        self._reading = self._dataset.shard(self.num_shards, shard)
        index = 0
        if start.hint is not None:
            self._reading.load_state_dict(start.hint)
            index = start.index
        with convert_read_errors(f"{self.path}[{shard}]"):
            for row in retried_rows(self._reading, f"{self.path}[{shard}]", self.network):
                if index >= start.index and part.has(index):
                    name = f"{self.path}[{shard}][{index}]"
                    yield row_document(
                        row, name, index, self.text_field, self.group_field, self.rules, self.skip_broken
                    )
                index += 1

    def hint(self) -> Any:
        return None if self._parquet is not None else json.loads(json.dumps(self._reading.state_dict()))


@functools.lru_cache(maxsize=16)
def resolve_dataset(
    path: str,
    subset: str | None,
    split: str,
    revision: str | None,
    network: RetryPolicy = DEFAULT_POLICY,
) -> tuple[Any, list[str] | None]:
    """The streamed dataset, and its parquet files in the order of its shards (None: other formats).

    Raises:
        UserError: the dataset, the subset or the split does not exist, or may not be read.
    """
    from datasets import load_dataset_builder

    set_up_hub(network.timeout)
    try:
        builder = retry_outages(
            lambda: load_dataset_builder(path, subset, revision=revision), f"the dataset {path}", network
        )
        data_files = builder.config.data_files or {}
        if data_files and split not in data_files:
            known = ", ".join(map(str, data_files))
            raise UserError("data.split", f"{path!r} has no split {split!r}; it has {known}")
        dataset: Any = builder.as_streaming_dataset(split=split)
    except UserError:
        raise
    except RemoteError as error:
        raise UserError("data.corpus", str(error)) from error
    except Exception as error:  # datasets, the hub client and the file system each raise their own
        raise _resolving_error(path, subset, error) from error
    files = list(map(str, data_files.get(split, []))) if builder.name == "parquet" else None
    return dataset, files if files is not None and len(files) == dataset.num_shards else None


def resolve_commit(path: str, revision: str | None) -> str:
    """The commit of the hub that a branch, tag or commit of a dataset names; None is its main branch.

    Raises:
        UserError: the dataset or the revision does not exist, may not be read, or the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(path, revision=revision).sha
    except RevisionNotFoundError:
        problem = f"{path!r} has no revision {revision!r}; name a branch, tag or commit of it"
        raise UserError("data.revision", problem) from None
    except Exception as error:
        raise _resolving_error(path, None, error) from error
    assert commit is not None
    return commit


def _resolving_error(path: str, subset: str | None, error: Exception) -> UserError:
    """The error for a dataset that cannot be opened, with what to do about it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    message = one_line_message(error)
    if isinstance(error, GatedRepoError) or "gated" in message:
        page = f"https://huggingface.co/datasets/{path}"
        return UserError(
            "data.corpus",
            f"the dataset {path!r} is gated; accept its conditions at {page}, then log in with "
            "`hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RepositoryNotFoundError) or type(error).__name__ == "DatasetNotFoundError":
        return UserError(
            "data.corpus",
            f"there is no dataset {path!r} on the hub, or it is private ({message}); check its name, or log "
            "in with `hf auth login` or set HF_TOKEN",
        )
    if subset is not None and "BuilderConfig" in message:
        return UserError("data.subset", f"{path!r} has no subset {subset!r} ({message})")
    if "Config name is missing" in message:
        return UserError("data.subset", f"{path!r} has several subsets; name one ({message})")
    if isinstance(error, ConnectionError) or "Offline" in type(error).__name__:
        return UserError(
            "data.corpus",
            f"the hub cannot be reached for the dataset {path!r} ({message}); check the network, or download "
            "its files and name their folder",
        )
    return UserError("data.corpus", f"cannot open the dataset {path!r} ({type(error).__name__}: {message})")
