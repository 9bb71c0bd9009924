"""An export replaces only its own files, publishes nothing private, and is valid whenever it is killed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from run_helpers import contents

from minrnn.common.errors import UserError
from minrnn.data.tokenizer import byte_tokenizer
from minrnn.models import MinRNNForCausalLM
from minrnn.pipeline.card.earlier import CARD
from minrnn.pipeline.export import export_model, model_config
from minrnn.pipeline.export_folder import LIST, STAGED, check_export, write_export
from minrnn.pipeline.recipe import build_recipe, resolved_config

TOKENIZER = byte_tokenizer()
SECRET = "s3cret"


def tiny_model(hidden_size: int = 16) -> MinRNNForCausalLM:
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": 1, "intermediate_size": 16}
    return MinRNNForCausalLM(model_config(sizes, TOKENIZER, 264))


def export(folder: Path, hidden_size: int = 16, force: bool = False, **sections) -> bool:
    recipe = resolved_config(build_recipe(sections))
    return export_model(
        tiny_model(hidden_size), TOKENIZER, folder, recipe, tokens=7, key="--out", force=force
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Exports of two models by hidden size, to be copied."""
    folders = {size: tmp_path_factory.mktemp(f"size-{size}") / "out" for size in (16, 24)}
    for size, folder in folders.items():
        assert export(folder, size)
    return folders


@pytest.fixture
def out(exports: dict[int, Path], tmp_path: Path) -> Path:
    """An export of the smaller model."""
    return Path(shutil.copytree(exports[16], tmp_path / "out"))


def test_an_export_replaces_its_own_files_and_no_others(exports: dict[int, Path], out: Path):
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (out / "notes.txt").write_text("mine")
    assert export(out, 24)
    files = contents(out)
    assert files.pop(".git/HEAD") == b"ref: refs/heads/main"
    assert files.pop("notes.txt") == b"mine"
    assert files.keys() == contents(exports[24]).keys()
    assert MinRNNForCausalLM.from_pretrained(out).config.hidden_size == 24


def test_a_card_that_was_changed_by_hand_is_kept(out: Path):
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMine.\n")
    for force in (False, True):
        assert not export(out, 24, force)
        assert (out / "README.md").read_text().endswith("\nMine.\n")
    assert MinRNNForCausalLM.from_pretrained(out).config.hidden_size == 24


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_changed_file_is_replaced_only_with_force(name: str, out: Path):
    with (out / name).open("a") as file:
        file.write(" ")
    before = contents(out)
    with pytest.raises(UserError, match=f"{name} in .* is not as an export wrote it"):
        export(out, 24)
    assert contents(out) == before
    assert export(out, 24, force=True)
    assert MinRNNForCausalLM.from_pretrained(out).config.hidden_size == 24


def test_a_folder_without_an_export_is_written_only_with_force(tmp_path: Path):
    for name in ("README.md", "config.json", "a.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".git").mkdir()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds no export, but other files \(.git, README.md, a.txt, ...\)"):
        check_export(tmp_path, "--out")
    with pytest.raises(UserError, match="holds no export"):
        export(tmp_path)
    assert contents(tmp_path) == before
    assert not export(tmp_path, force=True)
    assert [(tmp_path / name).read_text() for name in ("README.md", "a.txt")] == ["mine", "mine"]
    assert MinRNNForCausalLM.from_pretrained(tmp_path).config.hidden_size == 16


def write_card_of_version_0_1(out: Path) -> None:
    """Replace the card by one as version 0.1 wrote it."""
    fields = {"cell": "mingru", "name": "run", "parameters": 7, "corpus": "a.txt", "tokens": 9}
    (out / "README.md").write_text(CARD.format(score="", config="run:\n  seed: 0\n", **fields))


def test_an_old_export_without_a_list_is_replaced(out: Path):
    (out / LIST).unlink()
    (out / "model-00001-of-00002.safetensors").write_text("of the same export")
    (out / "notes.txt").write_text("mine")
    write_card_of_version_0_1(out)
    assert export(out, 24)
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert (out / "notes.txt").exists()
    (out / LIST).unlink()
    write_card_of_version_0_1(out)
    changed = (out / "README.md").read_text().replace("A minimal", "A very minimal")
    (out / "README.md").write_text(changed)
    assert not export(out)
    assert (out / "README.md").read_text() == changed


