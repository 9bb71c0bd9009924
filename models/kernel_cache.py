"""The folder in which compiled CPU kernels are kept between processes, and their names on disk.

    NUMBA_CACHE_DIR            if it is set
    __pycache__                beside the source
    XDG_CACHE_HOME/minrnn      or ~/.cache/minrnn
    TMPDIR/minrnn-UID          if nobody else can write to it

The first writable folder is used; without any, each process compiles its kernels again. numba itself tries
the first three and raises if none is writable. numba also checks only the file that defines a kernel: it
misses changes in other files whose code was compiled into the kernel. Here a kernel's file name contains a
hash of all its source, so versions are stored side by side and no process reads the kernels of another
version. A kernel that cannot be read is compiled again, and one that cannot be written is not stored: errors
of the cache never stop a run.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# (numba may be missing)

import functools
import inspect
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .operators import source_hash

try:  # optional, as in numba_support
    from numba import config
    from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
except ImportError:
    CompileResultCacheImpl = FunctionCache = _CacheLocator = object

logger: Any = logging.get_logger(__name__)


def _private_temporary_folder() -> Path | None:
    """A subfolder of the temporary folder that only this user can write to; None if it cannot be made.

    Other users must not write to it, because kernels loaded from it are executed.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"minrnn-{os.getuid()}" if hasattr(os, "getuid") else "minrnn")
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_own and is_private else None


def _candidates(source_folder: Path) -> Iterator[Path]:
    """Folders for the kernels of the modules in a folder, in order of preference."""
    # One name per source folder, because a kernel on disk is bound to the name of its module.
    name = _CacheLocator.get_suitable_cache_subpath(str(source_folder / "any.py"))
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR, name)
    yield source_folder / "__pycache__"
    yield Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minrnn", name)
    temporary = _private_temporary_folder()
    if temporary is not None:
        yield temporary / name


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@functools.cache
def cache_folder(source_folder: Path) -> Path | None:
    """The folder for the kernels of the modules in a folder; None if no folder is writable."""
    absolute = (folder for folder in _candidates(source_folder) if folder.is_absolute())  # "~": no known home
    return next(filter(_is_writable, absolute), None)


class _Locator(_CacheLocator):
    """Tells numba the folder and the file names of one function's kernels."""

    def __init__(self, function: Callable, file: str, folder: Path):
        self._line, self._hash, self._folder = function.__code__.co_firstlineno, source_hash(file), folder

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return self._hash

    def get_disambiguator(self) -> str:
        return f"{self._line}-{self._hash}"

    @classmethod
    def from_function(cls, function: Callable, file: str) -> "_Locator | None":
        folder = cache_folder(Path(file).resolve().parent)
        return None if folder is None else cls(function, file, folder)


class _Files(CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _KernelCache(FunctionCache):
    """numba's cache of a function, in which file errors never stop the function from running."""

    _impl_class = _Files

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # pickle raises nearly any error for a damaged file
            self._attempt(self.flush)
            return None

    def save_overload(self, *arguments: Any) -> None:
        self._attempt(super().save_overload, *arguments)

    @staticmethod
    def _attempt(write: Callable, *arguments: Any) -> None:
        try:
            write(*arguments)
        except OSError as error:  # a full disk, a file system that became read-only
            effect = "the next process compiles it again"
            logger.warning_once(f"warning: a compiled kernel could not be kept: {error}; {effect}")


def keep_on_disk(dispatcher: Any) -> Any:
    """Make a numba dispatcher keep its kernels on disk, if a folder is writable."""
    function = dispatcher.py_func
    if cache_folder(Path(inspect.getfile(function)).resolve().parent) is None:
        problem = "no cache folder is writable: each process compiles its CPU kernels again"
        logger.warning_once(f"warning: {problem}; set NUMBA_CACHE_DIR to one that is")
    else:
        dispatcher._cache = _KernelCache(function)  # as Dispatcher.enable_caching, with another class
    return dispatcher
