"""`make setup` with a Python whose venv and pip record their arguments."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
# A Python that appends its arguments to `calls`. `-m venv` copies it into a .venv. A call fails if its
# arguments contain the word in `fails`.
RECORDING_PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$*" >> calls
[ -e fails ] && case "$*" in *$(cat fails)*) exit 1;; esac
[ "$2" = venv ] && mkdir -p .venv/bin && cp "$0" .venv/bin/python
exit 0
"""
# The real Python, after a statement that changes it.
CHANGED_PYTHON = "#!/bin/sh\nexec {python} -c 'import sys; {change}; exec(sys.argv[1])' \"$2\"\n"


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Clone:
    """A folder with the files that `make` reads."""

    def __init__(self, path: Path):
        self.path, self.calls = path, path / "calls"
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copyfile(REPOSITORY / name, path / name)
            os.utime(path / name, (1, 1))
        self.python = executable(path / "recording-python", RECORDING_PYTHON)

    def make(self, *words: str, python: Path | str | None = None) -> subprocess.CompletedProcess[str]:
        self.calls.unlink(missing_ok=True)
        command = ["make", *words, f"PYTHON={python or self.python}"]
        return subprocess.run(command, cwd=self.path, capture_output=True, text=True, check=False)

    def installed(self, *words: str) -> list[str]:
        """What pip and venv were asked for by a `make` that succeeds."""
        done = self.make(*words)
        assert done.returncode == 0, done.stderr
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [
            re.sub(r"-m pip install --quiet .*--constraint constraints.txt +", "pip ", call)
            for call in calls
            if "compileall" not in call
        ]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


CORE = ["pip torch setuptools", "pip --no-build-isolation --editable ."]
EVERYTHING = "pip --no-build-isolation --editable .[bench,deepspeed,eval,search,tensorboard,wandb,ui,test]"


def test_the_core_is_installed_first_and_extras_on_request(clone: Clone):
    assert clone.installed("setup") == ["-m venv .venv", *CORE]
    assert clone.installed("setup") == []
    assert clone.installed("setup-eval") == ["pip --no-build-isolation --editable .[eval]"]
    assert clone.installed("setup-test") == [EVERYTHING]
    assert clone.installed("setup", "setup-eval", "setup-test") == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_again(clone: Clone, name: str):
    clone.installed("setup-test")
    later = (clone.path / ".venv" / ".ready").stat().st_mtime + 1
    os.utime(clone.path / name, (later, later))
    assert clone.installed("setup-test") == [*CORE, EVERYTHING]


@pytest.mark.parametrize("interrupted_at", ["venv", "torch", "--editable", "bench,deepspeed"])
def test_an_interrupted_installation_starts_again(clone: Clone, interrupted_at: str):
    (clone.path / "fails").write_text(interrupted_at)
    assert clone.make("setup-test").returncode == 2
    (clone.path / "fails").unlink()
    left_over = clone.path / ".venv" / "half-a-package"
    left_over.touch()
    assert clone.installed("setup-test") == ["-m venv .venv", *CORE, EVERYTHING]
    assert not left_over.exists()


def test_torch_comes_only_from_its_index(clone: Clone):
    clone.installed("setup")
    index = "TORCH_INDEX=https://example.org/whl/cpu"
    from_index = [
        "-m venv .venv",
        "pip --index-url https://example.org/whl/cpu --no-deps torch",
        "pip --extra-index-url https://example.org/whl/cpu torch setuptools",
        CORE[1],
    ]
    assert clone.installed("setup", index) == from_index
    assert clone.installed("setup", index) == []
    assert clone.installed("setup") == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            "sys.version_info = (3, 9, 18)",
            "is Python 3.9; install 3.11 or newer and name it: make setup PYTHON=python3.11",
        ),
        (
            'sys.modules["ensurepip"] = None',
            "has no venv or ensurepip; install them (Debian and Ubuntu: apt install python3",
        ),
    ],
)
def test_an_unsuitable_python_is_an_error(clone: Clone, change: str, error: str):
    python = executable(
        clone.path / "changed-python", CHANGED_PYTHON.format(python=sys.executable, change=change)
    )
    done = clone.make("setup", python=python)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: PYTHON: {python} {error}")
    assert len(done.stderr.splitlines()) == 2, "the other line is make's own"
    assert not (clone.path / ".venv").exists()


def test_a_missing_python_is_an_error(clone: Clone):
    done = clone.make("setup", python="no-such-python")
    assert done.stderr.startswith("error: PYTHON: there is no no-such-python; install Python 3.11 or newer\n")
    assert not (clone.path / ".venv").exists()


def test_every_dependency_is_pinned():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if not line.startswith("#")}
    everything = "minrnn[bench,deepspeed,eval,search,tensorboard,wandb,ui,test]"
    required, seen = [Requirement(everything)], set()
    while required:
        requirement = required.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # for another system
            continue
        extras = requirement.extras or {""}
        required += [
            need
            for need in needs
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    installed = {name for name, _ in seen} - {"minrnn"}
    assert len(installed) > 100
    assert not installed - pinned
