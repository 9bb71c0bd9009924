"""Runs on one long text, and on a mixture: they train, validate, resume exactly and report their progress."""

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_helpers import Crash, Values, before_step, losses

from minrnn.common.errors import UserError

Run = Callable[[Values], Path]
WORDS = "every lane of a long text begins at a place of its own and reads on from there".split()


def write_text(path: Path, num_bytes: int) -> Path:
    draw = random.Random(1)
    with path.open("w") as file:
        while file.tell() < num_bytes:
            file.write(" ".join(draw.choices(WORDS, k=draw.randint(0, 9))) + "\n")
    return path


def entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def crash() -> None:
    raise Crash


def check_resume(values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run that crashes at step 7 has the losses of an undisturbed one; returns its folder."""
    undisturbed = run_recipe({**values, "run": {"dir": str(tmp_path / "undisturbed")}})
    with monkeypatch.context() as patched:
        before_step(patched, 7, crash)
        with contextlib.suppress(Crash):
            run_recipe(values)
    folder = run_recipe(values)
    for kind in ("train", "validation"):
        assert losses(folder, kind) == losses(undisturbed, kind)
    assert [step for step, _ in losses(folder)] == list(range(1, 13))
    return folder


@pytest.mark.parametrize("num_bytes", [6000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_one_long_text(
    num_bytes: int, values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd
):
    values["data"] |= {
        "corpus": str(write_text(tmp_path / "one.txt", num_bytes)),
        "validation_tokens": None if num_bytes < 10_000 else 500,
        "workers": int(num_bytes > 10_000),
    }
    folder = check_resume(values, run_recipe, monkeypatch, tmp_path)
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["order"] == "continuous"
    assert "data.order is continuous: 4 lanes read on" in capfd.readouterr().err
    epochs = [entry["epochs"] for entry in entries(folder, "train")]
    assert epochs == sorted(epochs)
    assert epochs[-1] == pytest.approx(12 * 4 * 24 / (0.9 * num_bytes), rel=0.1, abs=1e-4)
    if num_bytes < 10_000:
        (validation, _) = entries(folder, "validation")
        assert validation["validation_tokens"] == pytest.approx(0.1 * num_bytes, rel=0.1)
    (tmp_path / "one.txt").open("a").write("more\n")
    with pytest.raises(UserError, match=r"one\.txt has grown"):
        run_recipe({**values, "train": {**values["train"], "steps": 13}})


@pytest.mark.slow
def test_a_mixture(values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd):
    text, rows = str(write_text(tmp_path / "one.txt", 20_000)), values["data"]["corpus"]
    values["data"] |= {"corpus": [rows, {"corpus": text, "weight": 3}], "validation_tokens": 600}
    folder = check_resume(values, run_recipe, monkeypatch, tmp_path)
    progress = entries(folder, "train")[-1]["sources"]
    assert list(progress) == [rows, text]
    assert sum(source["tokens"] for source in progress.values()) == 12 * 4 * 24
    validation = entries(folder, "validation")[-1]
    assert list(validation["by_source"]) == [rows, text]
    low, high = sorted(validation["by_source"].values())
    assert low < validation["bits_per_byte"] < high
    output = capfd.readouterr().err
    assert f"read in passages, with the end of the text held out: {text}" in output
    assert f"of the tokens (0 epochs), {text} " in output
    card = (folder / "model" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "words.jsonl, one.txt" in card


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", r"data\.corpus: .*one\.txt is empty"),
        (b"short\n" * 14 + b"x", "has 78 tokens to train on, fewer than one chunk of 2 readers"),
        (b"a line\n" * 5000 + b"\0" + b"a line\n" * 500, r"holds a NUL byte \(byte 35,000\)"),
        (b"a line\n" * 5000 + b"\xe9" + b"a line\n" * 500, r"one\.txt is not UTF-8 \(byte 35,000\)"),
    ],
)
def test_bad_text_is_an_error_before_the_first_step(
    content: bytes, problem: str, values: Values, run_recipe: Run, tmp_path: Path
):
    path = tmp_path / "one.txt"
    path.write_bytes(content)
    values["data"] |= {"corpus": str(path)}
    with pytest.raises(UserError, match=problem):
        run_recipe(values)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run")
