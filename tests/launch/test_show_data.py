"""`minrnn data`: the statistics of labelled examples."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minrnn.common.errors import UserError
from minrnn.data.lra import listops
from minrnn.data.lra.tasks import Pathfinder
from minrnn.launch.show_data import count_drawn, main

SIZES = "train_examples: 40, validation_examples: 3, test_examples: 3"


def test_the_statistics_of_listops(tmp_path: Path, capsys):
    main(["lra/listops", "--task", f"{{min_length: 3, max_length: 30, {SIZES}}}", "--cache", str(tmp_path)])
    text = capsys.readouterr().out
    assert re.search(r"train +40 examples of [4-9] to 2\d tokens", text)
    shares = [float(share) for share in re.findall(r"\d ([\d.]+)%", text.splitlines()[1])]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(100, abs=0.6)
    assert "published   96,000 / 2,000 / 2,000 examples" in text
    assert re.search(r"operators   MIN [\d.]+%, MAX", text)
    assert re.search(r"arguments   \d\.\d\d of each operation; [\d.]+% of those above depth 10", text)


@given(seed=st.integers(0, 99), max_depth=st.integers(2, 5))
def test_arguments_are_counted(seed: int, max_depth: int):
    """As in a walk along the expression, one token after another."""
    tokens, _ = listops.ExpressionSource((seed,), 0, 10**9, max_depth, 4).draw()
    operations, digits, depth = 0, 0, 0
    for token in tokens:
        if token != listops.END and 1 <= depth < max_depth - 1:
            operations += token >= listops.DIGITS
            digits += token < listops.DIGITS
        depth += (token >= listops.DIGITS) - 2 * (token == listops.END)
    assert count_drawn(np.frombuffer(tokens, np.uint8), max_depth).tolist() == [operations, digits]


def test_a_picture_of_examples(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Pathfinder, "BLOCK", 20)
    picture = tmp_path / "new" / "examples.png"
    arguments = ["--task", f"{{{SIZES}}}", "--cache", str(tmp_path), "--picture", str(picture)]
    main(["lra/pathfinder", *arguments])
    assert Image.open(picture).size[0] > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lra/listops", "--picture", "{folder}/a.png"], "--picture: lra/listops has no images"),
        (["lra/pathfinder", "--picture", "{folder}/a.jpg"], "--picture: {folder}/a.jpg must end in .png"),
        (
            ["lra/pathfinder", "--task", "{{data_sed: 1}}"],
            "--task: of lra/pathfinder: unknown option",
        ),
        (["lra/listop"], "lra/NAME: there is no task lra/listop (did you mean lra/listops"),
        (["python-stdlib"], "lra/NAME: python-stdlib has no labelled examples; those of lra/listops, "),
        (
            ["lra/text", "--task", "{{folder: {folder}}}"],
            "--task: folder: {folder} has no file tr",
        ),
        (["lra/listops", "--cache", "/dev/null"], "--cache: /dev/null/lra/listops-"),
    ],
)
def test_errors_name_the_options_before_any_work(tmp_path: Path, arguments: list[str], message: str):
    cache = tmp_path / "cache"
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(UserError) as raised:
        main([*arguments, *([] if "--cache" in arguments else ["--cache", str(cache)])])
    assert message.format(folder=tmp_path) in str(raised.value)
    assert not [path for path in cache.glob("lra/*") if path.is_dir()]
