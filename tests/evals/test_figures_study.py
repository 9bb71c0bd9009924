"""The committed study: its results file, the page's text, its place in the report."""

import json
from pathlib import Path

import pytest
from test_scaling import CHINCHILLA, points, write_csv

from minrnn.common.errors import UserError
from minrnn.evals.figures import study
from minrnn.evals.report import command as report
from minrnn.evals.report.scaling import scaling_section
from minrnn.evals.report.sources import read_file


def test_a_study_writes_its_results_and_the_text_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    assert study.docs_text() == study.NOT_TRAINED
    families = [points(CHINCHILLA, 0.01, seed, name) for seed, name in enumerate(["minGRU", "Llama"])]
    study.main([str(write_csv(tmp_path / "losses.csv", families)), "--replicates", "20"])
    record = json.loads((tmp_path / "study-books.json").read_text())
    assert record["command"].startswith("minrnn figures study")
    assert (tmp_path / "study-books.png").read_bytes().startswith(b"\x89PNG")
    table = study.docs_text()
    assert table.count("\n| minGRU | 25 | ") == table.count("\n| minGRU - Llama | ") == 1
    assert record["text"] in table
    assert "50 byte models of books with 1M to 100M parameters" in study.readme_text()
    assert "minGRU and Llama cannot be told apart." in study.readme_text()
    section = scaling_section([read_file(tmp_path / "study-books.json", report.check)])
    assert "minGRU" in section
    assert "10 times the largest run" in section


@pytest.mark.parametrize(("first", "second"), [("minGRU", "Llama"), ("Llama", "minGRU")])
@pytest.mark.parametrize(("sign", "kind"), [(-1, "lower"), (1, "higher")])
def test_a_verdict_is_the_same_in_both_orders(first: str, second: str, sign: int, kind: str):
    """minGRU is lower or higher than Llama, in whatever order the pair has."""
    sign *= 1 if first == "minGRU" else -1
    low, high = sorted((sign * 0.1, sign * 0.3))
    difference = {"value": sign * 0.2, "low": low, "high": high}
    pair = {"first": first, "second": second, "is_distinguishable": True, "difference": difference}
    expected = f"minGRU is {kind} than Llama by 0.20 (0.10 to 0.30) bits per byte."
    assert study.verdict_against("Llama", pair) == expected


def test_a_name_that_is_no_file_name_is_refused():
    with pytest.raises(UserError, match="--name"):
        study.main(["runs/books", "--name", "../books"])
