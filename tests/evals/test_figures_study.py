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
    assert "bits per byte with 95 % intervals: minGRU " in study.readme_text()
    section = scaling_section([read_file(tmp_path / "study-books.json", report.check)])
    assert "minGRU" in section
    assert "10 times the largest run" in section


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_difference_is_the_same_in_both_orders(sign: int):
    """minGRU's loss less Llama's, in whatever order the pair has."""
    difference = {"value": -0.2 * sign, "low": -0.3 if sign > 0 else 0.1, "high": -0.1 if sign > 0 else 0.3}
    first, second = ("minGRU", "Llama")[::sign]
    pair = {"first": first, "second": second, "difference": difference, "compute": [1e12, 1.6e13]}
    expected = "minGRU -0.20 (-0.30 to -0.10) at 1.6e+13 FLOPs"
    assert study.difference_from("Llama", pair) == expected


def test_a_name_that_is_no_file_name_is_refused():
    with pytest.raises(UserError, match="--name"):
        study.main(["runs/books", "--name", "../books"])
