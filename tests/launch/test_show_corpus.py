"""`minrnn data show`, `minrnn prepare` and `minrnn tokenizer train`, as a user calls them."""

import contextlib
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tqdm import tqdm

from minrnn.common.errors import UserError
from minrnn.launch import prepare, show_data, train_tokenizer
from minrnn.pipeline.recipe import read_recipe


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """JSON lines in two files, one of them with a broken line; beside them a text."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "rows"
    folder.mkdir()
    for shard in range(2):
        lines = [json.dumps({"text": f"row {shard} {i}\nand more words of it " * 3}) for i in range(50)]
        (folder / f"{shard}.jsonl").write_text("\n".join([*lines, "broken"] if shard else lines))
    (tmp_path / "one.txt").write_text("a line of a long text\n" * 100)
    return "rows"


SKIP = ["--data.skip_broken", "true"]
SMALL = ["--batch.lanes", "3", "--batch.chunk", "200", *SKIP]


def shown(capsys, *arguments: str) -> str:
    show_data.main(["show", *arguments])
    return capsys.readouterr().out


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return match[1]


def test_what_the_model_will_see(rows: str, capsys):
    text = shown(capsys, rows, *SMALL, "--data.validation_fraction", "0.2", "--tokens", "150")
    documents = int(found(r"documents   (\d+) of", text))
    held_out = int(found(r"left out    (\d+) documents held out", text))
    assert documents + held_out == 100
    assert "1 broken (data.skip_broken)" in text
    tokens = int(found(r"tokens      ([\d,]+)", text).replace(",", ""))
    assert float(found(r"bytes/token ([\d.]+)", text)) == pytest.approx(1 - documents / tokens, abs=1e-3)
    assert f"validation  {held_out} documents of" in text
    assert re.search(r"shards      2; 2 files of .* kB to .* kB", text)
    lanes = re.findall(r"lane \d: \[rows/\d.jsonl:\d+\] row \d \d+.and more words", text)
    assert len(lanes) == 3
    assert text.count(" [rows/") >= 3, "documents that begin within a lane are marked"
    assert "\x1b" not in text
    assert "\x1b[36m" in shown(capsys, rows, *SMALL, "--color", "always")


def test_filtered_documents_and_held_out_shards_are_named(rows: str, capsys, monkeypatch: pytest.MonkeyPatch):
    options = ["--data.validation_fraction", "0.5", "--data.filter", "{min_bytes: 88}"]
    text = shown(capsys, rows, *SMALL, *options)
    filtered = int(found(r"(\d+) that do not pass data.filter", text))
    documents, held_out = (
        int(found(r"documents   (\d+) of", text)),
        int(found(r"left out    (\d+) doc", text)),
    )
    assert filtered == 20, "those with a number below 10"
    assert documents + held_out + filtered == 100
    monkeypatch.setattr("minrnn.data.rows.STREAM_BYTES", 1)
    text = shown(capsys, rows, *SMALL, *options)
    assert "left out    1 of 2 shards held out for validation (data.hold_out); 10 that do not pass" in text
    assert re.search(r"validation  [34]\d documents of", text)


def test_estimates_leave_out_what_is_not_read(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Of 400 rows, half of the row groups are held out, and every second row does not pass."""
    table = pyarrow.table(
        {"text": [f"a row {i % 2} " * 20 for i in range(400)], "kind": [i % 2 for i in range(400)]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    monkeypatch.setattr("minrnn.data.rows.STREAM_BYTES", 1)
    options = ["--data.validation_fraction", "0.5", "--data.hold_out", "shards", "--data.filter", "{kind: 1}"]
    text = shown(capsys, str(tmp_path), *SMALL, *options, "--documents", "50")
    assert "documents   about 100, estimated from 25" in text
    assert "left out    the end of one of 1 shards held out" in text


def test_a_validation_corpus_has_settings_of_its_own(rows: str, tmp_path: Path, capsys):
    parts = {"large": 30, "small": 3}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": ["a text"] * size}) for name, size in parts.items()}
    ).save_to_disk(tmp_path / "parts")
    options = ["--data.validation", str(tmp_path / "parts"), "--data.validation_split", "small"]
    assert "validation  3 documents of" in shown(capsys, rows, *SMALL, *options)
    text = shown(capsys, rows, *SMALL, "--data.validation", "one.txt")
    assert "validation  1 documents of 2,201 tokens of one.txt" in text


def test_a_sample_is_marked_as_such(rows: str, capsys):
    text = shown(capsys, rows, *SMALL, "--documents", "10")
    assert re.search(r"documents   more than the \d+ that were read", text)
    assert "of those that were read" in text or "left out    nothing" in text


def test_a_prepared_corpus_is_shown_as_its_original(rows: str, capsys):
    prepare.main(["quickstart", "--out", "tokens", "--data.corpus", rows, *SKIP, "--workers", "0"])
    assert "100 documents, 1 broken parts left out, " in capsys.readouterr().out
    filtered = ["--data.filter", "{min_bytes: 88}", "--out", "some-tokens"]
    prepare.main(["quickstart", "--data.corpus", rows, *SKIP, "--workers", "0", *filtered])
    assert (
        "80 documents, 1 broken parts left out, 20 that do not pass data.filter, " in capsys.readouterr().out
    )
    texts = [shown(capsys, corpus, *SMALL) for corpus in (rows, "tokens")]
    same = [re.sub(r"corpus .*\n|shards .*\n +.*\n", "", text) for text in texts]
    assert same[0] == same[1]
    sample = shown(capsys, "tokens", *SMALL, "--documents", "10")
    assert re.search(r"documents   about \d+, estimated from \d+", sample)


def test_a_tokenizer_is_trained_and_a_corpus_prepared_with_it(
    rows: str, capsys, monkeypatch: pytest.MonkeyPatch
):
    no_bar = contextlib.nullcontext(tqdm(disable=True))  # as with TQDM_DISABLE: it does not count
    monkeypatch.setattr(train_tokenizer, "_reading_bar", lambda _: no_bar)
    train_tokenizer.main(["train", rows, "--vocab-size", "280", "--out", "words", *SKIP])
    assert re.search(r"280 tokens, learned from 8,\d{3} bytes", capsys.readouterr().out)
    options = ["--data.corpus", rows, "--data.tokenizer", "words", *SKIP]
    prepare.main(["--config", "quickstart", "--out", "tokens", "--workers", "0", *options])
    assert "uint16 tokens" in capsys.readouterr().out
    assert read_recipe(["--data.corpus", "tokens"]).data.tokenizer == "tokens/tokenizer"
    assert "tokenizer   tokens/tokenizer, 280 tokens" in shown(capsys, "tokens", *SMALL)
    with pytest.raises(
        UserError, match=r"data\.tokenizer: bytes is not the tokenizer .*prepared with \(words\)"
    ):
        shown(capsys, "tokens", "--data.tokenizer", "bytes")


@pytest.mark.parametrize("corpus", ["synthetic/parity", "synthetic/mqar"])
def test_the_first_chunk_of_a_task(corpus: str, capsys):
    text = shown(capsys, corpus, "--batch.lanes", "2", "--batch.chunk", "512", "--tokens", "20")
    assert f"corpus      {corpus}" in text
    assert text.count("\nlane ") == 2


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (show_data, ["show", "rows", "--lanes", "0"], "--lanes: must be at least 1, not 0"),
        (show_data, ["show", "rows", "--seconds", "0"], "--seconds: must be positive, not 0"),
        (show_data, ["show", "nothing.txt"], "there is no file, folder or match for nothing.txt"),
        (show_data, ["show", "rows", "--data.lanes", "1"], "data.lanes: unknown key"),
        (prepare, ["quickstart", "--workers", "-1"], "--workers: must be at least 0, not -1"),
        (prepare, ["quickstart", "--config", "quickstart"], "--config: names a second recipe"),
        (prepare, ["--data.corpus", "synthetic/parity", "--batch.chunk", "512"], "makes its own examples"),
        (prepare, ["--data.corpus", "one.txt"], "data.order: one.txt is read with order continuous"),
        (train_tokenizer, ["trian", "rows", "--out", "t"], "unknown command trian (did you mean train?)"),
        (train_tokenizer, ["train", "rows", "--out", "rows"], "--out: rows holds other files"),
        (
            train_tokenizer,
            ["train", "rows", "--out", "t", "--vocab-size", "9", "--max-bytes", "0"],
            "--max-bytes: must be at least 1, not 0\nerror: --vocab-size: must be at least 259",
        ),
        (
            train_tokenizer,
            ["train", "rows", "--out", "t", "--data.skip_broken", "true"],
            "--vocab-size: 32768 tokens cannot be learned from this text",
        ),
    ],
)
@pytest.mark.usefixtures("rows")
def test_errors_name_the_options(command, arguments: list[str], message: str):
    with pytest.raises(UserError) as raised:
        command.main(arguments)
    assert message in str(raised.value)
    assert not Path("t").exists()
