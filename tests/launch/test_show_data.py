"""`minrnn data`: the statistics of labelled examples."""

import re
from pathlib import Path

import pytest
from PIL import Image

from minrnn.common.errors import UserError
from minrnn.launch.show_data import main

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


def test_a_picture_of_examples(tmp_path: Path, capsys):
    picture = tmp_path / "examples.png"
    arguments = ["--task", f"{{{SIZES}}}", "--cache", str(tmp_path), "--picture", str(picture)]
    main(["lra/pathfinder", *arguments])
    assert Image.open(picture).size[0] > 300
    with pytest.raises(UserError, match="--picture: lra/listops has no images"):
        main(["lra/listops", "--task", f"{{max_length: 30, min_length: 3, {SIZES}}}", *arguments[2:]])


def test_a_corpus_without_labels_is_refused():
    with pytest.raises(UserError, match="python-stdlib has no labelled examples; those of lra/listops, "):
        main(["python-stdlib"])
