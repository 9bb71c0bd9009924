"""Exclusive locks on files."""

import errno
from typing import IO

try:
    import fcntl
except ImportError:  # not Unix
    fcntl = None

_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def lock(file: IO[str], wait: bool) -> str | None:
    """Lock an open file until it is closed or the process ends.

    Args:
        wait: wait until the lock is free.

    Returns:
        None, or the reason why the file system or the system has no locks.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    if fcntl is None:
        return "this system has no file locks"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        return f"the file system has no locks ({error.strerror})"
    return None
