"""The report's section on models of all families, trained on one text."""

import json
from pathlib import Path

from report_helpers import report, rows, section

from minrnn.evals.figures.families_table import Model, draw_curves, summary

GRID = {
    "tokens": 4000,
    "tuning_tokens": 1000,
    "learning_rates": [1e-3, 2e-3],
    "seeds": [0, 1],
    "recipe": {"model": {"num_parameters": 3_100_000}},
}


def test_trained_models_come_first_and_others_say_what_is_missing(tmp_path: Path):
    models = [
        Model("slow", {}, tokens_per_second=0.5, reason="a short run is longer than --run-minutes"),
        Model("half", {}, tokens_per_second=1.0, tuning={"0.001": 3.0, "0.002": 2.5}, final={"0": 2.4}),
        Model("done", {}, tokens_per_second=10.0, tuning={"0.001": 2.0, "0.002": 3.0}),
        Model("failed", {}, reason="it needs a GPU"),
    ]
    models[1].curves = {"0": [(1000, 3.0), (4000, 2.4)]}
    models[2].final = {"0": 1.51, "1": 1.52}
    models[2].curves = {"0": [(1000, 2.0), (4000, 1.51)], "1": [(1000, 2.0), (4000, 1.52)]}
    models[2].settings = {"limits": ["no state is carried"]}
    table = [summary(model, GRID) for model in models]
    path = tmp_path / "families-books.json"
    path.write_text(json.dumps({"kind": "families", "text": "books", "grid": GRID, "rows": table}))
    draw_curves(table, path.with_suffix(".png"))
    markdown = section(report(path, out=tmp_path / "page"), "## Families on one text")
    assert "4,000 tokens of books, 3,100,000 parameters without embeddings" in markdown
    positions = [markdown.index(f"| {name} |") for name in ("done", "half", "slow", "failed")]
    assert positions == sorted(positions)
    (done,) = rows(markdown, "done")
    assert done[1:] == ["1.5100, 1.5200", "0.001", "10", "-", "no state is carried"]
    (half,) = rows(markdown, "half")
    assert half[1:5] == ["2.4000", "0.002", "1", "1.1 h are missing"]
    (slow,) = rows(markdown, "slow")
    assert slow[1:5] == ["-", "-", "0.5", "a short run is longer than --run-minutes"]
    assert rows(markdown, "failed")[0][3:5] == ["-", "it needs a GPU"]
    assert (tmp_path / "page" / "pictures" / "families-books-families.png").is_file()
