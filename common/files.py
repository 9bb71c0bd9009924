"""Files on disks that fail: written whole or not at all, read again where an error may pass."""

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from .errors import StorageError

T = TypeVar("T")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
RETRY_AFTER = (0.5, 2.0, 8.0)  # seconds: a file server that is started anew, a path that fails over


def user_path(text: str) -> Path:
    """A path as a user writes it. `~` is the home folder, also where no shell replaces it (`--out=~/results`)."""
    return Path(os.path.expanduser(text))


def sync(path: Path) -> None:
    """To the disk. Some file systems cannot sync folders: there the names are as safe as they make them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text)
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Create a folder and those above it that are missing, to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def system_error(error: Exception) -> OSError | None:
    """The system's error behind an exception, if there is one. That of safetensors has the number in its text only."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def read(path: Path, function: Callable[[Path], T]) -> T:
    """What `function(path)` returns. It is called again after errors that may pass: EIO, ESTALE, ETIMEDOUT say nothing about the file.

    Raises:
        FileNotFoundError: there is none, or a folder.
        StorageError: the error stayed.
        Others: what the function raises about the content.
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
                raise StorageError(
                    failure.errno, f"{path} cannot be read: {failure.strerror} ({tried})"
                ) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")
