"""Checkpoints on disks that fail, fill up or corrupt data. Nothing is trained; the files are a few bytes."""

import errno
import json
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from minrnn.common import files
from minrnn.common.errors import StorageError
from minrnn.pipeline import checkpoint
from minrnn.pipeline.saving import Saver

NAMES = ("config.yaml", "model.safetensors", "optimizer.safetensors", "reader-0000.json")
SIZE = 1000  # bytes of a file


def content(name: str, step: int) -> bytes:
    return random.Random(f"{name}{step}").randbytes(SIZE)


def save(saver: Saver, step: int, write: Callable[[Path, bytes], object] = Path.write_bytes) -> list[str]:
    files = {name: lambda path, name=name: write(path, content(name, step)) for name in NAMES}
    saver.start(step, files, {"tokens": 7 * step, "recent_losses": [0.1 * step, 1 / 3], "tokenizer": "é"})
    return saver.join()


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def saver_in(
    folder: Path,
    warnings: list[str],
    keep: int = 2,
    newest: int | None = None,
    always_keep: tuple[int, ...] = (),
) -> Saver:
    alone: Any = SimpleNamespace(process_index=0, num_processes=1)
    timeout, kept = timedelta(seconds=60), frozenset(always_keep)
    return Saver(folder, alone, keep, True, newest, timeout, warnings.append, lambda: None, kept)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_flipped_bit_of_a_manifest_is_detected(folder: Path, warnings: list[str]):
    assert save(saver_in(folder, warnings), 1) == []
    path = folder / "step-000001"
    manifest = checkpoint.read_manifest(path)
    assert (manifest["tokens"], manifest["recent_losses"], manifest["tokenizer"]) == (7, [0.1, 1 / 3], "é")
    original = (path / "manifest.json").read_bytes()
    draw = random.Random(0)
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1 << draw.randrange(8)
        (path / "manifest.json").write_bytes(changed)
        with pytest.raises(ValueError, match=r"manifest\.json is missing or damaged"):
            checkpoint.read_manifest(path)


def test_an_old_manifest_without_a_checksum_is_valid(folder: Path, warnings: list[str]):
    save(saver_in(folder, warnings), 1)
    path = folder / "step-000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    before = {key: value for key, value in manifest.items() if key not in ("format", "sha256")}
    path.write_text(json.dumps(before, indent=1))
    assert checkpoint.read_manifest(path.parent) == before


