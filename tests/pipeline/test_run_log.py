"""The log: a bar on a terminal, whole lines elsewhere, and what --quiet and --verbose change."""

import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import Values, losses

from minrnn.pipeline import loop
from minrnn.pipeline.run_log import RunLog, StepLine, take_verbosity

Run = Callable[[Values], Path]
LINE = StepLine(40, 100, 2.5, 12345.6, 0.731, 0.02, 1_500_000_000, 200.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("verbosity", ["normal", "quiet", "verbose"])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_file_gets_whole_lines_and_a_terminal_a_bar(
    monkeypatch: pytest.MonkeyPatch, verbosity, is_terminal: bool
):
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    log = RunLog(verbosity, 100, 39)
    log.report("a message")
    log.advance()
    log.show(LINE)
    log.close()
    written = stream.getvalue()
    if verbosity == "quiet":
        assert written == ""
        return
    assert "a message\n" in written
    assert (LINE.line() + "\n" in written) == (verbosity == "verbose" or not is_terminal)
    assert ("\r" in written) == is_terminal


def test_a_line_has_every_quantity():
    assert LINE.line() == (
        "step 40/100: loss 2.5000, 12,346 tokens/s, 73.1% of the matrix-product rate, waits for data 2%, "
        "peak memory 1.50 GB, about 3 min left"
    )
    assert "waits" not in LINE.beside_the_bar()
    assert LINE.beside_the_bar() == "loss 2.500, 12,346 tokens/s"
    assert replace(LINE, waiting=0.2).beside_the_bar().endswith(", waits for data 20%")


@given(st.lists(st.sampled_from(["--quiet", "--verbose", "--config", "x", "--run.dir=y"])))
def test_the_options_leave_the_others_in_order(argv: list[str]):
    others, verbosity = take_verbosity(argv)
    assert others == [word for word in argv if word not in ("--quiet", "--verbose")]
    given_options = [word for word in argv if word not in others]
    assert verbosity == (given_options[-1].removeprefix("--") if given_options else "normal")


def test_a_run_logs_a_line_every_log_every(values: Values, run_recipe: Run, capfd):
    values["train"] |= {"log_every": 5, "eval_every": None, "save_every": None}
    run_recipe(values)
    log = capfd.readouterr().err
    assert "\r" not in log
    lines = [line for line in log.splitlines() if re.match(r"step \d+/12: loss", line)]
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [5, 10, 12]
    for line in lines:
        assert re.search(r"peak memory [\d.]+ GB, about \d+ \w+ left$", line)


def test_quiet_and_verbose_runs(values: Values, run_recipe: Run, capfd, tmp_path: Path, monkeypatch):
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda recipe: train(recipe, "quiet"))
    quiet = losses(run_recipe(values))
    log = capfd.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in log)
    values["run"]["dir"] = str(tmp_path / "verbose")
    monkeypatch.setattr(loop, "train", lambda recipe: train(recipe, "verbose"))
    assert losses(run_recipe(values)) == quiet
    assert re.search(r"^building the engine: [\d.]+ s$", capfd.readouterr().err, re.MULTILINE)


def test_the_options_are_no_settings(monkeypatch):
    from minrnn.pipeline import train as command

    seen = []
    monkeypatch.setattr(loop, "train", lambda recipe, verbosity: seen.append((recipe.train.steps, verbosity)))
    command.main(["--quiet", "--train.steps", "7"])
    assert seen == [(7, "quiet")]
