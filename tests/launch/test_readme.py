"""The numbers in the README are those of the results files."""

import json
from pathlib import Path

from minrnn.evals.figures import quality, speed, study

REPOSITORY = Path(__file__).parents[2]


def test_the_numbers_of_the_main_job_are_those_of_its_results_file():
    results = json.loads((REPOSITORY / "evals" / "results" / "quickstart.json").read_text())
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    for claim in (
        f"{results['tokens'] / 1e6:.2f}M tokens in {results['training_seconds']} seconds",
        f"at {results['tokens_per_second_median']:,.0f} tokens per second; ",
        f"{results['validation_subset']['bits_per_byte']:.2f} bits per byte on the held-out modules that "
        "the run validates on",
        f"{results['validation_all_held_out_modules']['bits_per_byte']:.2f} on all held-out modules",
    ):
        assert claim in readme
    assert (REPOSITORY / "docs" / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_speed_are_those_of_the_benches():
    readme = (REPOSITORY / "README.md").read_text()
    table = readme.split("<!-- speed -->")[1].split("<!-- /speed -->")[0].strip()
    blocks = ["\n".join(lines) for lines in (speed.scan_lines(), speed.train_lines(), speed.generate_lines())]
    assert table == "\n\n".join([*blocks, speed.contexts_line(), speed.stream_line(), speed.loop_line()])
    assert readme.split("<!-- soak -->")[1].split("<!-- /soak -->")[0].strip() == speed.soak_line()


def test_the_figures_of_quality_are_those_of_the_results():
    text = (
        (REPOSITORY / "README.md")
        .read_text()
        .split("<!-- quality -->")[1]
        .split("<!-- /quality -->")[0]
        .strip()
    )
    assert text == quality.text()


def test_the_counts_of_transformers_tests_are_those_of_their_results_file():
    models = json.loads((REPOSITORY / "evals" / "results" / "transformers-tests.json").read_text())["models"]
    rows = [f"| {name} | {m['passed']} | {len(m['failed'])} | {m['skipped']} |" for name, m in models.items()]
    page = (REPOSITORY / "docs" / "transformers.md").read_text()
    counts = page.split("<!-- counts -->")[1].split("<!-- /counts -->")[0].strip()
    assert counts.splitlines() == ["| model | passed | failed | skipped |", "|---|---|---|---|", *rows]
    assert not any(model["failed"] for name, model in models.items() if name.startswith("Min"))


def test_the_study_is_that_of_its_results_file():
    page = (REPOSITORY / "docs" / "sweeps.md").read_text()
    assert page.split("<!-- study -->")[1].split("<!-- /study -->")[0].strip() == study.docs_text()
    if study.result_path(study.NAME).exists():
        readme = (REPOSITORY / "README.md").read_text()
        assert readme.split("<!-- study -->")[1].split("<!-- /study -->")[0].strip() == study.readme_text()
