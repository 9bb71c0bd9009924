"""The generated parts of the pages are those that their sources give."""

import re

import pytest

from minrnn.evals.figures import docs
from minrnn.pipeline.config import SECTIONS


@pytest.mark.parametrize("page", docs.PAGES)
def test_generated_parts_are_up_to_date(page: str):
    assert docs.generated(page) == (docs.REPOSITORY / page).read_text(), "run make docs"


def test_every_setting_is_in_the_reference():
    text = (docs.REPOSITORY / "docs" / "settings.md").read_text()
    settings = [f"{section}.{name}" for section, cls in SECTIONS.items() for name in cls.model_fields]
    assert re.findall(r"^\| `(\w+\.\w+)` \|", text, flags=re.MULTILINE) == settings


def test_a_changed_number_is_found_and_repaired(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    for page in docs.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((docs.REPOSITORY / page).read_text())
    original = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(original.replace("| nn.LSTM | ", "| nn.LSTM | 9"))
    monkeypatch.setattr(docs, "REPOSITORY", tmp_path)
    docs.main([])
    assert capsys.readouterr().out == "README.md\n"
    assert (tmp_path / "README.md").read_text() == original
    docs.main([])
    assert capsys.readouterr().out == "all pages are up to date\n"
