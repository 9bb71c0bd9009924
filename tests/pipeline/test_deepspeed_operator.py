"""Compiling DeepSpeed's operator after a process that was killed while it compiled."""

import os
from pathlib import Path

import pytest

from minrnn.pipeline.deepspeed_operator import compile_operator

comm = pytest.importorskip("deepspeed.comm.torch")


def test_interrupted_builds_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only in the folder of this package: other programs may be compiling in other folders."""
    seen: list[Path] = []
    monkeypatch.setattr(comm, "build_shm_op", lambda: seen.append(Path(os.environ["TORCH_EXTENSIONS_DIR"])))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compile_operator()
    (folder,) = seen
    assert folder.is_relative_to(tmp_path)
    assert folder != tmp_path
    own, complete, foreign = folder / "killed" / "lock", folder / "whole" / "op.so", tmp_path / "op" / "lock"
    for file in (own, complete, foreign):
        file.parent.mkdir()
        file.touch()
    compile_operator()
    assert not own.parent.exists()
    assert complete.exists()
    assert foreign.exists()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


@pytest.mark.parametrize("given", [None, "given"])
def test_the_environment_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None):
    """Also after an error of the compiler."""

    def fail() -> None:
        raise RuntimeError("the compiler failed")

    monkeypatch.setattr(comm, "build_shm_op", fail)
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    if given is None:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    else:
        given = str(tmp_path / given)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", given)
    with pytest.raises(RuntimeError, match="the compiler failed"):
        compile_operator()
    assert os.environ.get("TORCH_EXTENSIONS_DIR") == given


def test_an_interrupted_build_is_named_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Another process may be compiling there, so nothing is removed."""
    reason = "the file system has no locks"
    monkeypatch.setattr("minrnn.pipeline.deepspeed_operator.lock", lambda file, wait: reason)
    monkeypatch.setattr(comm, "build_shm_op", lambda: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compile_operator()
    assert capsys.readouterr().err == ""
    (folder,) = (path.parent for path in tmp_path.rglob("minrnn.lock"))
    left = folder / "killed" / "lock"
    left.parent.mkdir()
    left.touch()
    compile_operator()
    error = capsys.readouterr().err
    assert f"DeepSpeed waits until {left} is gone" in error
    assert reason in error
    assert left.exists()
