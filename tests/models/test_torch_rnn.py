"""nn.GRU and nn.LSTM as language models: cuts, document starts and padding are exact, exports load."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, assert_close, generate, generator, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from test_remote_code import GENERATE, HIDE_PACKAGES, NUM_TOKENS, PROMPTS, finish, start
from torch import Tensor
from transformers import AutoModelForCausalLM

from minrnn.data import byte_tokenizer
from minrnn.models import TorchRNNConfig, TorchRNNForCausalLM
from minrnn.models.context_parallel import ContextGroup, use_context_parallel
from minrnn.models.decoding import TokenStep, prefill

CELLS = ("gru", "lstm")
TIME = 12


def new_model(cell: str, **fields) -> TorchRNNForCausalLM:
    torch.manual_seed(0)
    config = TorchRNNConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, cell=cell, **fields)
    model = TorchRNNForCausalLM(config).eval()
    torch.nn.Module.to(model, torch.float64)
    return model


MODELS = {cell: new_model(cell) for cell in CELLS}


def by_document(model: TorchRNNForCausalLM, ids: Tensor, starts: Tensor) -> Tensor:
    """Logits of each document, read alone."""
    logits = []
    for row, row_starts in zip(ids, starts, strict=True):
        edges = [0, *(t for t in range(1, TIME) if row_starts[t]), TIME]
        parts = [row[None, first:last] for first, last in itertools.pairwise(edges)]
        logits.append(torch.cat([model(part).logits[0] for part in parts]))
    return torch.stack(logits)


@settings(max_examples=25)
@given(cell=st.sampled_from(CELLS), density=st.sampled_from([0.0, 0.1, 0.4, 1.0]), seed=st.integers(0, 99))
def test_packed_documents_equal_separate_ones(cell: str, density: float, seed: int):
    model, ids = MODELS[cell], random_ids(3, TIME, seed)
    starts = torch.rand(3, TIME, generator=generator(seed)) < density
    results = []
    for compute in (
        lambda: model(ids, document_starts=starts).logits,
        lambda: by_document(model, ids, starts),
    ):
        model.zero_grad()
        logits = compute()
        (logits * torch.randn(logits.shape, generator=generator(seed))).sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    for value, expected in zip(*results, strict=True):
        assert_close(value, expected, atol=1e-12)


@settings(max_examples=25)
@given(
    cell=st.sampled_from(CELLS), cut=st.integers(1, TIME - 1), seed=st.integers(0, 99), starts=st.booleans()
)
def test_a_cut_changes_nothing(cell: str, cut: int, seed: int, starts: bool):
    """Neither the logits nor the gradient, which goes through the state."""
    model, ids = MODELS[cell], random_ids(2, TIME, seed)
    begins = torch.rand(2, TIME, generator=generator(seed)) < 0.2 if starts else torch.zeros(2, TIME) > 0
    whole = model(ids, document_starts=begins, use_cache=True)
    first = model(ids[:, :cut], document_starts=begins[:, :cut], use_cache=True)
    second = model(
        ids[:, cut:],
        document_starts=begins[:, cut:] if starts else None,
        past_key_values=first.past_key_values,
        use_cache=True,
    )
    assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, atol=1e-12)
    for layer, expected in zip(second.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert_close(layer.recurrent, expected.recurrent, atol=1e-12)
    gradients = []
    for logits in (whole.logits[:, -1], second.logits[:, -1]):
        model.zero_grad()
        logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for value, expected in zip(*gradients, strict=True):
        assert_close(value, expected, atol=1e-12)


@settings(max_examples=25)
@given(
    cell=st.sampled_from(CELLS), seed=st.integers(0, 99), lengths=st.lists(st.integers(0, TIME), min_size=3)
)
def test_padding_changes_nothing(cell: str, seed: int, lengths: list[int]):
    """On either side of a row, also of rows that are padding only; the state is that after the last token."""
    model, ids = MODELS[cell], random_ids(3, TIME, seed)
    mask = torch.arange(TIME) < torch.tensor(lengths[:3]).unsqueeze(1)
    mask = torch.where(torch.rand(3, 1, generator=generator(seed)) < 0.5, mask, mask.flip(1))
    state = model(random_ids(3, 2, seed), use_cache=True).past_key_values
    before = [layer.recurrent for layer in state.layers]
    output = model(ids, attention_mask=mask.long(), past_key_values=state, use_cache=True)
    for row in range(3):
        state = model(random_ids(3, 2, seed)[row : row + 1], use_cache=True).past_key_values
        if not mask[row].any():
            for layer, expected in zip(output.past_key_values.layers, before, strict=True):
                assert_close(layer.recurrent[row], expected[row], atol=1e-12)
            continue
        alone = model(ids[row, mask[row]][None], past_key_values=state, use_cache=True)
        assert_close(output.logits[row, mask[row]], alone.logits[0], atol=1e-12)
        for layer, expected in zip(output.past_key_values.layers, alone.past_key_values.layers, strict=True):
            assert_close(layer.recurrent[row], expected.recurrent[0], atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_token_by_token(cell: str):
    model, ids = MODELS[cell], random_ids(2, TIME)
    with torch.no_grad():
        logits, cache = prefill(model, ids[:, :5], piece=2)
        step, steps = TokenStep(model, cache), [logits]
        steps += [step(token) for token in ids[:, 5:].T]
        assert_close(torch.stack(steps, 1), model(ids).logits[:, 4:], atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_an_export_carries_its_code(cell: str, tmp_path: Path):
    model, ids = MODELS[cell], random_ids(2, 5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert isinstance(loaded, TorchRNNForCausalLM)
    assert {"modeling_torch_rnn.py", "modeling_minrnn.py"} <= {path.name for path in tmp_path.iterdir()}
    assert torch.equal(generate(loaded, ids), generate(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_an_export_loads_without_the_package(cell: str, tmp_path: Path):
    """The same text alone and in a left-padded batch, without minrnn, numba and triton."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = TorchRNNConfig(
        hidden_size=16,
        num_hidden_layers=2,
        cell=cell,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, folder = TorchRNNForCausalLM(config).eval(), tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hidden = json.dumps(["minrnn", "numba", "llvmlite", "triton"])
    arguments = (str(folder), hidden, json.dumps(PROMPTS), str(NUM_TOKENS))
    result = finish(start(HIDE_PACKAGES + GENERATE, tmp_path / "home", *arguments))
    prompts = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    expected = [generate(model, ids, NUM_TOKENS)[0, ids.shape[1] :].tolist() for ids in prompts]
    assert result["alone"] == result["batched"] == expected


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_bf16_is_near_fp64(cell: str, is_autocast: bool):
    """With padding, a document start and a carried state, which stays fp32."""
    ids, starts, mask = random_ids(2, TIME), torch.zeros(2, TIME, dtype=torch.bool), torch.ones(2, TIME)
    starts[0, 5], mask[1, :3] = True, 0
    model, outputs, state = new_model(cell), [], None
    for dtype in (torch.float64, torch.float32 if is_autocast else torch.bfloat16):
        torch.nn.Module.to(model, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast and dtype == torch.float32):
            state = model(ids, use_cache=True).past_key_values
            output = model(ids, document_starts=starts, attention_mask=mask, past_key_values=state)
        outputs.append(output.logits[mask.bool()])
        output.logits.float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model.zero_grad()
    assert state is not None
    assert state.layers[0].recurrent.dtype == torch.float32
    assert_close(outputs[1], outputs[0], atol=0.03)


