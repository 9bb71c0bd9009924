"""Labelled examples from data files: conversion, and errors that name the row."""

import io
from pathlib import Path
from typing import Any

import pytest

from minrnn.common.errors import UserError
from minrnn.data import open_data
from minrnn.data.lra import LRA_TASKS, ListOps


def write_parquet(path: Path, **columns: list[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


def picture(size: tuple[int, int] = (32, 32), shade: int = 7, form: str = "PNG") -> dict[str, Any]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, form)
    return {"bytes": buffer.getvalue(), "path": None}


def test_images_are_read_in_grey_and_split_as_published(tmp_path: Path):
    folder = tmp_path / "cifar10"
    write_parquet(
        folder / "train-00000-of-00001.parquet",
        img=[picture(shade=shade) for shade in range(20)],
        label=[shade % 10 for shade in range(20)],
    )
    write_parquet(folder / "test-00000-of-00001.parquet", img=[picture(shade=99, form="JPEG")], label=[3])
    data = open_data(LRA_TASKS["image"](folder=str(folder)), tmp_path / "cache")
    train, validation, test = (data.examples(split) for split in ("train", "validation", "test"))
    assert [int(train.texts(i)[0][0]) for i in range(len(train))] == list(range(18))
    assert [int(validation.texts(i)[0][0]) for i in range(len(validation))] == [18, 19]
    assert test.texts(0)[0].tolist() == [99] * 1024
    assert (validation.label(1), test.label(0)) == (9, 3)


def test_texts_are_bytes_cut_at_the_published_length(tmp_path: Path):
    folder = tmp_path / "imdb"
    for split in ("train", "test"):
        write_parquet(folder / f"{split}-0.parquet", text=["Grüße", "x" * 5000], label=[0, 1])
    task = LRA_TASKS["text"](folder=str(folder))
    examples = open_data(task, tmp_path / "cache").examples("train")
    assert bytes(examples.texts(0)[0]).decode() == "Grüße"
    assert len(examples.texts(1)[0]) == 4096
    assert task.tokenizer()("Grüße").input_ids == list("Grüße".encode())


def test_pairs_of_papers(tmp_path: Path):
    folder = tmp_path / "aan"
    folder.mkdir()
    for split in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{split}.tsv").write_text(
            '1.0\t7\t8\tfirst "text\tsecond\n0.0\t1\t2\ta\tb\n'
        )
    data = open_data(LRA_TASKS["retrieval"](folder=str(folder)), tmp_path / "cache")
    examples = data.examples("validation")
    assert [bytes(text) for text in examples.texts(0)] == [b'first "text', b"second"]
    assert [examples.label(i) for i in range(2)] == [1, 0]
    batch = data.open_reader(0, 1, 2, 0, None).next_chunk()
    assert batch.input_ids.shape == (2, 2, 16)
    assert batch.num_tokens == 11 + 6 + 1 + 1


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("image", {"img": [{"bytes": b"no image", "path": None}], "label": [1]}, "[0]: the image is damaged"),
        ("image", {"img": [picture((31, 32))], "label": [1]}, "[0]: the image is 31 x 32, not 32 x 32"),
        ("image", {"img": [picture(), picture()], "label": [1, 10]}, "[1]: label 10 is not one of 0 to 9"),
        ("image", {"img": [picture()]}, "has no column label; its columns: img"),
        ("text", {"text": ["a", None], "label": [0, 1]}, "[1]: text holds no text (NoneType)"),
        ("text", {"text": ["a", ""], "label": [0, 1]}, "[1]: text is empty"),
        ("text", {"text": ["a"], "label": [-1]}, "[0]: label -1 is not one of 0 to 1"),
        ("text", {"text": ["a"], "label": [0.5]}, "[0]: label 0.5 is not one of 0 to 1"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, name: str, columns: dict[str, list[Any]], message: str):
    folder = tmp_path / name
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", **columns)
    with pytest.raises(UserError) as raised:
        open_data(LRA_TASKS[name](folder=str(folder)), tmp_path / "cache")
    assert f"data.task: {folder / 'train.parquet'}" in str(raised.value)
    assert message in str(raised.value)
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "lra").iterdir())


def test_a_truncated_image_is_named(tmp_path: Path):
    damaged = {"bytes": picture(form="JPEG")["bytes"][:-40], "path": None}
    write_parquet(tmp_path / "cifar" / "train.parquet", img=[picture(), damaged], label=[0, 1])
    with pytest.raises(UserError, match=r"train\.parquet\[1\]: the image is damaged \("):
        open_data(LRA_TASKS["image"](folder=str(tmp_path / "cifar")), tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[MAX 2 9 ]\t9\nx", "train.tsv:3 has 1 columns, not 2 (Source, Target)"),
        ("[MAX 2 x ]\t9", "train.tsv:2: 'x' is no symbol of ListOps"),
        ("[MAX 2 ] 9\t9", "train.tsv:2: token 3, '9', follows the end of the expression"),
        ("[MAX ]\t9", "train.tsv:2: token 1, ']', closes an empty list"),
        ("[MAX " + "2 " * 2000 + "]\t2", "train.tsv:2: 2002 tokens, but max_length 2000 allows fewer only"),
    ],
)
def test_a_broken_expression_is_named(tmp_path: Path, text: str, message: str):
    for split in ("train", "val", "test"):
        (tmp_path / f"basic_{split}.tsv").write_text(f"Source\tTarget\n{text}\n")
    with pytest.raises(UserError) as raised:
        open_data(ListOps(folder=str(tmp_path)), tmp_path / "cache")
    assert message in str(raised.value)


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1, but no parquet")
    with pytest.raises(UserError, match=r"^error: data\.task: .*/train\.parquet cannot be read \("):
        open_data(LRA_TASKS["text"](folder=str(tmp_path)), tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", r"folder: .*/empty has no file train\*\.parquet"),
        ("listops", r"folder: .*/empty has no file \*_train\.tsv or train\.tsv"),
    ],
)
def test_a_folder_without_the_files(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_data(LRA_TASKS[name](folder=str(tmp_path / "empty")), tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        open_data(LRA_TASKS[name](folder=str(tmp_path / "missing")), tmp_path)
