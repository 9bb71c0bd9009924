"""batch.backprop_chunks: a step is one pass over several chunks, on every engine and after every stop."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import Crash, Values, losses, plain_update, recipe_file
from test_engines import ddp, launch, reader_positions, zero
from test_micro_lanes import assert_same_run

from minrnn.common.errors import UserError
from minrnn.data import BYTES, CorpusSpec, DocumentReader, Encoder, ReaderSpec, load_tokenizer
from minrnn.models import MinRNNCache, MinRNNForCausalLM
from minrnn.pipeline.launch_checks import check_launch
from minrnn.pipeline.optim import build_optimizer
from minrnn.pipeline.recipe import build_recipe

Run = Callable[[Values], Path]


@pytest.fixture
def values(values: Values) -> Values:
    """Steps of three chunks."""
    values["batch"] |= {"chunk": 8, "backprop_chunks": 3}
    values["model"]["dropout"] = 0.0
    values["train"] |= {"precision": "fp64", "steps": 4, "save_every": 2, "eval_every": None}
    return values


def open_readers(values: Values, tokenizer: Any) -> list[DocumentReader]:
    """The readers of a run, which read one chunk at a time."""
    data, batch = build_recipe(values).data, build_recipe(values).batch
    encoder = Encoder.from_tokenizer(tokenizer, BYTES)
    corpus = CorpusSpec(str(data.corpus), held_out=data.validation_fraction)
    sizes = (batch.readers, batch.lanes, batch.chunk, data.shuffle_window, 0)
    return [DocumentReader(ReaderSpec(corpus, "documents", encoder, *sizes), i) for i in range(batch.readers)]


def one_pass(model: Any, reader: DocumentReader, state: Any, num_chunks: int) -> tuple[torch.Tensor, Any]:
    """The summed loss of a reader's next chunks, read as one text, and the state after them."""
    chunks = [reader.next_chunk() for _ in range(num_chunks)]
    ids, labels, starts = (
        torch.from_numpy(np.concatenate([getattr(chunk, name) for chunk in chunks], axis=1))
        for name in ("input_ids", "shift_labels", "document_starts")
    )
    output = model(ids, document_starts=starts, past_key_values=state, use_cache=True)
    logits = output.logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    return loss, output.past_key_values.detach_()


def test_a_step_is_one_pass_over_its_chunks(values: Values, run_recipe: Run):
    """Losses and gradient norms of a plain torch loop, which reads the chunks of each lane as one text."""
    folder, tokenizer, recipe = run_recipe(values), load_tokenizer(BYTES), build_recipe(values)
    readers, states, expected = open_readers(values, tokenizer), [None, None], []
    torch.manual_seed(0)
    model = MinRNNForCausalLM(MinRNNForCausalLM.from_pretrained(folder / "model").config).double()
    optimizer = build_optimizer(model, recipe.optim)
    for step in range(1, 5):
        total = torch.zeros((), dtype=torch.float64)
        for i, reader in enumerate(readers):
            loss, states[i] = one_pass(model, reader, states[i], 3)
            total = total + loss / recipe.batch.tokens_per_step
        plain_update(model, optimizer, total, recipe, step)
        expected.append((step, total.item()))
    np.testing.assert_allclose(losses(folder), expected, rtol=1e-9)
    positions = reader_positions(folder)
    assert [positions[name] for name in sorted(positions)] == [reader.state() for reader in readers]


def test_lanes_may_be_computed_a_few_at_a_time(values: Values, run_recipe: Run, tmp_path: Path):
    """Each group of lanes goes through all chunks; losses, weights and carried states are the same."""
    whole = run_recipe(values)
    values["run"]["dir"], values["train"]["micro_lanes"] = str(tmp_path / "one lane"), 1
    assert_same_run(run_recipe(values), whole, 1e-10)


