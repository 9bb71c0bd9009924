"""Where compiled CPU kernels are kept between processes, and when they are out of date.

    NUMBA_CACHE_DIR            if it is set
    __pycache__                beside the source
    XDG_CACHE_HOME/minrnn      or ~/.cache/minrnn
    TMPDIR/minrnn-UID          if nobody else can write to it

The first of these that can be written to is used; with none, each process compiles its kernels again. numba
itself looks at the first three and raises where none is writable. It also takes a kernel for up to date as
long as the file that defines it is: a change in another file whose code was compiled into the kernel goes
unnoticed. Here a kernel's name on disk holds a hash of all of its source, so versions lie side by side, and
no process reads what another version wrote. What cannot be read or written is compiled, or not kept: the
cache never ends a run.
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
    """A folder in the temporary one that nobody else can write to; None where there is none.

    What is loaded from it is executed.
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
    """Folders for the kernels of the modules in a folder, the best first."""
    # A name for each source folder, since a kernel on disk is bound to the name of its module.
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
    """Where the kernels of the modules in a folder are kept; None where nothing can be written."""
    absolute = (folder for folder in _candidates(source_folder) if folder.is_absolute())  # "~": no known home
    return next(filter(_is_writable, absolute), None)


class _Locator(_CacheLocator):
    """Tells numba where one function's kernels lie, and their names."""

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
    """numba's cache of a function, but that no file in it can be in the way of running the function."""

    _impl_class = _Files

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # a file that was cut off or damaged makes pickle raise nearly anything
            self._attempt(self.flush)
            return None

    def save_overload(self, *arguments: Any) -> None:
        self._attempt(super().save_overload, *arguments)

    @staticmethod
    def _attempt(write: Callable, *arguments: Any) -> None:
        try:
            write(*arguments)
        except OSError as error:  # a full disk, a file system that became read-only
            cost = "the next process compiles it again"
            logger.warning_once(f"warning: a compiled kernel could not be kept: {error}; {cost}")


def keep_on_disk(dispatcher: Any) -> Any:
    """The function that numba compiles, with its kernels kept on disk where that is possible."""
    function = dispatcher.py_func
    if cache_folder(Path(inspect.getfile(function)).resolve().parent) is None:
        problem = "no cache folder is writable: each process compiles its CPU kernels again"
        logger.warning_once(f"warning: {problem}; set NUMBA_CACHE_DIR to one that is")
    else:
        dispatcher._cache = _KernelCache(function)  # as Dispatcher.enable_caching, with another class
    return dispatcher
