"""Losses on a long document equal those of plain forward passes; documents are found by name, errors are
reported.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minrnn.data import byte_tokenizer
from minrnn.evals.long_context import rolling
from minrnn.evals.long_context.documents import document_encoder
from minrnn.evals.long_context.positions import (
    BLOCK,
    NUM_TARGETS,
    bucket_edges,
    bucket_losses,
    byte_counter,
    mean_and_error,
    memory_contexts,
    memory_curve,
    pieces,
    token_nats,
)
from minrnn.launch.cli import main
from minrnn.models import MinRNNConfig, MinRNNForCausalLM
from minrnn.pipeline.export import export_model
from minrnn.pipeline.recipe import build_recipe, resolved_config

TOKENIZER = byte_tokenizer()
ENCODER = document_encoder(TOKENIZER)
LETTERS = np.random.default_rng(0).choice(list("ab c\né"), 700)
TEXT = "".join(LETTERS)
TOKENS = ENCODER(TEXT)


def tiny_model(num_layers: int = 2) -> MinRNNForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": num_layers,
        "intermediate_size": 24,
        "tie_word_embeddings": False,
    }
    tokens = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = MinRNNForCausalLM(MinRNNConfig(vocab_size=264, **sizes, **tokens)).eval()
    nn.Module.to(model, torch.float64)
    return model


MODEL = tiny_model()


@torch.no_grad()
def forward_nats(model: MinRNNForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Nats of each token but the first, from one forward pass."""
    ids = torch.tensor(tokens[None].astype(np.int64))
    logs = model(ids[:, :-1]).logits.log_softmax(-1)
    return -logs.gather(2, ids[:, 1:, None])[0, :, 0].numpy()


@given(length=st.integers(1, 3000), size=st.integers(1, 700))
def test_pieces_cover_a_document_and_end_at_powers_of_two(length: int, size: int):
    spans = list(pieces(length, size))
    assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]
    assert spans[-1][1] == length
    assert all(0 < last - first <= size for first, last in spans)
    ends = {last for _, last in spans}
    assert all(2**power in ends for power in range(12) if size <= 2**power <= length)


@settings(max_examples=12)
@given(
    piece=st.integers(1, 900),
    cuts=st.lists(st.sampled_from([None, 7, 64, 100, 5000]), min_size=1, max_size=3),
)
def test_carried_equals_one_forward_pass_and_cut_equals_separate_windows(piece: int, cuts: list[int | None]):
    positions: list[int] = []
    result = token_nats(MODEL, TOKENS, cuts, piece=max(piece, 20), on_progress=positions.append)
    assert result.shape == (len(cuts), len(TOKENS) - 1)
    assert positions[0] == 0
    assert positions[-1] == len(TOKENS) - 1
    for cut, nats in zip(cuts, result, strict=True):
        size = cut or len(TOKENS)
        expected = [
            forward_nats(MODEL, TOKENS[first : first + size + 1]) for first in range(0, len(TOKENS) - 1, size)
        ]
        np.testing.assert_allclose(nats, np.concatenate(expected), rtol=1e-9, atol=1e-9)


def test_the_limit_of_logits_does_not_change_the_result(monkeypatch):
    whole = token_nats(MODEL, TOKENS)
    monkeypatch.setattr("minrnn.evals.long_context.positions.NUM_LOGITS", 264 * 50)
    np.testing.assert_allclose(token_nats(MODEL, TOKENS), whole, rtol=1e-12)


@given(num_tokens=st.integers(300, 5000), seed=st.integers(0, 3))
def test_buckets_add_up_to_the_whole(num_tokens: int, seed: int):
    rng = np.random.default_rng(seed)
    carried, cut = rng.random(num_tokens), {100: rng.random(num_tokens)}
    text = "".join(rng.choice(list("abé漢"), num_tokens))
    tokens = ENCODER(text)[: num_tokens + 1]
    num_bytes = byte_counter(ENCODER, tokens)
    rows = bucket_losses(carried, cut, num_bytes, bucket_edges(num_tokens))
    (whole,) = bucket_losses(carried, cut, num_bytes, [0, num_tokens])
    assert all(row["to"] == following["from"] for row, following in itertools.pairwise(rows))
    for key in ("tokens", "bytes"):
        assert sum(row[key] for row in rows) == whole[key]
    assert whole["bytes"] == num_tokens
    assert sum(row["tokens"] * row["carried"]["nats"] for row in rows) == pytest.approx(carried.sum())
    assert sum(row["tokens"] * row["cut"]["100"]["nats"] for row in rows) == pytest.approx(cut[100].sum())
    gains = [row["tokens"] * row["cut"]["100"]["carried_minus_cut"] for row in rows]
    assert sum(gains) == pytest.approx((carried - cut[100]).sum(), abs=1e-9)
    assert whole["carried"]["bits_per_byte"] == pytest.approx(carried.sum() / num_tokens / np.log(2))


