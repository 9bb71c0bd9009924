"""Every committed results file names its commit, and that commit contains the measured code."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from minrnn.evals import record
from minrnn.evals.output import RESULTS


@pytest.mark.parametrize("path", sorted(RESULTS.glob("**/*.json")), ids=lambda path: path.stem)
def test_results_come_from_a_commit(path: Path):
    result = json.loads(path.read_text())
    assert re.fullmatch("[0-9a-f]{7,40}", result["commit"]), (
        "measured in a checkout with uncommitted changes: measure again on a commit"
    )
    assert result["command"]
    assert result["versions"]["torch"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, which `record.commit` takes for the project's own."""
    for folder in ("evals/bench", "evals/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "evals/record.py").write_text("measure\n")
    (tmp_path / "evals/results/old.json").write_text("{}\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "evals/record.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "is_marked"),
    [
        ("evals/record.py", True),  # changed
        ("evals/bench/new.py", True),  # not even tracked
        ("evals/results/old.json", False),
        ("evals/results/new.json", False),
        ("docs/quickstart.png", False),
    ],
)
def test_a_record_of_uncommitted_code_is_marked(file: str, is_marked: bool, checkout: Path):
    clean = record.commit()
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{7,40}", clean)
    (checkout / file).write_text("changed")
    assert record.commit() == clean + "+" * is_marked


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "evals/record.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() is None
