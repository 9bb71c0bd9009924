"""Each benchmark end to end at tiny sizes: what it writes, and how it reports user errors."""

import itertools
import json
import math
import platform
from pathlib import Path

import pytest

from minrnn.evals.bench import chunks, data_texts, generate, scan, train, worker
from minrnn.evals.bench.command import main, run_bench
from minrnn.launch.cli import main as minrnn

QUICK = ["--rounds", "1", "--min-seconds", "0", "--threads", "1", "--limit", "1e6"]
MODEL = ["--params", "400k", "--layers", "2", *QUICK]


def run(kind: str, arguments: list[str], folder: Path) -> dict:
    """Run a benchmark and return its record."""
    out = folder / "result.json"
    minrnn(["bench", kind, *arguments, "--out", str(out)])
    text = out.read_text()
    assert platform.node() not in text
    assert str(folder) not in text
    assert out.with_suffix(".png").stat().st_size > 1000
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["command"].startswith(f"minrnn bench {kind}")
    assert {"commit", "machine", "versions", "config"} <= record.keys()
    assert record["machine"]["cpu_units"], "which matrix units the CPU has"
    assert record["config"].get("dtype") in (None, "fp32", "bf16"), "auto is settled"
    for row in record["rows"]:
        assert ("reason" in row) != ("seconds" in row), row
        assert "seconds" not in row or (
            row["median_seconds"] > 0 and all(second > 0 for second in row["seconds"])
        )
    return record


def run_without_processes(*arguments):
    """`worker.run_contest` without processes, which take seconds to start."""
    specs, rounds, limit, _, others, bar = arguments
    return worker.run_contest(specs, rounds, limit, False, others, bar)


def check_ceilings(record: dict) -> None:
    for point in record["ceilings"].values():
        assert set(point) == {"copy", "torch.add", "matmul"}
        assert all(math.isfinite(ceiling["rate"]) and ceiling["rate"] > 0 for ceiling in point.values())


def test_scan(tmp_path: Path, capsys):
    sizes = "--shapes 2x16x8 --dtypes fp32 --lengths 8 --tokens 32 --layers 2x8x4".split()
    record = run("scan", [*sizes, *QUICK], tmp_path)
    by_name = {
        (row["section"], row["contender"], row["direction"]): row
        for row in record["rows"]
        if not row.get("sweep")
    }
    assert {name for _, name, _ in by_name} >= {*scan.PEERS, "minrnn", "minrnn-fused", "copy", "torch.add"}
    for direction in ("forward", "forward+backward"):
        for contender in ("copy", "torch.add", "minrnn", "minrnn-torch"):
            row = by_name["scan", contender, direction]
            assert 0 < row["bytes_per_second"] < math.inf
            assert 0 < row["of_torch.add"] < math.inf
        assert by_name["scan", "accelerated-scan", direction]["reason"] == "needs CUDA, this run is on cpu"
    assert by_name["scan", "minrnn", "forward"]["relative_error"] < 1e-5
    assert "tokens_per_second" in by_name["layer", "nn.GRU", "forward+backward"]
    assert any(row.get("sweep") for row in record["rows"])
    assert "of torch.add" in capsys.readouterr().out


def test_scan_reports_shapes_that_do_not_fit_into_memory(tmp_path: Path):
    sizes = "--shapes 1024x1048576x1024 --dtypes fp32 --lengths none --layers none --peers none".split()
    record = run("scan", [*sizes, *QUICK], tmp_path)
    assert all("of memory" in row["reason"] for row in record["rows"])


def test_train_measures_all_contenders(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train, "run_contest", run_without_processes)
    record = run(
        "train",
        [*MODEL, "--tokens", "64", "--lengths", "128", "--chunk", "64", "--stream", "128", "--cells", "all"],
        tmp_path,
    )
    rows = {row["contender"]: row for row in record["rows"] if row["section"] == "train"}
    assert set(rows) == {"minrnn", "minrnn-minlstm", train.CHUNKED, *train.PEERS}
    for name, row in rows.items():
        assert "reason" in row or abs(row["parameters"] / 400_000 - 1) <= 0.02, name
        assert "reason" in row or row["tokens_per_second"] > 0, name
    assert {name for name, row in rows.items() if "reason" not in row} >= {
        "minrnn",
        train.CHUNKED,
        "llama",
        "mamba2",
        "xlstm",
        "gru",
    }
    check_ceilings(record)
    stream = next(row for row in record["rows"] if row["section"] == "stream")
    assert stream["tokens_read"] == 128


