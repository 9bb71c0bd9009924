"""File locks, and the message where there are none."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from minrnn.common.locks import lock


def test_a_second_holder_is_refused_until_the_first_releases(tmp_path: Path):
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert lock(first, wait=False) is None
        with pytest.raises(BlockingIOError):
            lock(second, wait=False)
        first.close()
        assert lock(second, wait=True) is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch, number: int):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (tmp_path / "lock").open("w") as file:
        assert lock(file, wait=False) == f"the file system has no locks ({os.strerror(number)})"
