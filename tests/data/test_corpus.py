"""Shares are disjoint and complete, windows are found again by address, and held-out documents are never
trained on.
"""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from data_helpers import FEW_EXAMPLES, KINDS, some_texts, texts_of, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, DocumentStream
from minrnn.data.corpus import (
    PYTHON_STDLIB,
    STDLIB_EXCLUDED,
    STDLIB_HELD_OUT,
    Split,
    stdlib_files,
)
from minrnn.data.document_stream import Window, WindowAddress
from minrnn.data.hold_out import is_held_out

FEW = settings(FEW_EXAMPLES, max_examples=12)


pytestmark = pytest.mark.usefixtures("local_hub_datasets")


def windows_of(stream: DocumentStream, num_epochs: int = 1) -> list[Window]:
    windows = [stream.window(WindowAddress())]
    while windows[-1].next_address.epoch < num_epochs:
        windows.append(stream.window(windows[-1].next_address))
    return windows


def texts_of_windows(windows: list[Window]) -> list[str]:
    return [text for window in windows for text in texts_of(window.documents)]


def without_hint(address: WindowAddress) -> WindowAddress:
    return replace(address, hint=None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_shards", [1, 4, 6])
@pytest.mark.parametrize("num_readers", [1, 2, 3, 4, 5])
def test_shares_are_disjoint_and_complete_in_every_epoch(
    kind: str, num_shards: int, num_readers: int, tmp_path: Path
):
    texts = some_texts(31)
    spec = write_corpus(kind, tmp_path / kind, texts, num_shards)
    by_epoch: dict[int, list[str]] = {0: [], 1: []}
    for reader in range(num_readers):
        share = windows_of(DocumentStream(spec, "train", reader, num_readers, 4, 7), num_epochs=2)
        for epoch in (0, 1):
            texts_of_reader = texts_of_windows([window for window in share if window.address.epoch == epoch])
            by_epoch[epoch] += texts_of_reader
            if kind != "text" and num_shards % num_readers == 0:
                assert len(texts_of_reader) >= num_shards // num_readers * (len(texts) // num_shards), (
                    "whole shards"
                )
    assert Counter(by_epoch[0]) == Counter(by_epoch[1]) == Counter(texts)


def test_a_reader_opens_only_its_own_shards(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path, [str(i) for i in range(12)], num_shards=4)
    streams = [DocumentStream(spec, "train", reader, 2, 3, None) for reader in (0, 1)]
    (tmp_path / "part-00001.jsonl").write_text("broken")  # shard 1 is reader 1's
    assert texts_of_windows(windows_of(streams[0])) == ["0", "1", "2", "6", "7", "8"]
    with pytest.raises(UserError, match=r"part-00001\.jsonl:1"):
        windows_of(streams[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_readers", [1, 2])
@FEW
@given(data=st.data(), size=st.integers(1, 9), seed=st.none() | st.integers(0, 3))
def test_an_address_always_gives_the_same_window(
    kind: str,
    num_readers: int,
    data: st.DataObject,
    size: int,
    seed: int | None,
    tmp_path_factory: pytest.TempPathFactory,
):
    folder = tmp_path_factory.getbasetemp() / f"addresses-{num_readers}" / kind
    spec = CorpusSpec(str(folder)) if folder.exists() else write_corpus(kind, folder, some_texts(23), 3)
    windows = windows_of(
        DocumentStream(spec, "train", num_readers - 1, num_readers, size, seed), num_epochs=2
    )
    assert all(len(window.documents) <= size for window in windows)
    stream = DocumentStream(spec, "train", num_readers - 1, num_readers, size, seed)
    for number in data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=8)):
        address = WindowAddress(**json.loads(json.dumps(asdict(windows[number].address))))
        again = stream.window(address)
        assert again.documents == windows[number].documents
        assert without_hint(again.next_address) == without_hint(windows[number].next_address)
        if number + 1 < len(
            windows
        ):  # by the hint that it gives itself: a dataset's states may say the same place in two ways
            fresh = DocumentStream(spec, "train", num_readers - 1, num_readers, size, seed)
            assert fresh.window(again.next_address).documents == windows[number + 1].documents