def test_train_in_processes_of_their_own(tmp_path: Path):
    record = run("train", [*MODEL, "--tokens", "32", "--lengths", "32", "--peers", "lstm"], tmp_path)
    ours, lstm = record["rows"]
    assert ours["contender"] == "minrnn"
    assert ours["peak_bytes"] > 4 * 4 * ours["parameters"]  # weights, gradients and two moments, in fp32
    assert "seconds" in lstm


@pytest.mark.slow
def test_train_measures_the_loop(tmp_path: Path):
    record = run("train", ["--lengths", "none", "--loop", "3", *QUICK], tmp_path)
    step, in_loop = record["rows"]
    assert (step["contender"], in_loop["contender"]) == ("step", "loop")
    assert in_loop["overhead"] == pytest.approx(in_loop["median_seconds"] / step["median_seconds"] - 1)
    assert step["parameters"] == in_loop["parameters"]


def test_chunks_measures_every_number_of_chunks(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(chunks, "run_contest", run_without_processes)
    monkeypatch.setattr(chunks, "LONG", 100)  # 16 chunks are measured once
    options = [*MODEL, "--chunk", "16", "--counts", "1,4,16", "--rounds", "2"]
    rows = run("chunks", options, tmp_path)["rows"]
    assert [row["count"] for row in rows] == [1, 4, 16]
    assert [len(row["seconds"]) for row in rows] == [2, 2, 1]
    state = rows[0]["state_bytes"]
    assert state > 0
    for row in rows:
        assert row["state_bytes"] == state
        assert row["tokens_per_second"] == pytest.approx(16 * row["count"] / row["median_seconds"])
        assert row["expected_more_bytes"] == (row["count"] - 1) * (state + 256)
        assert row["of_first"] > 0
    assert "states and text" in capsys.readouterr().out


def test_generate_measures_all_contenders(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(generate, "run_contest", run_without_processes)
    sizes = "--contexts 48 --batches 2 --read 32 --read-ours 96 --prefill 40 --steps 2".split()
    record = run("generate", [*MODEL, *sizes], tmp_path)
    rows = {row["contender"]: row for row in record["rows"]}
    assert set(rows) == {"minrnn", *generate.PEERS}
    assert {name for name, row in rows.items() if "reason" not in row} >= {
        "minrnn",
        "llama",
        "mamba2",
        "xlstm",
        "gru",
    }
    for name, row in rows.items():
        assert "reason" in row or row["prefill_tokens_per_second"] > 0, name
    assert rows["minrnn"]["context_read"] == 48
    assert rows["gru"]["context_read"] == 16
    assert rows["llama"]["state_bytes"] > rows["minrnn"]["state_bytes"]
    check_ceilings(record)


def test_generate_reports_a_cache_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(generate, "run_contest", run_without_processes)
    sizes = "--contexts 1e12 --batches 1 --read 8 --read-ours 8 --steps 1 --peers llama".split()
    ours, llama = run("generate", [*MODEL, *sizes], tmp_path)["rows"]
    assert ours["context_read"] == 8
    assert "keys and values of 1,000,000,000,000 tokens need" in llama["reason"]


@pytest.mark.parametrize("workers", ["0", pytest.param("0,1", marks=pytest.mark.slow)])
def test_data(workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both tokenizers on the corpus's own documents. A worker takes seconds to start."""
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_texts, "VOCABULARY", 400)
    original = data_texts.corpus_texts
    monkeypatch.setattr(
        data_texts, "corpus_texts", lambda corpus, _: itertools.islice(original(corpus, 1), 30)
    )
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text("It was the best of times.\n" * 100)
    shape = ["--lanes", "2", "--chunk", "64", "--tokens", "256", "--window", "4", "--workers", workers]
    options = ["--corpus", str(corpus), "--documents", "own", "--steps", "0"]
    record = run("data", [*MODEL, *shape, *options], tmp_path / "out")
    demand, *rows = record["rows"]
    assert demand["contender"] == "training step"
    ours = [f"{name}, {count} worker(s)" for name in ("minrnn", "prepared") for count in workers.split(",")]
    assert [(row["tokenizer"], row["documents"], row["contender"]) for row in rows] == [
        (tokenizer, "own", contender)
        for tokenizer, limit in (("bytes", "raw read"), ("bpe", "encode_batch"))
        for contender in (*ours, limit, "datasets")
    ]
    for row in rows:
        assert all(row[key] > 0 for key in ("tokens_per_second", "of_limit", "of_datasets", "of_demand"))
    assert list((tmp_path / "cache").glob("bench-bpe-400-*"))


@pytest.mark.parametrize(("documents", "length"), [("short", 1000), ("long", 1_000_000)])
def test_documents_of_a_length_are_the_text_of_the_corpus(documents: str, length: int, tmp_path: Path):
    text = "It was the best of times.\n" * 100_000
    (tmp_path / "a.txt").write_text(text)
    texts = data_texts.texts_of(str(tmp_path / "a.txt"), documents, 1)
    assert "".join(texts) == text
    assert all(length <= len(part) < length + 30 for part in texts[:-1])


@pytest.mark.slow
def test_the_quickstarts_waiting(tmp_path: Path):
    options = ["--tokenizers", "none", "--steps", "10"]
    demand, waiting = run("data", [*MODEL, *options], tmp_path)["rows"]
    assert demand["contender"] == "training step"
    assert len(waiting["seconds"]) == 2
    assert 0 <= waiting["waiting"] < 1


@pytest.mark.parametrize(
    ("arguments", "expected_error"),
    [
        (["bench", "scn"], "error: bench scn: unknown bench (did you mean scan?)"),
        (["bench", "train", "--peers", "lama"], "error: --peers: there is no 'lama' (did you mean llama?)"),
        (["bench", "train", "--lengths", "0"], "error: --lengths: '0' is not a whole number of at least 1"),
        (["bench", "train", "--limit", "inf"], "error: --limit: must be a number of at least 0, not inf"),
        (
            ["bench", "train", "--params", "many"],
            "error: --params: 'many' is not a number such as 10.7M or 350000000",
        ),
        (
            ["bench", "train", "--params", "1000"],
            "error: --params: no minrnn of 6 layers has 1,000 parameters within 2%",
        ),
        (
            ["bench", "scan", "--device", "cuda"],
            "error: --device: there is no cuda device here; use cpu, or auto",
        ),
        (["bench", "scan", "--shapes", "8x16"], "error: --shapes: '8x16' is not BATCHxTIMExWIDTH"),
        (["bench", "generate", "--cuda-graphs"], "error: --cuda-graphs: is for --device cuda"),
        (["bench", "data", "--steps", "0", "--out", "x.txt"], "error: --out: x.txt must end in .json"),
    ],
)
def test_user_errors_end_with_status_two_and_one_line_each(
    arguments: list[str], expected_error: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # should one of them be taken for good
    with pytest.raises(SystemExit) as raised:
        minrnn(arguments)
    assert raised.value.code == 2
    assert expected_error in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["scan", "train", "generate", "data"])
def test_help_has_examples(kind: str, capsys):
    with pytest.raises(SystemExit) as raised:
        main([kind, "--help"])
    assert raised.value.code == 0
    assert f"minrnn bench {kind}" in capsys.readouterr().out.split("examples:")[1]


def test_help_lists_the_benches(capsys):
    main([])
    assert {"scan", "train", "generate", "data"} <= set(capsys.readouterr().out.split())


def test_the_default_file_is_named_after_bench_and_device(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_bench(
        "scan",
        [
            "--shapes",
            "1x4x4",
            "--dtypes",
            "fp32",
            "--lengths",
            "none",
            "--layers",
            "none",
            "--peers",
            "none",
            *QUICK,
        ],
    )
    assert (tmp_path / "evals/results/bench-scan-cpu.json").exists()
