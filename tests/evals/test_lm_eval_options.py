"""lm-eval's own options reach its evaluator from `minrnn eval`, with lm-eval's meaning."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import evaluator
from lm_eval_helpers import OPTIONS, read_lines

from minrnn.evals.harness.lm_eval_options import PASSED, add_lm_eval_options, evaluator_arguments
from minrnn.launch.cli import main

pytestmark = pytest.mark.usefixtures("relative_task_files")


def passed(argv: list[str]) -> dict[str, Any]:
    """What the evaluator would get."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--limit", type=float)
    add_lm_eval_options(parser)
    return evaluator_arguments(parser.parse_args(argv))


def test_every_listed_option_exists_in_lm_eval(capsys):
    parser = argparse.ArgumentParser()
    add_lm_eval_options(parser)
    assert {action.dest for action in parser._actions} == {"help", *PASSED}
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in PASSED)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--log_samples"], {"log_samples": True}),
        (["--log-samples"], {"log_samples": True}),
        (["--apply_chat_template"], {"apply_chat_template": True, "fewshot_as_multiturn": True}),
        (
            ["--apply_chat_template", "--fewshot_as_multiturn", "false"],
            {"apply_chat_template": True},
        ),
        (
            ["--gen_kwargs", "temperature=0.5,do_sample=True", "max_gen_toks=3"],
            {"gen_kwargs": {"temperature": 0.5, "do_sample": True, "max_gen_toks": 3}},
        ),
        (["--system-instruction", "Be brief."], {"system_instruction": "Be brief."}),
        (["--cache_requests", "refresh"], {"cache_requests": True, "rewrite_requests_cache": True}),
        (["--samples", '{"a": [0, 2]}'], {"samples": {"a": [0, 2]}}),
    ],
)
def test_options_are_read_as_lm_eval_reads_them(argv: list[str], expected: dict[str, Any]):
    result = passed(argv)
    assert "fewshot_as_multiturn" in result, "the evaluator's own default is true"
    assert {name: value for name, value in result.items() if value} == expected


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**31)), min_size=4, max_size=4))
def test_seeds_reach_their_generators(seeds: list[int | None]):
    result = passed(["--seed", ",".join(map(str, seeds))])
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    assert [result[name] for name in names] == seeds


def test_samples_are_written_and_options_change_the_results(export: Path, tmp_path: Path, monkeypatch):
    seen, original = [], evaluator.simple_evaluate

    def simple_evaluate(*arguments, **options):
        seen.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(evaluator, "simple_evaluate", simple_evaluate)
    out = tmp_path / "results.json"
    words = ["--log_samples", "--gen_kwargs", "max_gen_toks=3", "--system_instruction", "Be brief. "]
    words += ["--samples", '{"tiny_writing": [0, 2]}']
    main(["eval", str(export), "--tasks", "tiny_writing", *OPTIONS, "--out", str(out), *words])
    lines = [
        json.loads(line)
        for line in (tmp_path / "results-samples-tiny_writing.jsonl").read_text().splitlines()
    ]
    questions = read_lines("questions.jsonl")
    assert sorted(line["doc_id"] for line in lines) == [0, 2]
    for line in lines:
        ((prompt, options),) = line["arguments"]
        assert prompt.startswith("Be brief. ")
        assert questions[line["doc_id"]]["question"] in prompt
        assert options["max_gen_toks"] == 3
        assert len(line["resps"][0][0]) <= 3
    assert "samples" not in json.loads(out.read_text())
    assert seen[0]["log_samples"]


def test_combinations_that_lm_eval_refuses_are_user_errors(export: Path, capsys):
    words = ["--samples", '{"tiny_writing": [0]}', "--limit", "2", "--apply_chat_template", "chatml"]
    with pytest.raises(SystemExit) as raised:
        main(["eval", str(export), "--tasks", "tiny_writing", *OPTIONS, *words])
    assert raised.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [error.split(":")[1].strip() for error in errors] == ["--apply_chat_template", "--samples"]
    with pytest.raises(SystemExit):
        main(["eval", str(export), "--tasks", "lra/listops", "--log_samples"])
    assert "error: --log-samples: is for tasks of lm-eval; leave it out" in capsys.readouterr().err


def test_windows_do_not_read_the_cache_of_carried_states(export: Path, tmp_path: Path):
    """lm-eval finds an answer by its request, which is the same for both."""
    out, words = tmp_path / "results.json", ["--rolling-window", "16", "--use_cache", str(tmp_path / "cache")]
    main(["eval", str(export), "--tasks", "tiny_document", *OPTIONS, *words, "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    carried, windowed = (results[name] for name in ("tiny_document", "tiny_document_window_16"))
    assert windowed["bits_per_byte,none"] != pytest.approx(carried["bits_per_byte,none"], rel=1e-5)
