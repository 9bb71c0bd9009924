"""The package: the names of `import minrnn`, and the links that make it one."""

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from setuptools import find_packages

import minrnn

REPOSITORY = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
SETTINGS, PROJECT = PYPROJECT["tool"], PYPROJECT["project"]
FOLDERS = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"minrnn"}
LIGHT = """
import sys
import minrnn, minrnn.data.worker
loaded = {"torch", "transformers", "datasets"} & set(sys.modules)
sys.exit(str(loaded) if loaded else 0)
"""


def test_the_names_of_the_package_are_there():
    assert all(hasattr(minrnn, name) for name in minrnn.__all__)
    assert dir(minrnn) == sorted(minrnn.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'training'"):
        minrnn.training  # noqa: B018


def test_the_citation_names_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", minrnn.__version__)
    assert citation["license"] == PROJECT["license"]
    assert {"title", "message", "authors"} <= citation.keys()


def test_every_extra_is_described():
    page = (REPOSITORY / "docs" / "install.md").read_text()
    described = re.findall(r"`([\w-]+)`", page.partition("| extra |")[2].partition("\n\n")[0])
    assert not PROJECT["optional-dependencies"].keys() - {*described}


def test_data_workers_load_no_torch_transformers_or_datasets():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_folder_of_the_package_is_a_relative_link():
    links = {
        path.name: str(path.readlink()) for path in (REPOSITORY / "minrnn").iterdir() if path.is_symlink()
    }
    assert links == {name: f"../{name}" for name in FOLDERS}
    checked = {"minrnn/__init__.py", "tests", *(f"minrnn/{name}" for name in FOLDERS)}
    assert set(SETTINGS["pyright"]["include"]) == checked


def test_a_wheel_holds_every_package_except_the_figures():
    find = SETTINGS["setuptools"]["packages"]["find"]
    packages = find_packages(str(REPOSITORY), include=find["include"], exclude=find["exclude"])
    paths = [path.parent for name in FOLDERS for path in (REPOSITORY / name).rglob("__init__.py")]
    expected = {"minrnn", *(".".join(("minrnn", *path.relative_to(REPOSITORY).parts)) for path in paths)}
    assert set(packages) == expected - {"minrnn.evals.figures"}
    patterns = SETTINGS["setuptools"]["package-data"].values()
    assert not any("results" in pattern for pattern in itertools.chain.from_iterable(patterns))
