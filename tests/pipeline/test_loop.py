"""The training loop's results."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import Values, losses, plain_update

from minrnn.common.errors import NonFiniteError, UserError
from minrnn.data import BYTES, Batch, Chunk, ChunkLoader, CorpusSpec, Encoder, ReaderSpec, load_tokenizer
from minrnn.data.loader import Share, open_readers
from minrnn.models import MinRNNForCausalLM
from minrnn.pipeline import loop
from minrnn.pipeline.optim import build_optimizer
from minrnn.pipeline.recipe import build_recipe

Run = Callable[[Values], Path]


def test_losses_equal_those_of_a_plain_torch_loop(values: Values, run_recipe: Run):
    """Readers, accumulation, carried state, clipping and schedule, written out in plain torch."""
    values["train"] |= {"precision": "fp64", "steps": 6}
    values["model"]["dropout"] = 0.0
    folder = run_recipe(values)
    recipe = build_recipe(values)
    data, batch = recipe.data, recipe.batch
    encoder = Encoder.from_tokenizer(load_tokenizer(BYTES), BYTES)
    corpus = CorpusSpec(values["data"]["corpus"], held_out=data.validation_fraction)
    spec = ReaderSpec(corpus, "documents", encoder, 2, batch.lanes, batch.chunk, data.shuffle_window, 0)
    readers = open_readers(spec, Share([0, 1]), [None, None])
    torch.manual_seed(0)
    model = MinRNNForCausalLM(MinRNNForCausalLM.from_pretrained(folder / "model").config).double()
    optimizer = build_optimizer(model, recipe.optim)
    states, expected = [None, None], []
    for step in range(1, 7):
        chunks = [reader.next_chunk() for reader in readers]
        total = torch.zeros((), dtype=torch.float64)
        for i, chunk in enumerate(chunks):
            assert isinstance(chunk, Chunk)
            ids, labels, starts = (
                torch.from_numpy(x) for x in (chunk.input_ids, chunk.shift_labels, chunk.document_starts)
            )
            output = model(ids, document_starts=starts, past_key_values=states[i], use_cache=True)
            states[i] = output.past_key_values.detach_()
            total = (
                total
                + torch.nn.functional.cross_entropy(
                    output.logits.flatten(0, 1), labels.flatten(), reduction="mean"
                )
                / 2
            )
        plain_update(model, optimizer, total, recipe, step)
        expected.append((step, total.item()))
    np.testing.assert_allclose(losses(folder), expected, rtol=1e-9)


def test_recomputation_and_workers_do_not_change_losses(values: Values, run_recipe: Run, tmp_path: Path):
    plain = losses(run_recipe(values))
    values["run"]["dir"] = str(tmp_path / "other")
    values["train"]["recompute"] = "selective"
    values["data"]["workers"] = 2
    assert losses(run_recipe(values)) == plain


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(values: Values, run_recipe: Run, tmp_path: Path):
    values["train"]["precision"] = "bf16"
    values["model"]["dropout"] = 0.0  # compiled code draws other dropout masks
    plain = losses(run_recipe(values))
    values["run"]["dir"] = str(tmp_path / "compiled")
    values["train"]["compile"] = True
    np.testing.assert_allclose(losses(run_recipe(values)), plain, rtol=1e-3)  # bf16 is rounded elsewhere


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_stay_close_to_fp64(values: Values, run_recipe: Run, precision: str, tmp_path: Path):
    values["model"]["dropout"] = 0.0
    results = {}
    for name in ("fp64", precision):
        values["run"]["dir"], values["train"]["precision"] = str(tmp_path / name), name
        results[name] = [loss for _, loss in losses(run_recipe(values))]
    np.testing.assert_allclose(
        results[precision], results["fp64"], rtol={"fp32": 1e-5, "bf16": 2e-2}[precision]
    )


def test_validation_is_the_loss_of_whole_documents(values: Values, run_recipe: Run):
    """The exported model gives the reported loss, reading each held-out document alone."""
    values["data"]["validation_tokens"] = None
    folder = run_recipe(values)
    model = MinRNNForCausalLM.from_pretrained(folder / "model").eval()
    spec = CorpusSpec(values["data"]["corpus"], held_out=0.1)
    from minrnn.data import DocumentStream

    encoder = Encoder.from_tokenizer(load_tokenizer(BYTES), BYTES)
    nats, tokens, num_bytes = 0.0, 0, 0
    for record in DocumentStream(spec, "validation", 0, 1, 64, None).one_epoch():
        assert record.text is not None
        ids = torch.from_numpy(encoder(record.text).astype(np.int64)).unsqueeze(0)
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
        nats += torch.nn.functional.cross_entropy(logits[0].double(), ids[0, 1:], reduction="sum").item()
        tokens, num_bytes = tokens + ids.shape[1] - 1, num_bytes + len(record.text.encode())
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "validation"
    assert last["validation_tokens"] == tokens
    assert last["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert last["bits_per_byte"] == pytest.approx(nats / num_bytes / np.log(2), rel=1e-5)


def test_a_non_finite_loss_stops_before_anything_is_saved(values: Values, run_recipe: Run, monkeypatch):
    values["train"]["save_every"] = 1
    original, calls = MinRNNForCausalLM.forward, []

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if kwargs.get("num_items_in_batch", 1) != 1:  # training, not validation
            calls.append(1)
            if len(calls) == 10:  # step 5, second reader
                assert output.loss is not None
                output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(MinRNNForCausalLM, "forward", forward)
    with pytest.raises(
        NonFiniteError, match=r"step 5: .*reader 1: .*words\.jsonl:\d+.*step-000004, is as it was"
    ):
        run_recipe(values)
    folder = Path(values["run"]["dir"])
    assert (folder / "checkpoints" / "step-000004" / "manifest.json").exists()
    assert not (folder / "checkpoints" / "step-000005").exists()
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]


def test_warm_start_takes_the_weights_of_an_export(values: Values, run_recipe: Run, tmp_path: Path):
    first = run_recipe(values)
    final = losses(first, "validation")[-1][1]
    values["run"]["dir"], values["model"]["init_from"] = str(tmp_path / "second"), str(first / "model")
    values["optim"]["lr"] = 1e-12
    second = run_recipe(values)
    assert losses(second, "validation")[0][1] == pytest.approx(final, rel=1e-6)
    values["run"]["dir"] = str(tmp_path / "third")
    values["model"]["hidden_size"] = 24
    with pytest.raises(UserError, match=r"model\.hidden_size: is 24, but .* has 16"):
        run_recipe(values)
    del values["model"]["hidden_size"]
    values["model"] |= {"hidden_size": 16, "output_norm": True, "attention_every": 2}
    with pytest.raises(
        UserError, match=r"model\.output_norm: is True, (.|\n)*model\.attention_every: is 2, "
    ):
        run_recipe(values)


def test_a_run_writes_the_files_that_the_readme_lists(values: Values, run_recipe: Run):
    folder = run_recipe(values)
    assert {"config.yaml", "metrics.jsonl", "loss.png", "samples.txt", "checkpoints", "model"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-000008",
        "step-000012",
    ]
    entry = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert {
        "kind",
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "matmul_fraction",
        "data_seconds",
    } <= entry.keys()
    assert entry["tokens"] == 2 * 2 * 24


def test_broken_documents_stop_a_run_or_are_counted(
    values: Values, run_recipe: Run, corpus: Path, tmp_path: Path
):
    path = tmp_path / "broken.jsonl"
    lines = corpus.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], "{no json", *lines[20:40], '{"txt": ""}', *lines[40:]]))
    values["data"]["corpus"] = str(path)
    with pytest.raises(UserError, match=r"broken\.jsonl:21 is not JSON.*data\.skip_broken"):
        run_recipe(values)
    values["data"] |= {"skip_broken": True, "shuffle_window": 1000}
    entries = [json.loads(line) for line in (run_recipe(values) / "metrics.jsonl").read_text().splitlines()]
    assert entries[0]["documents_skipped"] == 2


def test_readers_that_processes_cannot_share(values: Values, run_recipe: Run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"batch\.readers: 2 readers cannot be shared evenly by 3"):
        run_recipe(values)


def stall(monkeypatch: pytest.MonkeyPatch, after: int, then: Callable[[], object]) -> None:
    """A loader that has no more chunks after some steps, and what happens while the loop waits."""
    take, count = ChunkLoader.take, itertools.count(1)

    def stalled(self: ChunkLoader, timeout: float | None = None) -> list[Batch] | None:
        if next(count) <= after:
            return take(self)
        assert timeout is not None
        then()
        return None

    monkeypatch.setattr(ChunkLoader, "take", stalled)


def test_a_signal_ends_a_run_that_waits_for_data(
    values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = losses(run_recipe({**values, "run": {"dir": values["run"]["dir"] + "-undisturbed"}}))
    with monkeypatch.context() as patched:
        stall(patched, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as exit_info:
            run_recipe(values)
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert [path.name for path in (Path(values["run"]["dir"]) / "checkpoints").glob("step-000005")]
    assert losses(run_recipe(values)) == undisturbed


def test_a_process_without_data_stops_at_another_process_s_signal(
    values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch
):
    """It keeps exchanging its state. Another process, which has its data, reports a signal."""
    rounds = []
    stall(monkeypatch, 3, lambda: rounds.append(1))
    original = loop.processes.all_reduce_sum

    def with_another(accelerator, counts):
        others = [0, 0, len(rounds) == 4, 0, 0, 0] if len(counts) == 6 else [0] * len(counts)
        return [a + b for a, b in zip(original(accelerator, counts), others, strict=True)]

    monkeypatch.setattr(loop.processes, "all_reduce_sum", with_another)
    with pytest.raises(SystemExit) as exit_info:
        run_recipe(values)
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert len(rounds) == 4