def test_eos_counts_no_byte():
    assert byte_counter(ENCODER, TOKENS)(len(TOKENS) - 1) == len(TEXT.encode())
    assert byte_counter(ENCODER, TOKENS[:-1])(len(TOKENS) - 2) == len(TEXT.encode())


def test_standard_errors_account_for_correlated_neighbours():
    """If every block has one value, there are as many observations as blocks."""
    values = np.random.default_rng(0).standard_normal(64)
    mean, error = mean_and_error(np.repeat(values, BLOCK))
    assert (mean, error) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1) / 8))
    assert mean_and_error(values)[1] is None


def forgetful_model(conv_kernel: int) -> MinRNNForCausalLM:
    """One layer with zero decay: it only sees what the convolution reaches."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "tie_word_embeddings": False}
    model = MinRNNForCausalLM(
        MinRNNConfig(vocab_size=264, conv_kernel=conv_kernel, bos_token_id=256, eos_token_id=257, **sizes)
    ).eval()
    nn.Module.to(model, torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_bias"):
                parameter.fill_(1000.0)  # decay = sigmoid(-k)
    return model


@pytest.mark.parametrize("conv_kernel", [2, 4, 8])
@pytest.mark.parametrize("piece", [40, 8192])
def test_a_known_memory_length_is_measured(conv_kernel: int, piece: int):
    model = forgetful_model(conv_kernel)
    (carried,) = token_nats(model, TOKENS)
    positions: list[int] = []
    result = memory_curve(
        model,
        TOKENS,
        carried,
        num_anchors=12,
        budget=100_000,
        tolerance=1e-9,
        piece=piece,
        on_progress=positions.append,
    )
    above = {row["context"]: row["above_all"] for row in result["curve"]}
    assert list(above) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for context, difference in above.items():
        assert (abs(difference) < 1e-9) == (context >= conv_kernel)
    assert above[result["effective_memory_length"]] <= 1e-9
    assert result["effective_memory_length"] <= conv_kernel
    assert sum(positions) == result["tokens_read"] <= 100_000


def test_a_memory_longer_than_every_context():
    (carried,) = token_nats(MODEL, TOKENS)
    result = memory_curve(MODEL, TOKENS, carried - 1, num_anchors=5, budget=2000)
    assert result["effective_memory_length"] is None
    assert len(result["curve"]) < 9


def test_losses_after_a_context_equal_those_of_a_forward_pass():
    (carried,) = token_nats(MODEL, TOKENS)
    result = memory_curve(MODEL, TOKENS, carried, num_anchors=2, budget=100_000, piece=7)
    longest = result["curve"][-1]["context"]
    for row in result["curve"]:
        expected = []
        for anchor in (longest + NUM_TARGETS, len(TOKENS)):
            part = TOKENS[anchor - NUM_TARGETS - row["context"] : anchor]
            expected.append(forward_nats(MODEL, part)[-NUM_TARGETS:].mean())
        assert row["nats"] == pytest.approx(np.mean(expected), rel=1e-9)


@given(length=st.integers(2, 10_000), num_anchors=st.integers(1, 50), budget=st.integers(0, 10**6))
def test_contexts_keep_to_the_document_and_the_budget(length: int, num_anchors: int, budget: int):
    contexts = memory_contexts(length, num_anchors, budget)
    assert contexts == [2**power for power in range(len(contexts))]
    assert sum(num_anchors * (context + NUM_TARGETS) for context in contexts) <= budget
    assert all(2 * context <= length for context in contexts)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an export, beside a folder of texts."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("")
    export_model(
        tiny_model(), TOKENIZER, folder / "run" / "model", resolved_config(build_recipe({})), tokens=0
    )
    for package, count in (("alpha", 2), ("beta", 5)):
        (folder / "texts" / package).mkdir(parents=True)
        for number in range(count):
            (folder / "texts" / package / f"{number}.py").write_text(f"# {number}\n{TEXT}")
    return folder / "run"


def test_lm_eval_is_not_needed():
    code = "import sys; sys.modules['lm_eval'] = None; import minrnn.evals.long_context.command"
    subprocess.run([sys.executable, "-c", code], check=True)


def errors(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as raised:
        main(["long-context", *argv])
    assert raised.value.code == 2
    return capsys.readouterr().err


def test_the_command_writes_file_figure_and_tables(run: Path, capsys):
    texts = str(run.parent / "texts")
    main(
        [
            "long-context",
            str(run),
            "--corpus",
            texts,
            "--cuts",
            "64,1000,100000",
            "--device",
            "cpu",
            "--piece",
            "128",
            "--anchors",
            "8",
        ]
    )
    (file,) = (run / "evals").glob("long-context-*.json")
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(file.read_text())
    assert result["document"]["name"] == "beta/ (5 files)"
    whole = "".join(f"# {number}\n{TEXT}" + "\n" * (number < 4) for number in range(5))
    assert result["tokens"] == {
        "read": len(whole.encode()) + 1,
        "asked_for": 2**20,
        "whole_document": True,
        "piece": 128,
    }
    expected = forward_nats(
        MinRNNForCausalLM.from_pretrained(run / "model", dtype=torch.float64).eval(), ENCODER(whole)
    )
    assert result["overall"]["carried"]["bits_per_byte"] == pytest.approx(
        expected.sum() / len(whole.encode()) / np.log(2), rel=1e-5
    )
    assert list(result["overall"]["cut"]) == ["64", "1000"]
    assert [row["tokens"] for row in result["stages"]] == [
        128,
        256,
        512,
        1024,
        2048,
        4096,
        result["tokens"]["read"],
    ]
    assert {"command", "commit", "machine", "versions", "model", "buckets", "memory"} <= result.keys()
    out = capsys.readouterr().out
    assert "all of it (--tokens asks for 1,048,576)" in out
    assert "a cut every 100,000 tokens would leave it whole" in out
    assert "effective memory length" in out


def test_user_errors_are_reported(run: Path, tmp_path: Path, capsys):
    texts = str(run.parent / "texts")
    messages = errors(
        capsys, str(run), "--cuts", "64,x", "--tokens", "0", "--out", "here.txt", "--tolerance", "-1"
    )
    assert [line.split(":")[1].strip() for line in messages.splitlines()] == [
        "--tokens",
        "--out",
        "--cuts",
        "--tolerance",
    ]
    assert "error: --memory-tokens: must be at least 8448" in errors(
        capsys, str(run), "--memory-tokens", "100"
    )
    missing = tmp_path / "none" / "*.py"
    assert f"error: --corpus: there is no file, folder or match for {missing}" in errors(
        capsys, str(run), "--corpus", str(missing)
    )
    messages = errors(capsys, str(run), "--corpus", texts, "--document", "betta")
    assert "error: --document: no document's name holds 'betta' (did you mean 'beta/ (5 files)'?)" in messages
    assert "error: --join: " in errors(capsys, str(run), "--corpus", texts, "--join", "book_id")
    (tmp_path / "short.txt").write_text("short")
    assert "nothing can be said about fewer than 256" in errors(
        capsys, str(run), "--corpus", str(tmp_path / "short.txt")
    )
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    messages = errors(capsys, str(tmp_path / "unfinished"), "--corpus", texts)
    assert f"error: MODEL: the run {tmp_path / 'unfinished'} has no model/ yet; minrnn export" in messages


def test_lm_eval_gives_the_same_losses(run: Path, monkeypatch, capsys):
    """Carried: the nats with the state carried.

    In windows: the nats with the state reset, since the last window is complete.
    """
    texts, out = str(run.parent / "texts"), run.parent / "rolling.json"
    monkeypatch.setattr(rolling, "WINDOW", 100)
    rolling.main(
        [
            str(run),
            "--corpus",
            texts,
            "--document",
            "alpha",
            "--dtype",
            "fp64",
            "--device",
            "cpu",
            "--bytes",
            "1000",
            "--out",
            str(out),
        ]
    )
    result = json.loads(out.read_text())
    assert [row["part"] for row in result["rows"]] == ["1/16", "1/8", "1/4", "1/2", "all", "all, in windows"]
    model = MinRNNForCausalLM.from_pretrained(run / "model", dtype=torch.float64).eval()
    text = f"# 0\n{TEXT}\n# 1\n{TEXT}".encode()[:1000].decode(errors="ignore")
    assert len(text.encode()) == 1000, "a whole number of windows"
    carried, cut = token_nats(model, ENCODER(text)[:-1], (None, 100))
    for row in result["rows"][:-1]:
        assert row["tokens"] == row["bytes"]
        assert row["nats"] == pytest.approx(carried[: row["tokens"]].sum(), rel=1e-6)
    assert result["rows"][-1]["nats"] == pytest.approx(cut.sum(), rel=1e-6)
    difference = (carried.sum() - cut.sum()) / 1000 / np.log(2)
    assert result["carried_minus_windows_bits_per_byte"] == pytest.approx(difference, abs=1e-6)
    assert "carried minus windows: " in capsys.readouterr().out