def test_files_of_an_earlier_export_are_removed(out: Path):
    write_export(out, lambda staged: copy(out, staged, "scan_of_then.py"), "--out")
    assert (out / "scan_of_then.py").exists()
    assert export(out)
    assert not (out / "scan_of_then.py").exists()
    assert set(json.loads((out / LIST).read_text())["files"]) == {path.name for path in out.iterdir()} - {
        LIST
    }


def copy(source: Path, staged: Path, *more: str) -> None:
    """Write the files of an export without torch."""
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "README.md"):
        shutil.copy(source / name, staged / name)
    for name in more:
        (staged / name).write_text("# code")


def test_an_export_that_fails_changes_nothing(out: Path):
    def write(staged: Path) -> None:
        copy(out, staged)
        raise OSError(28, "No space left on device")

    before = contents(out)
    with pytest.raises(OSError, match="No space"):
        write_export(out, write, "--out")
    assert contents(out) == before


class Killed(BaseException):
    """An exception that no tested code handles, like SIGKILL."""


calls_left = 0


def kill(event: str, _: object) -> None:
    """An audit hook, called before each rename. Audit hooks cannot be removed."""
    global calls_left
    if calls_left and event in ("os.rename", "os.link", "os.remove"):
        calls_left -= 1
        if calls_left == 0:
            raise Killed


sys.addaudithook(kill)


def norm_of(folder: Path) -> torch.Tensor:
    return MinRNNForCausalLM.from_pretrained(folder).model.norm.weight


@pytest.mark.parametrize("target", ["other size", "same size"])
def test_a_killed_export_leaves_a_model_that_loads(target: str, exports: dict[int, Path], tmp_path: Path):
    global calls_left
    sources = {"other size": exports[24], "same size": tmp_path / "new"}
    model = MinRNNForCausalLM.from_pretrained(exports[16])
    torch.nn.init.constant_(model.model.norm.weight, 2.0)
    export_model(model, TOKENIZER, sources["same size"], resolved_config(build_recipe({})), tokens=9)
    source, states = sources[target], []
    assert not torch.equal(norm_of(exports[16]), norm_of(source))
    while True:
        folder = Path(shutil.copytree(exports[16], tmp_path / f"killed-{len(states)}"))
        calls_left = len(states) + 1
        try:
            write_export(folder, lambda staged: copy(source, staged), "--out")
        except Killed:
            assert calls_left == 0
        is_complete, calls_left = calls_left > 0, 0
        norm = norm_of(folder)
        states.append(next(name for name in (exports[16], source) if torch.equal(norm, norm_of(name))))
        if is_complete:
            break
        check_export(folder, "--out")
        assert write_export(folder, lambda staged: copy(source, staged), "--out")
        assert not (folder / STAGED).exists()
        for name in ("config.json", "model.safetensors", "README.md"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
    switch = states.index(source)  # from here on, the new model loads
    assert states == [exports[16]] * switch + [source] * (len(states) - switch)
    assert switch > 3
    assert len(states) > 8


def test_an_export_contains_nothing_private(tmp_path: Path):
    private = tmp_path / "private"
    export(
        tmp_path / "out",
        run={"dir": str(private / "run")},
        data={
            "corpus": str(private / "words.jsonl"),
            "validation": str(private / "held.jsonl"),
            "tokenizer": str(private / "tokenizer"),
        },
        model={"init_from": str(private / "start")},
        tracking={"uri": f"https://me:{SECRET}@mlflow.org?token={SECRET}"},
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "on `words.jsonl`" in card
    assert "dir: run\n" in card
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert SECRET.encode() not in content
        assert str(tmp_path).encode() not in content


def test_config_yaml_contains_no_credentials(tmp_path: Path):
    recipe = build_recipe(
        {"tracking": {"uri": f"https://me:{SECRET}@mlflow.org"}, "run": {"dir": str(tmp_path)}}
    )
    assert recipe.tracking.uri == f"https://me:{SECRET}@mlflow.org"
    assert resolved_config(recipe)["tracking"]["uri"] == "https://mlflow.org"
    assert resolved_config(recipe)["run"]["dir"] == str(tmp_path)
