"""No line of metrics.jsonl is lost or truncated, and a long file costs no more than a short one."""

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import Values, losses

from minrnn.pipeline import checkpoint, loop, pauses, pictures
from minrnn.pipeline.metrics import History, MetricsFile, cut_metrics, read_metrics

Run = Callable[[Values], Path]


def refuse_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes half a line and no more."""
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *arguments, **options):
        if mode == "a" and path.name == "metrics.jsonl":
            with opened(path, mode) as half:
                half.write('{"ste')
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)


@pytest.mark.parametrize("truncates", [True, False])
def test_lines_wait_for_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truncates: bool):
    """Whether the truncated line can be removed at once or only later."""
    warnings: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", warnings.append)
    file.append({"step": 1})
    with monkeypatch.context() as patched:
        refuse_lines(patched)
        if not truncates:
            patched.setattr(
                os, "truncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
            )
        file.append({"step": 2})
        file.append({"step": 3})
        with pytest.raises(OSError, match="No space left" if truncates else "Input/output"):
            file.sync()
        file.close()
    assert len(warnings) == 2
    assert "2 lines of" in warnings[1]
    file.sync()
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 2, 3]


def test_a_checkpoint_is_published_after_its_lines(
    values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch, capfd
):
    """The disk accepts checkpoints but no lines from step 3 to 6. So there is no checkpoint of step 4, and
    all lines are written later."""
    original = loop.take_step

    def one_step(run, step, *arguments):
        result = original(run, step, *arguments)
        if step == 3:
            refuse_lines(monkeypatch)
        if step == 7:
            run.output.saver.join()
            assert not checkpoint.checkpoint_paths(run.output.folder.path / "checkpoints")
            monkeypatch.undo()
        return result

    monkeypatch.setattr(loop, "take_step", one_step)
    folder = run_recipe(values)
    assert "takes no more lines (No space left on device)" in capfd.readouterr().err
    assert [step for step, _ in losses(folder)] == list(range(1, 13))
    assert [step for step, _ in losses(folder, "validation")] == [6, 12]
    assert [path.name for path in checkpoint.checkpoint_paths(folder / "checkpoints")] == [
        "step-000012",
        "step-000008",
    ]


def test_a_run_without_its_last_lines_is_not_finished(
    values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        original = pauses.validate_run

        def validate(run):
            if run.step == 12:
                refuse_lines(patched)
            original(run)

        patched.setattr(pauses, "validate_run", validate)
        with pytest.raises(OSError, match="No space left"):
            run_recipe(values)
    assert not (Path(values["run"]["dir"]) / ".finished").exists()
    assert [step for step, _ in losses(run_recipe(values), "validation")] == [6, 12]


def test_lines_are_strict_json(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl", print)
    file.append(
        {
            "kind": "train",
            "step": 1,
            "tokens": 1,
            "loss": math.nan,
            "lr": 0.1,
            "by": {"8": -math.inf, "9": 1.5},
        }
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    entry = json.loads(file.path.read_text(), parse_constant=refuse)
    assert (entry["loss"], entry["by"]) == (None, {"8": None, "9": 1.5})
    assert not file.history.update().losses


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 60), st.booleans())
def test_cutting_keeps_the_lines_up_to_a_step(tmp_path_factory, counts: list[int], step: int, has_end: bool):
    """With any number of lines per step; the last line may be truncated or lack only its end."""
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    steps = [number for number, count in enumerate(counts, 1) for _ in range(count)]
    lines = [
        json.dumps({"step": number, "note": "é" * (number * 400)}, ensure_ascii=False) + "\n"
        for number in steps
    ]
    text = "".join(lines)
    path.write_text(text + '{"step": 9' if has_end else text.removesuffix("\n"))
    expected = [line for line, number in zip(lines, steps, strict=True) if number <= step]
    assert cut_metrics(path, step) == len(lines) - len(expected)
    assert path.read_text() == "".join(expected)


def test_cutting_reads_only_what_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 200_001)))
    parsed = []
    monkeypatch.setattr(
        "minrnn.pipeline.metrics._parse", lambda line: parsed.append(line) or json.loads(line)
    )
    assert cut_metrics(path, 199_990) == 10
    assert len(parsed) == 11
    assert path.read_bytes().endswith(b'{"step": 199990}\n')


def line(step: int, kind: str = "train") -> dict:
    return {"kind": kind, "step": step, "tokens": 10 * step, "loss": 1.0 + step % 7, "bits_per_byte": 1.0}


def test_the_history_reads_new_lines_and_starts_again_after_a_cut(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl", print)
    history = History(file.path)
    for step in range(1, 6):
        file.append(line(step))
        file.append(line(step, "validation"))
        assert list(history.update().tokens) == [10 * number for number in range(1, step + 1)]
    with file.path.open("a") as half:
        half.write('{"kind": "tr')
    assert len(history.update().losses) == 5
    cut_metrics(file.path, 2)
    assert list(history.update().losses) == [2.0, 3.0]
    assert [entry["step"] for entry in history.validations] == [1, 2]
    assert len(read_metrics(file.path)) == 4


def test_a_long_history_is_drawn_in_few_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A picture of a million lines costs as much as one of thousands, and shows the extremes."""
    history = History(tmp_path / "metrics.jsonl")
    for step in range(1, 300_001):
        history.tokens.append(step)
        history.losses.append(1.0 + (step == 123_456))
    history.validations = [line(step, "validation") for step in range(1, 2001)]
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: drawn.append(figure))
    pictures.draw_loss(history, tmp_path / "loss.png", "run")
    (axes,) = drawn[0].axes
    assert max(len(curve.get_xdata()) for curve in axes.lines) <= pictures.NUM_POINTS
    assert len(axes.texts) <= pictures.NUM_NOTES
    assert max(axes.lines[0].get_ydata()) == 2.0


def test_the_history_grows_while_a_figure_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """matplotlib keeps data until a garbage collection. If it held a view of the history's array, the array
    could not grow."""
    file, drawn, extremes = MetricsFile(tmp_path / "metrics.jsonl", print), [], pictures._extremes
    monkeypatch.setattr(pictures, "_extremes", lambda x, y: drawn.append((x, y)) or extremes(x, y))
    history = History(file.path)
    for step in range(1, 4):
        file.append(line(step))
        pictures.draw_loss(history.update(), tmp_path / "loss.png", "run")
    assert [list(x) for x, _ in drawn] == [[10], [10, 20], [10, 20, 30]]


@pytest.mark.parametrize("count", [1, 2, 29, 30, 100, 301])
def test_smoothing_is_the_mean_of_the_neighbours(count: int):
    values, reach = np.random.default_rng(0).random(count), count // 30
    expected = [values[max(i - reach, 0) : i + reach + 1].mean() for i in range(count)]
    np.testing.assert_allclose(pictures._running_mean(values), expected)