@contextlib.contextmanager
def a_crash_in_chunk(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """A kill at a training pass of the model."""
    original, calls = MinRNNForCausalLM.forward, []

    def forward(self: MinRNNForCausalLM, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise Crash
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched, contextlib.suppress(Crash):
        patched.setattr(MinRNNForCausalLM, "forward", forward)
        yield
        raise AssertionError("the run went on")


def test_a_run_that_was_killed_inside_a_step_goes_on_to_the_bit(
    values: Values, run_recipe: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """With dropout, in fp32. A step of two readers is ten passes; the kill is in the fourth step."""
    values["model"]["dropout"], values["train"]["precision"] = 0.2, "fp32"
    undisturbed = run_recipe({**values, "run": {"dir": str(tmp_path / "undisturbed")}})
    with a_crash_in_chunk(monkeypatch, 34):
        run_recipe(values)
    folder = run_recipe(values)
    assert losses(folder) == losses(undisturbed)
    assert reader_positions(folder) == reader_positions(undisturbed)
    assert (folder / "model" / "model.safetensors").read_bytes() == (
        undisturbed / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"order": "windows"}}, "the crops of data.order windows are not consecutive"),
        ({"batch": {"carry_state": False}}, "batch.carry_state false cuts the gradients at each chunk"),
        ({"data": {"corpus": "synthetic/parity"}}, "synthetic/parity has whole examples"),
        ({"data": {"corpus": "lra/listops"}}, "lra/listops has whole examples"),
        ({"model": {"family": "llama"}}, "llama has no state to carry from chunk to chunk"),
    ],
)
def test_what_chunks_cannot_be_joined_for(changes: dict[str, dict[str, Any]], reason: str):
    values = {**changes, "batch": {"backprop_chunks": 4, **changes.get("batch", {})}}
    with pytest.raises(UserError) as raised:
        build_recipe(values)
    line = f"error: batch.backprop_chunks: 4 chunks cannot be joined: {reason}"
    assert sum(error.startswith(line) for error in str(raised.value).splitlines()) == 1
    assert build_recipe({**values, "batch": {**values["batch"], "backprop_chunks": 1}})


def test_a_corpus_shorter_than_a_step(values: Values, run_recipe: Run):
    values["batch"]["backprop_chunks"] = 10_000
    with pytest.raises(UserError, match=r"fewer than 10000 chunks of 2 lanes x 8; lower .*backprop_chunks"):
        run_recipe(values)


def test_the_torch_rnns_carry_their_state(values: Values):
    assert build_recipe({**values, "model": {"family": "gru"}}).batch.backprop_chunks == 3


def test_the_forecast_counts_what_is_computed_twice(values: Values):
    """Three chunks take (3 + 2 / 3) passes; validation takes one."""
    from test_forecast import Steps

    values["batch"] |= {"readers": 1, "lanes": 2, "chunk": 50}
    values["train"] |= {"steps": 100, "eval_every": None}
    run = Steps(values, num_positions=1100 * 3)  # eleven steps' positions: three steps' work
    assert run.take(5, 5) == ["step 5: about 3 min to go (95 steps, 1 validation)"]
    assert run.recipe.batch.forward_passes == pytest.approx(2 - 1 / 3)


@pytest.mark.parametrize("source", ["launcher", "file"])
def test_selective_recomputation_under_zero3_is_refused(
    values: Values, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    if source == "file":
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero3.json"))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    values["train"] |= {"precision": "fp32", "recompute": "selective"}
    with pytest.raises(UserError, match=r"train\.recompute: selective does not work with .*under ZeRO-3"):
        check_launch(build_recipe(values))
    values["batch"]["backprop_chunks"] = 1
    check_launch(build_recipe(values))


@pytest.mark.slow
@pytest.mark.xdist_group("launcher")
def test_engines_and_layouts_give_the_same_steps(values: Values, run_recipe: Run, tmp_path: Path):
    """DDP, a shared sequence and ZeRO in two processes, and one process, in fp32."""
    values["train"] |= {"precision": "fp32", "steps": 4, "sample_tokens": 0}
    single, recipe = run_recipe(values), recipe_file(values, tmp_path)
    launches = {
        "ddp": (ddp(2), []),
        "context": (ddp(2), ["--parallel.context", "2"]),
        "zero2": (zero(2), []),
        "zero3": (zero(3), []),
    }
    for name, (launcher, options) in launches.items():
        folder = tmp_path / name
        result = launch(launcher, recipe, "--run.dir", str(folder), *options)
        assert result.returncode == 0, (name, result.stderr[-3000:])
        for kind in ("train", "validation"):
            np.testing.assert_allclose(losses(folder, kind), losses(single, kind), rtol=0, atol=1e-5)
        assert reader_positions(folder) == reader_positions(single)


def test_states_are_those_of_the_last_chunk(values: Values, run_recipe: Run):
    """The carried state in a checkpoint has read all chunks of all steps."""
    from minrnn.pipeline.checkpoint import checkpoint_paths, load_reader

    newest = checkpoint_paths(run_recipe(values) / "checkpoints")[0]
    cache = load_reader(newest, 0, 2, torch.device("cpu")).cache
    assert isinstance(cache, MinRNNCache)
    assert cache.get_seq_length() == 4 * 3 * 8
