"""A run's folder: when a run may use it, which files it leaves unchanged, and what it repeats after a
kill."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from run_helpers import Crash, Values, before_step, contents, losses, stop_at_step_7

from minrnn.common.errors import StorageError, UserError
from minrnn.common.locks import lock
from minrnn.pipeline import finish
from minrnn.pipeline.folder_checks import folder_errors
from minrnn.pipeline.recipe import build_recipe, resolved_config

Run = Callable[[Values], Path]


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_folders_that_no_run_has_written_are_refused(values: Values, run_recipe: Run, tmp_path: Path):
    folder = tmp_path / "run"
    for name in ("config.yaml", "model/config.json", "metrics.jsonl", "samples.txt", ".lock"):
        write(folder / name, "name: mine")
    before = contents(folder)
    with pytest.raises(
        UserError,
        match=r"run\.dir: .* holds config\.yaml, metrics\.jsonl, samples\.txt, model, "
        r"which the run would overwrite",
    ):
        run_recipe(values)
    assert contents(folder) == before
    shutil.rmtree(folder)
    write(folder / "config.yaml", yaml.safe_dump(values))  # a recipe, not a resolved one as a run writes
    with pytest.raises(UserError, match=r"run\.dir: .* holds config\.yaml"):
        run_recipe(values)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == values


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "loss.png",
        "accuracy_by_length.png",
        "mlflow.json",
        ".finished",
        "checkpoints/a",
        "model/a",
    ],
)
def test_each_file_that_a_run_writes_is_checked(tmp_path: Path, name: str):
    write(tmp_path / name)
    (problem,) = folder_errors(tmp_path)
    assert f"holds {name.split('/')[0]}, which" in problem


def test_folders_that_a_run_may_use(tmp_path: Path):
    assert folder_errors(tmp_path / "new" / "deep") == []
    (tmp_path / "checkpoints").mkdir()
    assert folder_errors(tmp_path) == []  # created, or linked to another disk, before the run
    for name in ("notes.md", "slurm-1.out", ".git/config", "evals/a.json", ".lock"):
        write(tmp_path / name)
    assert folder_errors(tmp_path) == []
    config = write(tmp_path / "config.yaml", yaml.safe_dump(resolved_config(build_recipe({}))))
    for name in ("metrics.jsonl", "loss.png", "model/config.json", "checkpoints/step-000002/config.yaml"):
        write(tmp_path / name, config.read_text())
    assert folder_errors(tmp_path) == []
    config.unlink()  # the checkpoint has one too
    assert folder_errors(tmp_path) == []


def a_file(path: Path) -> None:
    write(path)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (".", a_file, "is no folder"),
        (".", a_dangling_link, "is a link to nowhere, which is not there"),
        ("../parent", a_file, "is no folder"),
        ("checkpoints", a_file, "is no folder"),
        ("checkpoints", a_dangling_link, "is a link to nowhere"),
        ("model", a_file, "is no folder"),
        ("model", a_dangling_link, "is a link to nowhere"),
        ("metrics.jsonl", Path.mkdir, "is no regular file"),
        ("metrics.jsonl", a_fifo, "is no regular file"),
        (".lock", a_fifo, "is no regular file"),
        ("config.yaml", a_dangling_link, "is a link to nowhere"),
    ],
)
def test_errors_of_the_folder_are_reported_at_the_start(
    tmp_path: Path, name: str, make: Callable[[Path], object], message: str
):
    folder = tmp_path / "run"
    if name == "../parent":
        folder = tmp_path / "parent" / "run"
        make(tmp_path / "parent")
    elif name == ".":
        make(folder)
    else:
        folder.mkdir()
        make(folder / name)
    (problem,) = folder_errors(folder)
    assert message in problem


@pytest.mark.parametrize("path", [Path("x" * 300), Path(*["y" * 200] * 20)])
def test_names_that_are_too_long(tmp_path: Path, path: Path):
    (problem,) = folder_errors(tmp_path / path)
    assert "File name too long" in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in folder_errors(tmp_path / "run")[0]
    assert "cannot be written" in folder_errors(tmp_path)[0]


def test_each_start_completes_a_run_that_was_killed_after_its_last_step(
    values: Values, run_recipe: Run, tmp_path: Path, monkeypatch, capfd
):
    """Killed after the export, then its model removed, then killed within an old export: each start does what
    is missing."""
    folder, elsewhere = Path(values["run"]["dir"]), tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (folder / "model").symlink_to(elsewhere)

    def killed(*arguments):
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(finish, "sample", killed)
        with pytest.raises(Crash):
            run_recipe(values)
    assert (elsewhere / "config.json").exists()
    assert not (folder / "samples.txt").exists()
    run_recipe(values)
    assert (folder / "samples.txt").exists()
    assert (folder / "model").is_symlink()
    weights = (elsewhere / "model.safetensors").read_bytes()

    (folder / "model").unlink()
    run_recipe(values)
    assert (folder / "model" / "model.safetensors").read_bytes() == weights

    (folder / "model").rename(folder / ".model.replaced")
    capfd.readouterr()
    run_recipe(values)
    assert "is finished: step 12 of 12" in capfd.readouterr().out
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    assert not (folder / ".model.replaced").exists()


def test_a_file_that_cannot_be_written_ends_the_run_with_a_message(values: Values, run_recipe: Run):
    """A folder has the name of a temporary file: of config.yaml at the start, of the export's list, and of
    .finished at the end."""
    run = Path(values["run"]["dir"])
    for steps, in_the_way in (
        (2, run / ".config.yaml.part"),
        (3, run / "..finished.part"),
        (4, run / "model" / "..minrnn-export.json.part"),
    ):
        values["train"]["steps"] = steps
        in_the_way.mkdir(parents=True)
        with pytest.raises(StorageError, match=in_the_way.name):
            run_recipe(values)
        in_the_way.rmdir()
        run_recipe(values)
        assert (run / ".finished").read_text() == str(steps)


def test_a_removed_folder_is_created_again_with_its_lock(values: Values, run_recipe: Run, monkeypatch, capfd):
    folder = Path(values["run"]["dir"])
    with monkeypatch.context() as patched:
        before_step(patched, 7, lambda: shutil.rmtree(folder))
        run_recipe(values)
    err = capfd.readouterr().err
    warnings = [line for line in err.splitlines() if "warning: " in line]
    # A busy machine may measure fp32 as much slower than bf16, which is another warning.
    assert len([warning for warning in warnings if "train.precision" not in warning]) == 1
    assert "was removed while the run goes on; it is made again" in err
    assert [step for step, _ in losses(folder)] == list(range(7, 13))
    assert {"config.yaml", "loss.png", "samples.txt", "checkpoints", "model", ".finished"} <= {
        path.name for path in folder.iterdir()
    }
    run_recipe(values)
    assert "is finished: step 12 of 12" in capfd.readouterr().out


def test_a_run_ends_if_another_run_uses_its_folder(values: Values, run_recipe: Run, monkeypatch):
    folder = Path(values["run"]["dir"])
    held = []

    def take() -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        held.append((folder / ".lock").open("w"))
        assert lock(held[0], wait=False) is None

    before_step(monkeypatch, 7, take)
    with pytest.raises(UserError, match="another process is training in"):
        run_recipe(values)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_corpus_excludes_the_run_inside_it(values: Values, run_recipe: Run, tmp_path: Path, monkeypatch):
    corpus = tmp_path / "corpus"
    for i in range(40):
        write(corpus / f"{i}.txt", f"the text number {i} of a folder that the run is in " * (i % 5 + 1))
    values["data"] |= {"corpus": str(corpus), "shuffle_window": 8}
    expected = losses(run_recipe(values))
    values["run"]["dir"] = str(corpus / "runs" / "x")
    stop_at_step_7(values, run_recipe, monkeypatch)
    assert losses(run_recipe(values)) == expected