class Failing:
    """Makes opening a file of this name fail a number of times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int):
        self.times, original = times, Path.open

        def opened(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == name and path.parent.name == "step-000002" and self.times > 0:
                self.times -= 1
                raise OSError(number, "fails")
            return original(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(files, "RETRY_AFTER", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_error_is_not_damage(folder: Path, warnings: list[str], monkeypatch, name: str, number: int):
    """The error passes or stops the run, but never makes an older checkpoint the newest."""
    saver = saver_in(folder, warnings)
    save(saver, 1)
    save(saver, 2)
    with monkeypatch.context() as patched:
        passing = Failing(patched, name, number, times=3)
        newest = checkpoint.newest_valid(folder, warnings.append, rename_invalid=True)
        assert newest is not None
        assert (newest[0].name, passing.times) == ("step-000002", 0)
    with monkeypatch.context() as patched:
        Failing(patched, name, number, times=4)
        with pytest.raises(StorageError, match=rf"step-000002/{name} cannot be read: .* \(tried 4 times"):
            checkpoint.newest_valid(folder, warnings.append, rename_invalid=True)
    assert names(folder) == ["step-000001", "step-000002"]
    assert warnings == []


def test_damaged_checkpoints_are_renamed(folder: Path, warnings: list[str]):
    saver = saver_in(folder, warnings, keep=3)
    for step in (1, 2, 3):
        save(saver, step)
    for step in (2, 3):
        (folder / f"step-{step:06d}" / "config.yaml").write_bytes(b"changed")
    newest = checkpoint.newest_valid(folder, warnings.append)
    assert newest is not None
    assert newest[0].name == "step-000001"
    assert names(folder) == ["step-000001", "step-000002", "step-000003"], "who only reads renames nothing"
    checkpoint.newest_valid(folder, warnings.append, rename_invalid=True)
    assert names(folder) == ["step-000001", "step-000002.invalid-1", "step-000003.invalid-1"]
    assert (folder / "step-000002.invalid-1" / "config.yaml").read_bytes() == b"changed"
    saver = saver_in(folder, warnings, newest=1)
    for times in range(1, 5):
        save(saver, 2)
        (folder / "step-000002" / "model.safetensors").unlink()
        checkpoint.newest_valid(folder, warnings.append, rename_invalid=True)
        assert f"step-000002.invalid-{times + 1}" in names(folder)
    assert len(names(folder)) == 1 + checkpoint.INVALID_KEPT


def test_damaged_checkpoints_keep_their_names_if_none_is_valid(folder: Path, warnings: list[str]):
    """Otherwise the next start would take the folder for that of a new run."""
    save(saver_in(folder, warnings), 1)
    (folder / "step-000001" / "manifest.json").unlink()
    assert checkpoint.newest_valid(folder, warnings.append, rename_invalid=True) is None
    assert names(folder) == ["step-000001"]


def test_leftover_folders_do_not_block_saving(folder: Path, warnings: list[str]):
    for name in (".step-000002.replaced", ".step-000001.removing", ".step-000002.building", "step-000002"):
        (folder / name / "something").mkdir(parents=True)
    saver = saver_in(folder, warnings, keep=1, newest=1)
    for step in (1, 2, 3):
        assert save(saver, step) == []
    assert names(folder) == ["step-000002.invalid-1", "step-000003"]


def test_the_steps_of_save_at_are_kept_when_others_are_removed(folder: Path, warnings: list[str]):
    saver = saver_in(folder, warnings, keep=1, always_keep=(2, 4, 9))
    for step in range(1, 8):
        assert save(saver, step) == []
    assert names(folder) == ["step-000002", "step-000004", "step-000007"]
    assert checkpoint.make_room(folder, 7, frozenset((2, 4))) is None


def test_folders_with_other_names_are_not_checkpoints(folder: Path, warnings: list[str]):
    """A step has only one valid folder name."""
    saver = saver_in(folder, warnings)
    save(saver, 1)
    save(saver, 2)
    (folder / "step-000002").rename(folder / "step-2")
    newest = checkpoint.newest_valid(folder, warnings.append)
    assert newest is not None
    assert newest[0].name == "step-000001"


class Disk:
    """A disk of limited size: a write beyond it fails in the middle of a file."""

    def __init__(self, folder: Path, capacity: float, error: Exception):
        self.folder, self.capacity, self.error = folder, capacity, error
        self.num_valid: list[int] = []

    def write(self, path: Path, data: bytes) -> None:
        self.num_valid.append(
            sum((step / "manifest.json").exists() for step in checkpoint.checkpoint_paths(self.folder))
        )
        used = sum(
            file.stat().st_size for file in self.folder.rglob("*") if file.is_file() and file.name in NAMES
        )
        path.write_bytes(data[: max(0, int(self.capacity - used))])
        if used + len(data) > self.capacity:
            raise self.error


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_old_checkpoints_are_removed_on_a_full_disk(folder: Path, warnings: list[str], error: Exception):
    """With space for 2.6 checkpoints, each new one is written, and one is valid at any time."""
    folder.mkdir(parents=True)
    disk, saver = Disk(folder, 2.6 * len(NAMES) * SIZE, error), saver_in(folder, warnings)
    for step in range(1, 6):
        assert save(saver, step, disk.write) == []
        assert checkpoint.read_manifest(folder / f"step-{step:06d}")["step"] == step
        if step == 3:
            (folder / "step-000002").rename(folder / "step-000002.invalid-1")
    assert names(folder) == ["step-000004", "step-000005"]
    assert min(disk.num_valid[len(NAMES) :]) == 1
    removed = [warning.split(": ")[1].split()[0] for warning in warnings]
    assert removed == ["step-000001", "step-000002.invalid-1", "step-000003"]


@pytest.mark.parametrize(("room", "error"), [(1.6, FULL[0]), (2.6, OSError(errno.EIO, "Input/output error"))])
def test_the_last_valid_checkpoint_is_never_removed(
    folder: Path, warnings: list[str], room: float, error: Exception
):
    """Nor is any checkpoint after an error that more space does not fix."""
    folder.mkdir(parents=True)
    disk, saver = Disk(folder, room * len(NAMES) * SIZE, error), saver_in(folder, warnings)
    results = [save(saver, step, disk.write) for step in range(1, 5)]
    written = int(room)
    assert results[:written] == [[]] * written
    assert all(failure == [f"OSError: {error} (rank 0)"] for failure in results[written:])
    assert names(folder) == [f"step-{step:06d}" for step in range(1, written + 1)]
    assert warnings == []