@pytest.mark.parametrize("cell", CELLS)
def test_what_torch_s_module_does_not_give_is_refused(cell: str):
    model, ids = new_model(cell), random_ids(2, 5)
    message = f"output_hidden_states: torch's nn.{cell.upper()} returns its last layer only"
    with pytest.raises(ValueError, match=message):
        model(ids, output_hidden_states=True)
    assert model(ids, output_hidden_states=False).hidden_states is None
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="TorchRNNForCausalLM has no MinRNNMixer"):
        use_context_parallel(model, ContextGroup(None, 0, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"argument 'docment_starts' \(did you mean document_starts"):
        model.model(ids, docment_starts=None)


@pytest.mark.parametrize("cell", CELLS)
def test_a_device_map_keeps_the_layers_together(cell: str, tmp_path: Path):
    """They are one module of torch. There is no memory for it, so each call reads it from the disk."""
    model, ids = new_model(cell), random_ids(2, 5)
    model.save_pretrained(tmp_path)
    options = {"device_map": "auto", "max_memory": {"cpu": "1KB", "disk": "1GB"}, "dtype": torch.float64}
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, **options, offload_folder=tmp_path / "disk")
    assert all(parameter.is_meta for parameter in loaded.model.rnn.parameters())
    assert_close(loaded(ids).logits, model(ids).logits, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_layers_are_initialised_as_torch_does(cell: str):
    """Uniform within hidden_size ** -0.5."""
    weights = torch.cat(
        [parameter.detach().flatten() for parameter in new_model(cell).model.rnn.parameters()]
    )
    assert weights.abs().max() <= 8**-0.5
    assert weights.std() == pytest.approx(8**-0.5 / 3**0.5, rel=0.1)


def test_errors_name_every_wrong_field():
    with pytest.raises(ValueError, match=r"cell: 'rnn' is none of gru, lstm; hidden_size: must be positive"):
        TorchRNNConfig(cell="rnn", hidden_size=0)
