"""Compiled CPU kernels on disk: never out of date, and in nobody's way where nothing can be written."""

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import config

import minrnn.models.numba_support as support
from minrnn.models import kernel_cache

KERNEL = """
from .numba_support import kernel, load_input, sigmoid, store_output

@kernel
def apply(x, y):
    for i in range(x.size):
        store_output(y, i, sigmoid(load_input(x, i)))
"""
COPIED = ("numba_support", "kernel_cache", "operators", "boundaries")
SIGMOID = "return ONE / (ONE + exp(-x))"


@pytest.fixture
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """A package with a kernel of its own, and the user's folders; NUMBA_CACHE_DIR is not set."""
    package, home, temporary = tmp_path / "kernels_of_a_test", tmp_path / "home", tmp_path / "tmp"
    for folder in (package, home, temporary):
        folder.mkdir()
    for name in COPIED:
        shutil.copy(Path(support.__file__).with_name(f"{name}.py"), package)
    (package / "own.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return {"package": package, "home": home, "temporary": temporary}


@pytest.fixture
def kernel(folders) -> Iterator[Callable[[], Any]]:
    """The package's kernel, as a new process imports it."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith(folders["package"].name)]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def fresh() -> Any:
        forget()
        return importlib.import_module(f"{folders['package'].name}.own").apply

    yield fresh
    forget()


def values(apply: Any) -> list[float]:
    y = np.full(3, np.nan, np.float32)
    apply(np.array([-1, 0, 1], np.float32), y)
    return y.tolist()


def not_writable(folder: Path) -> None:
    """Put a file in place of the folder, because permissions do not stop root."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.touch()


def entries(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*.nb?")]


def test_a_second_process_reads_what_the_first_compiled(folders, kernel):
    first = kernel()
    assert values(first) == pytest.approx([0.268941, 0.5, 0.731059], abs=1e-5)
    second = kernel()
    assert values(second) == values(first)
    assert [sum(apply.stats.cache_hits.values()) for apply in (first, second)] == [0, 1]
    assert {path.parent for path in entries(*folders.values())} == {folders["package"] / "__pycache__"}


def test_a_change_in_another_file_is_a_change_of_the_kernel(folders, kernel):
    """The kernel's own file stays as it is; what it calls lies in another one."""
    before = values(kernel())
    source = folders["package"] / "numba_support.py"
    source.write_text(source.read_text().replace(SIGMOID, f"{SIGMOID} + ONE"))
    assert values(kernel()) == pytest.approx([value + 1 for value in before])
    source.write_text(source.read_text().replace(f"{SIGMOID} + ONE", SIGMOID))
    restored = kernel()
    assert values(restored) == before
    assert sum(restored.stats.cache_hits.values()) == 1, "the earlier version is still on disk"


@pytest.mark.parametrize("location", ["home", "temporary", "nowhere"])
def test_kernels_run_where_their_folder_cannot_be_written(location, folders, kernel, caplog):
    not_writable(folders["package"] / "__pycache__")
    if location != "home":
        not_writable(folders["home"])
    if location == "nowhere":
        not_writable(folders["temporary"])
    assert values(kernel()) == pytest.approx([0.268941, 0.5, 0.731059], abs=1e-5)
    locations = [name for name, folder in folders.items() if folder.is_dir() and entries(folder)]
    assert locations == ([] if location == "nowhere" else [location])
    advice = [message.partition("; ")[2] for message in caplog.messages]
    assert advice == (["set NUMBA_CACHE_DIR to one that is"] if location == "nowhere" else [])


def test_numba_cache_dir_comes_first(folders, kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "chosen"))
    values(kernel())
    assert entries(tmp_path / "chosen")
    assert not entries(*folders.values())


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04nonsense"])
def test_damaged_files_are_replaced(suffix, content, folders, kernel):
    expected = values(kernel())
    for path in entries(folders["package"]):
        if path.suffix == f".{suffix}":
            path.write_bytes(content)
    assert values(kernel()) == expected
    again = kernel()
    assert values(again) == expected
    assert sum(again.stats.cache_hits.values()) == 1


def test_a_removed_folder_loses_only_the_kernels(folders, kernel):
    apply = kernel()
    not_writable(folders["package"] / "__pycache__")
    assert values(apply) == pytest.approx([0.268941, 0.5, 0.731059], abs=1e-5)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="temporary folders belong to users here")
def test_a_temporary_folder_that_others_can_write_to_is_not_used(folders):
    folder = kernel_cache._private_temporary_folder()
    assert folder is not None
    assert folder.parent == folders["temporary"]
    folder.chmod(0o777)
    assert kernel_cache._private_temporary_folder() is None
    folder.rmdir()
    folder.symlink_to(folders["home"], target_is_directory=True)
    assert kernel_cache._private_temporary_folder() is None