def test_windows_are_numbered_in_order(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path, [str(i) for i in range(8)], num_shards=2)
    windows = windows_of(DocumentStream(spec, "train", 0, 1, 3, None), num_epochs=3)
    assert [texts_of(window.documents) for window in windows][:3] == [
        ["0", "1", "2"],
        ["3", "4", "5"],
        ["6", "7"],
    ]
    assert [(window.address.epoch, window.address.number) for window in windows] == [
        (e, n) for e in range(3) for n in range(3)
    ]


def test_the_shuffle_is_a_permutation_that_differs_by_seed_and_epoch(tmp_path: Path):
    texts = [str(i) for i in range(40)]
    spec = write_corpus("jsonl", tmp_path, texts)
    orders = {}
    for seed in (None, 0, 1):
        for window in windows_of(DocumentStream(spec, "train", 0, 1, 20, seed), num_epochs=2):
            orders[seed, window.address.epoch, window.address.number] = texts_of(window.documents)
    for (seed, epoch, number), order in orders.items():
        expected = texts[20 * number : 20 * number + 20] if number < 2 else []
        assert sorted(order) == sorted(expected)
        if seed is None:
            assert order == expected
        elif order:
            assert order != orders[None, epoch, number]
    assert orders[0, 0, 0] != orders[1, 0, 0] != orders[1, 1, 0] != orders[0, 1, 0]
    positions = [[int(text) % 20 for text in orders[0, 0, number]] for number in (0, 1)]
    assert positions[0] != positions[1], "each window has its own permutation"


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 1.0])
def test_held_out_and_training_documents_are_disjoint_and_complete(
    kind: str, fraction: float, tmp_path: Path
):
    texts = some_texts(120, seed=3)
    spec = replace(write_corpus(kind, tmp_path, texts, 2), held_out=fraction)
    parts: dict[Split, list[str]] = {"train": [], "validation": [], "all": []}
    for part, texts_of_part in parts.items():
        for reader in range(3):
            texts_of_part += texts_of(DocumentStream(spec, part, reader, 3, 8, 0).one_epoch())
    assert Counter(parts["all"]) == Counter(texts)
    assert Counter(parts["train"]) + Counter(parts["validation"]) == Counter(texts)
    assert not set(parts["train"]) & set(parts["validation"])
    assert abs(len(parts["validation"]) / len(texts) - fraction) < 0.12


@FEW
@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_more(text: str, one: float, other: float):
    smaller, larger = sorted((one, other))
    assert is_held_out(text, larger) or not is_held_out(text, smaller)
    assert not is_held_out(text, 0.0)
    assert is_held_out(text, 1.0)


def test_python_stdlib():
    (train, root), (validation, _), (everything, _) = (
        stdlib_files("train"),
        stdlib_files("validation"),
        stdlib_files("all"),
    )
    assert not set(train) & set(validation)
    assert sorted(train + validation) == everything
    for files in (train, validation, everything):
        assert files == sorted(files)
        assert not [path for path in files if STDLIB_EXCLUDED & set(path.relative_to(root).parts)]
        assert all(path.suffix == ".py" and path.is_file() for path in files)
    modules = {path.relative_to(root).parts[0].removesuffix(".py") for path in validation}
    assert modules == STDLIB_HELD_OUT, "whole modules, and none of them misspelt"
    assert not modules & {path.relative_to(root).parts[0].removesuffix(".py") for path in train}
    assert root / "json" / "__init__.py" in validation
    assert root / "os.py" in train


def test_python_stdlib_is_a_corpus_that_can_be_read():
    spec = CorpusSpec(PYTHON_STDLIB, held_out=0.5)  # the fraction says nothing here
    for part in ("train", "validation"):
        names = [document.name for document in DocumentStream(spec, part, 0, 1, 64, None).one_epoch()]
        files, root = stdlib_files(part)
        assert names == [str(path.relative_to(root)) for path in files]
