"""What the name of a corpus stands for: a file, a folder, a glob, or a dataset of the hub."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_helpers import json_line, reading_error, texts_of, write_corpus

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, open_source
from minrnn.data.sources import Position


def test_paths_folders_and_globs(tmp_path: Path):
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden.txt", ".folder/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(open_source(CorpusSpec(str(tmp_path / "b.txt"))).read(0, Position())) == ["b.txt"]
    whole = list(open_source(CorpusSpec(str(tmp_path))).read(0, Position()))
    assert texts_of(whole) == ["a.txt", "b.txt", "deep/c.txt"]
    assert [document.name for document in whole] == ["a.txt", "b.txt", "deep/c.txt"]
    assert texts_of(open_source(CorpusSpec(f"{tmp_path}/**/*.txt")).read(0, Position())) == [
        "a.txt",
        "b.txt",
        "deep/c.txt",
    ]
    assert texts_of(open_source(CorpusSpec(f"{tmp_path}/?.txt")).read(0, Position())) == ["a.txt", "b.txt"]


def test_relative_paths_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_corpus("jsonl", tmp_path, ["one", "two"])
    monkeypatch.chdir(tmp_path)
    for name in ("part-00000.jsonl", "*.jsonl", "."):
        assert texts_of(open_source(CorpusSpec(name)).read(0, Position())) == ["one", "two"]


def test_missing_and_empty_corpora_are_refused(tmp_path: Path):
    missing = tmp_path / "none.jsonl"
    assert f"error: data.corpus: there is no file, folder or match for {missing}" in reading_error(
        CorpusSpec(str(missing))
    )
    assert "no file, folder or match" in reading_error(CorpusSpec(str(tmp_path / "*.txt")))
    assert f"the folder {tmp_path} holds no files" in reading_error(CorpusSpec(str(tmp_path)))
    (tmp_path / "a.txt").touch()
    assert f"{tmp_path / 'a.txt'} is empty" in reading_error(CorpusSpec(str(tmp_path / "a.txt")))
    (tmp_path / "b.jsonl").write_text(json_line("one"))
    message = reading_error(CorpusSpec(str(tmp_path)))
    assert "mixes jsonl (b.jsonl), text (a.txt) files" in message
    assert "glob" in message


def test_a_relative_glob_without_a_match_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert "no file, folder or match" in reading_error(CorpusSpec("texts/*"))


def test_files_that_a_run_writes_are_excluded_from_its_folder(tmp_path: Path):
    """Files are compared by real path, below folders and in globs.

    A corpus that is named inside the run's folder is still read.
    """
    for name in ("a.txt", "runs/x/samples.txt", "runs/x/own.txt", "runs/y/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    excluded = tuple(os.path.realpath(tmp_path / name) for name in ("runs/x", "runs/x/samples.txt"))

    def texts_in(corpus: str) -> list[str]:
        return texts_of(
            open_source(CorpusSpec(str(tmp_path / corpus), excluded=excluded)).read(0, Position())
        )

    assert texts_in("") == texts_in("**/*.txt") == ["a.txt", "runs/y/b.txt"]
    assert texts_in("runs") == texts_in("runs/*/*.txt") == texts_in("link/*/*.txt") == ["runs/y/b.txt"]
    assert texts_in("runs/x") == texts_in("runs/x/*") == ["runs/x/own.txt"]
    assert texts_in("runs/x/samples.txt") == ["runs/x/samples.txt"]
    shutil.rmtree(tmp_path / "runs" / "y")
    assert "holds no files but those of the run" in reading_error(
        CorpusSpec(str(tmp_path / "runs"), excluded=excluded)
    )


def test_what_is_no_file_in_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    message = reading_error(CorpusSpec(str(tmp_path)))
    assert f"gone.txt is a link to {tmp_path / 'nowhere'}, which is not there; remove it" in message
    assert "is a link to" in reading_error(CorpusSpec(str(tmp_path / "gone.txt")))
    (tmp_path / "gone.txt").unlink()
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "pipe", tmp_path / "p*"):
        message = reading_error(CorpusSpec(str(name)))
        assert f"{tmp_path / 'pipe'} is a pipe, socket or device, not a file" in message
    assert texts_of(open_source(CorpusSpec(f"{tmp_path}/*.txt")).read(0, Position())) == ["one"]


def test_links_to_folders_are_followed_once(tmp_path: Path):
    disk, corpus = tmp_path / "disk", tmp_path / "corpus"
    for folder in (disk / "deep", disk / ".hidden", corpus):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(str(folder))
    (corpus / "more").symlink_to(disk)
    for loop in (corpus / "loop", disk / "deep" / "loop"):
        loop.symlink_to(corpus)
    texts = texts_of(open_source(CorpusSpec(str(corpus))).read(0, Position()))
    assert texts == [str(corpus), str(disk / "deep")]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("one")
    scandir = os.scandir

    def refuse(path: str | Path) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = reading_error(CorpusSpec(str(tmp_path)))
    assert f"{tmp_path / 'closed'} cannot be read (Permission denied)" in message


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?", "[!x]"])
def test_names_with_the_characters_of_patterns(name: str, tmp_path: Path):
    folder = tmp_path / name / "deep"
    folder.mkdir(parents=True)
    for file in (f"{name}.txt", "other.txt"):
        (folder / file).write_text(file)
    for corpus, expected in (
        (folder / f"{name}.txt", [f"{name}.txt"]),
        (folder, [f"{name}.txt", "other.txt"]),
        (folder / "o*.txt", ["other.txt"]),
        (tmp_path / name / "**" / "other.t?t", ["other.txt"]),
    ):
        texts = texts_of(open_source(CorpusSpec(str(corpus))).read(0, Position()))
        assert sorted(texts) == sorted(expected)


@pytest.mark.parametrize(
    "name",
    ["roneneldan/TinyStories", "mlfoundations/dclm-baseline-1.0", "mlfoundations/dclm-baseline-1.0-parquet"],
)
def test_names_of_hub_datasets(name: str, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr("minrnn.data.corpus.check_dataset_name", lambda *_: None)
    monkeypatch.setattr("minrnn.data.corpus.HubDataset", lambda path, *_: opened.append(path))
    open_source(CorpusSpec(name))
    assert opened == [name]


@pytest.mark.parametrize("corpus", ["a.txt", "a.jsonl", "python-stdlib"])
def test_settings_of_hub_datasets_are_refused_for_other_corpora(corpus: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    spec = CorpusSpec(corpus if corpus == "python-stdlib" else str(tmp_path / corpus))
    with pytest.raises(UserError) as caught:
        open_source(replace(spec, subset="en", split="test", revision="v2"))
    assert [key for key, _ in caught.value.errors] == ["data.subset", "data.split", "data.revision"]
    assert "has no split; leave it out (default: train)" in str(caught.value)


HUB_ERRORS = {
    "Dataset 'org/name' is a gated dataset on the Hub. Visit the page": (
        "data.corpus",
        "is gated; accept its conditions at https://huggingface.co/datasets/org/name, then log in",
    ),
    "BuilderConfig 'small' not found. Available: ['large']": (
        "data.subset",
        "'org/name' has no subset 'small' (ValueError: BuilderConfig 'small' not found. Available: [",
    ),
    "Dataset 'org/name' doesn't exist on the Hub or cannot be accessed.": (
        "data.corpus",
        "there is no dataset 'org/name' on the hub, or it is private",
    ),
}


@pytest.mark.parametrize("text", HUB_ERRORS)
def test_datasets_that_cannot_be_opened(text: str, monkeypatch: pytest.MonkeyPatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def fail(*_: object, **__: object) -> None:
        raise (ValueError if "BuilderConfig" in text else DatasetNotFoundError)(text)

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    monkeypatch.setattr("minrnn.data.corpus.check_dataset_name", lambda *_: None)
    with pytest.raises(UserError) as caught:
        open_source(CorpusSpec("org/name", subset="small"))
    ((key, message),) = caught.value.errors
    assert (key, HUB_ERRORS[text][1] in message) == (HUB_ERRORS[text][0], True), message
