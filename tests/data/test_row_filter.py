"""Templates of several fields, and filters: pure functions of a row, the same for every format."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from data_helpers import ENCODER, reading_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, DocumentReader, ReaderSpec, RowRules
from minrnn.data.corpus import open_source
from minrnn.data.document_stream import DocumentStream, WindowAddress
from minrnn.data.sources import Position

FORMATS = ("jsonl", "parquet", "csv", "saved")
ROWS: list[dict[str, Any]] = [
    {
        "title": f"title {i}",
        "text": "é" * (i % 7),
        "language": ("en", "de", "fr")[i % 3],
        "score": i / 20,
        "year": 2000 + i,
    }
    for i in range(20)
]


def write(format: str, folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows.{format}"
    if format == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif format == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=6)
    elif format == "csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


@pytest.fixture(scope="module", params=FORMATS)
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(request.param, tmp_path_factory.mktemp(request.param), ROWS)


def rules(template: str | None = None, **conditions: Any) -> RowRules:
    return RowRules.from_settings(template, conditions)


def read(spec: CorpusSpec) -> list[str | None]:
    return [document.text for document in open_source(spec).read(0, Position())]


@settings(max_examples=10)
@given(
    min_bytes=st.integers(0, 14),
    max_bytes=st.integers(0, 14),
    languages=st.lists(st.sampled_from(["en", "de", "fr", "it"]), min_size=1, max_size=3),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    years=st.lists(st.integers(1999, 2020), min_size=1, max_size=12),
)
def test_what_passes_is_what_the_conditions_say(
    corpus: str,
    min_bytes: int,
    max_bytes: int,
    languages: list[str],
    low: float,
    high: float,
    years: list[int],
):
    assume(min_bytes <= max_bytes and low <= high)
    conditions = {"language": languages, "score": {"min": low, "max": high}, "year": years}
    spec = CorpusSpec(corpus, rules=rules(None, min_bytes=min_bytes, max_bytes=max_bytes, **conditions))
    expected = [
        row["text"]
        if min_bytes <= len(row["text"].encode()) <= max_bytes
        and row["language"] in languages
        and low <= row["score"] <= high
        and row["year"] in years
        else None
        for row in ROWS
    ]
    assert read(spec) == expected
    window = DocumentStream(spec, "all", 0, 1, window=100, seed=None).window(WindowAddress())
    assert (window.num_filtered, window.num_skipped) == (expected.count(None), 0)


def test_a_template_makes_one_text_of_several_fields(corpus: str):
    spec = CorpusSpec(corpus, text_field="not there", rules=rules(r"{{{title}}}\n{text} ({year})\\n"))
    assert read(spec) == [f"{{{row['title']}}}\n{row['text']} ({row['year']})\\n" for row in ROWS]


@given(st.text(st.sampled_from("ab\\{}nt\n é"), max_size=8))
def test_any_text_can_be_written_in_a_template(literal: str):
    escaped = literal.replace("\\", "\\\\").replace("{", "{{").replace("}", "}}")
    made = rules(escaped + "{a}").template
    assert made is not None
    assert made.text({"a": "x"}, "row") == (literal + "x").removeprefix("\ufeff")


def test_a_reader_counts_what_is_left_out_and_resumes(corpus: str):
    spec = ReaderSpec(
        CorpusSpec(corpus, rules=rules("{title} {text}", language=["en", "de"])),
        "documents",
        ENCODER,
        1,
        lanes=2,
        chunk=16,
        window=5,
        seed=1,
    )
    reader = DocumentReader(spec, 0)
    chunks = [reader.next_chunk() for _ in range(30)]
    per_epoch = sum(row["language"] == "fr" for row in ROWS)
    last = chunks[-1].state
    assert last["window"]["epoch"] > 1
    assert last["num_filtered"] >= per_epoch * last["window"]["epoch"]
    resumed = DocumentReader(spec, 0, json.loads(json.dumps(chunks[9].state)))
    for chunk in chunks[10:]:
        other = resumed.next_chunk()
        assert (other.input_ids == chunk.input_ids).all()
        assert other.state["num_filtered"] == chunk.state["num_filtered"]


@pytest.mark.parametrize("format", FORMATS)
def test_null_is_an_error_in_a_text_and_does_not_pass_a_filter(format: str, tmp_path: Path):
    rows = [{"text": "a", "score": 1.0}, {"text": None, "score": 2.0}, {"text": "c", "score": None}]
    corpus = write(format, tmp_path, rows)
    spec = CorpusSpec(corpus, skip_broken=True, rules=rules(score={"min": 0}))
    texts = list(open_source(spec).read(0, Position()))
    if format == "csv":  # has no null: an empty cell is an empty text, and no number
        assert [document.text for document in texts] == ["a", "", None]
        assert [document.num_skipped for document in texts] == [0, 0, 1]
    else:
        assert [document.text for document in texts] == ["a", None, None]
        assert [document.num_skipped for document in texts] == [0, 1, 0]
        assert [document.num_filtered for document in texts] == [0, 0, 1]
        assert "no text in field 'text' of the template" in reading_error(
            CorpusSpec(corpus, rules=rules("{text}"))
        )


def test_unknown_fields_are_errors_that_name_the_columns(corpus: str):
    error = reading_error(CorpusSpec(corpus, rules=rules("{titel}", langauge="en")))
    assert "data.template: " in error
    assert "has no field 'titel' (did you mean 'title'?)" in error
    error = reading_error(CorpusSpec(corpus, rules=rules(zzz="en")))
    assert "data.filter: " in error
    assert "has no field 'zzz' (it has 'title', 'text', 'language', 'score', 'year')" in error


def test_a_range_of_text_is_an_error(corpus: str):
    error = reading_error(CorpusSpec(corpus, rules=rules(language={"min": 1})))
    assert "holds 'en' in field 'language', of which data.filter asks a number" in error


def test_joined_rows_are_filtered_before_they_are_joined(tmp_path: Path):
    rows = [{"text": str(i), "book": i // 3, "page": i} for i in range(9)]
    corpus = write("jsonl", tmp_path, rows)
    spec = CorpusSpec(corpus, join="book", rules=rules(page=[0, 2, 3, 4, 5]))
    source = open_source(spec)
    documents = list(source.read(0, Position()))
    assert [document.text for document in documents if document.text] == ["0\n2", "3\n4\n5"]
    assert sum(document.num_filtered for document in documents) == 4


def test_files_of_text_are_filtered_by_length_only(tmp_path: Path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("x" * i)
    assert read(CorpusSpec(str(tmp_path), rules=rules(min_bytes=2, max_bytes=3))) == [
        None,
        None,
        "xx",
        "xxx",
        None,
    ]
    error = reading_error(CorpusSpec(str(tmp_path), rules=rules("{text}", language="en")))
    assert [line.partition(": ")[2].partition(":")[0] for line in error.splitlines()] == [
        "data.template",
        "data.filter",
    ]


def test_a_filter_that_nothing_passes_is_named(corpus: str):
    spec = ReaderSpec(
        CorpusSpec(corpus, rules=rules(language="it")), "documents", ENCODER, 1, 1, 16, window=4, seed=1
    )
    with pytest.raises(UserError, match=r"data.filter: leaves nothing of .*: none of 20 documents passes"):
        DocumentReader(spec, 0)


VALUES = st.one_of(st.text(max_size=3), st.integers(-5, 5), st.booleans(), st.floats(-2, 2))


@given(
    template=st.sampled_from([None, "{a}", "{{x}} {a}\\n{b}"]),
    fields=st.dictionaries(
        st.sampled_from("abc"), st.one_of(VALUES, st.lists(VALUES, min_size=1, max_size=3))
    ),
    ranges=st.dictionaries(st.sampled_from("def"), st.sampled_from([{"min": 0.5}, {"max": 2}])),
    limits=st.sampled_from([{}, {"min_bytes": 3}, {"max_bytes": 0}, {"min_bytes": 1, "max_bytes": 9}]),
)
def test_rules_are_made_again_from_their_settings(template: str | None, fields, ranges, limits):
    made = rules(template, **fields, **ranges, **limits)
    settings = json.loads(json.dumps(made.as_settings()))
    assert RowRules.from_settings(settings["template"], settings["filter"] or {}) == made


@pytest.mark.parametrize(
    ("template", "conditions", "messages"),
    [
        ("no field", {}, ["data.template: 'no field' has no field in braces"]),
        ("{a", {}, ["data.template: '{a' is malformed"]),
        ("{a!r} {b:5}", {}, ["may hold names of fields in braces only"]),
        ("{}", {}, ["may hold names of fields in braces only"]),
        (None, {"min_bytes": -1}, ["data.filter: min_bytes must be a number of bytes, not -1"]),
        (None, {"min_bytes": 9, "max_bytes": 3}, ["min_bytes is greater than max_bytes"]),
        (None, {"a": {"min": 3, "max": 2}}, ["data.filter: a: no number is in the range"]),
        (None, {"a": {"least": 3}}, ["data.filter: a: unknown key 'least'"]),
        (None, {"a": {"min": "x"}}, ["data.filter: a: min must be a number, not 'x'"]),
        (None, {"a": []}, ["data.filter: a: must be a value, a list of values or a range"]),
        ("{", {"a": None, "b": [{}]}, ["data.template: ", "data.filter: a: must", "data.filter: b: must"]),
    ],
)
def test_malformed_settings_are_reported_all_at_once(
    template: str | None, conditions: dict[str, Any], messages: list[str]
):
    with pytest.raises(UserError) as caught:
        RowRules.from_settings(template, conditions)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert message in line
