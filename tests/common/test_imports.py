"""Imports go one way between the folders: the contracts of pyproject.toml hold."""

from pathlib import Path

import pytest
from importlinter import cli

REPOSITORY = Path(__file__).parents[2]


def test_each_folder_imports_only_what_is_below_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    assert cli.lint_imports(config_filename="pyproject.toml", no_cache=True) == cli.EXIT_STATUS_SUCCESS
