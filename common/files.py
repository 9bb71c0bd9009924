"""Files on disks that fail: written whole or not at all, and read again after errors that may pass."""

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from .errors import StorageError

T = TypeVar("T")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
RETRY_AFTER = (0.5, 2.0, 8.0)  # seconds: the time that a file server or a path takes to fail over


def user_path(text: str) -> Path:
    """A path that a user typed. `~` is the home folder, also in `--out=~/x`, where no shell expands it."""
    return Path(os.path.expanduser(text))


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk. Folders are skipped on file systems that cannot sync them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write, which then replaces `path`. A kill leaves the old or the new file."""
    unfinished = path.with_name(f".{path.name}.part")
    yield unfinished
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text atomically."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as indented JSON, atomically. Its folder is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and sync each."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def system_error(error: Exception) -> OSError | None:
    """The OSError behind an exception, or None. safetensors (0.8) has its number in the message only."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def read_with_retries(path: Path, function: Callable[[Path], T]) -> T:
    """Return `function(path)`. Retry after I/O errors such as EIO and ESTALE: the file may be intact.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        StorageError: the last retry failed, too.
        Others: errors of the function about the content.
    """
    for wait in (*RETRY_AFTER, None):
        try:
            return function(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(errno.ENOENT, "is missing", str(path)) from None
        except (OSError, SafetensorError) as error:
            failure = system_error(error)
            if failure is None:
                raise
            if wait is None:
                tried = f"tried {len(RETRY_AFTER) + 1} times over {sum(RETRY_AFTER):.0f} seconds"
                message = f"{path} cannot be read: {failure.strerror} ({tried})"
                raise StorageError(failure.errno, message) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")
