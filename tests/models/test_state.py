"""The state as an object: it can be saved, copied and rearranged by other libraries, or raises an error."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import (
    assert_close,
    generate,
    generate_with_state,
    logits_of,
    new_model,
    random_ids,
    shared_model,
)
from safetensors.torch import load, save
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from minrnn.models import MinRNNCache, MinRNNForCausalLM


def model_of(**fields) -> MinRNNForCausalLM:
    return shared_model(dtype=torch.float64, tie_word_embeddings=False, **fields)


def state_after(model: MinRNNForCausalLM, ids: Tensor) -> MinRNNCache:
    state = MinRNNCache(model.config.num_hidden_layers)
    logits_of(model, ids, past_key_values=state, use_cache=True)
    return state


def through_torch(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def loaded(state: dict[str, Tensor]) -> MinRNNCache:
    return MinRNNCache(2).load_state_dict(state)


def moved_to_another_device_and_back(state: MinRNNCache) -> MinRNNCache:
    for layer in state.layers:
        layer.offload()
        layer.prefetch()
    return state


ROUND_TRIPS: dict[str, Callable[[MinRNNCache], MinRNNCache]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "torch.save": through_torch,
    "torch.save, mapped": lambda state: through_torch(state, map_location="cpu"),
    "torch.save of the state_dict": lambda state: loaded(through_torch(state.state_dict())),
    "safetensors": lambda state: loaded(load(save(state.state_dict()))),
    "offload": moved_to_another_device_and_back,
}


@pytest.mark.parametrize("trip", ROUND_TRIPS)
@pytest.mark.parametrize("kernel", [0, 4])
def test_a_saved_state_continues(trip, kernel):
    """Logits of later tokens, the number of tokens, generate(), and beam search continue from it."""
    model, ids, more = model_of(conv_kernel=kernel), random_ids(2, 6), random_ids(2, 4, seed=1)
    state = state_after(model, ids)
    other = ROUND_TRIPS[trip](copy.deepcopy(state))
    assert other.get_seq_length() == 6
    assert other.has_previous_state()
    text = torch.cat([ids, more], dim=1)
    expected = generate(model, text, 6)
    assert torch.equal(generate(model, text, 6, past_key_values=copy.deepcopy(other)), expected)
    beams = copy.deepcopy(other)
    beams.batch_repeat_interleave(2)
    assert torch.equal(
        generate(model, text, 6, past_key_values=beams, num_beams=2), generate(model, text, 6, num_beams=2)
    )
    assert torch.equal(
        logits_of(model, more, past_key_values=other, use_cache=True),
        logits_of(model, more, past_key_values=state, use_cache=True),
    )
    assert other.get_seq_length() == 10


@pytest.mark.parametrize("kernel", [0, 4])
def test_rows_that_were_rearranged_keep_their_count(kernel):
    model, ids = model_of(conv_kernel=kernel), random_ids(3, 6)
    state = state_after(model, ids)
    state.reorder_cache(torch.LongTensor([2, 0, 1]))
    state.batch_select_indices(torch.tensor([0, 2]))
    state.batch_repeat_interleave(2)
    assert state.get_seq_length() == 6
    text = torch.cat([ids[[2, 2, 1, 1]], random_ids(4, 3, seed=1)], dim=1)
    assert torch.equal(generate(model, text, 5, past_key_values=state), generate(model, text, 5))


def test_a_saved_state_says_how_many_tokens_it_has_read():
    """A state without the number, as in checkpoints of 0.1, loads for training; generate() refuses it."""
    model, ids = model_of(), random_ids(2, 6)
    saved = state_after(model, ids).state_dict()
    assert int(saved.pop("num_tokens")) == 6
    old = loaded(saved)
    logits_of(model, ids, past_key_values=old, use_cache=True)
    assert "num_tokens" not in old.state_dict()
    with pytest.raises(ValueError, match="saved without its number of tokens"):
        generate(model, random_ids(2, 20), past_key_values=old)
    old.reset()
    assert old.get_seq_length() == 0


@pytest.mark.parametrize(("num_layers", "name"), [(1, r"layers\.1\.conv"), (3, r"layers\.2\.recurrent")])
def test_a_state_of_other_layers_is_not_loaded(num_layers, name):
    saved = state_after(model_of(), random_ids(2, 6)).state_dict()
    with pytest.raises(ValueError, match=f"not one of {num_layers} layers: {name}"):
        MinRNNCache(num_layers).load_state_dict(saved)


def mismatched_state(kind: str, model: MinRNNForCausalLM) -> object:
    """A state that `model` cannot go on from with two rows."""
    ids = random_ids(2, 6)
    if kind == "of one row":
        return state_after(model, ids[:1])
    if kind == "half read":
        state = state_after(model, ids)
        state.layers[1].reset()
        return state
    attention = LlamaConfig(num_hidden_layers=2, num_attention_heads=2)
    foreign = {
        "of no kind": object(),
        "dynamic": DynamicCache(),
        "static": StaticCache(attention, max_cache_len=9),
    }
    fields = {
        "of fewer layers": {"num_hidden_layers": 1},
        "of more layers": {"num_hidden_layers": 3},
        "of another width": {"expansion_factor": 3},
        "of the same recurrent width": {"hidden_size": 24, "expansion_factor": 1},
        "of another kernel": {"conv_kernel": 2},
        "with or without convolution": {"conv_kernel": 4 - model.config.conv_kernel},
    }
    return (
        foreign[kind]
        if kind in foreign
        else state_after(model_of(**{"conv_kernel": model.config.conv_kernel} | fields[kind]), ids)
    )


@pytest.mark.parametrize("kernel", [0, 4])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("of no kind", "must be a MinRNNCache, .* but is a object"),
        ("dynamic", "but is a DynamicCache"),
        ("static", "but is a StaticCache"),
        ("of fewer layers", "of a model of 1 layers, but this one has 2"),
        ("of more layers", "of a model of 3 layers"),
        ("of another width", "of another model: recurrent of layer 0"),
        ("of the same recurrent width", "of another model: conv of layer 0"),
        ("of another kernel", "of another model: conv of layer 0"),
        ("with or without convolution", "of another model: conv of layer 0"),
        ("of one row", "of 1 rows, but the batch has 2"),
        ("half read", "of another model: recurrent of layer 1 is missing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(kind, message, kernel):
    model = model_of(conv_kernel=kernel)
    if kernel == 0 and kind == "of the same recurrent width":  # without a convolution it fits
        model(random_ids(2, 3), past_key_values=mismatched_state(kind, model))
        return
    with pytest.raises(ValueError, match=f"past_key_values .*{message}"):
        model(random_ids(2, 3), past_key_values=mismatched_state(kind, model))


def test_a_text_that_the_state_has_read_is_refused():
    """The same text, a shorter one, one row for many. New tokens continue exactly, also without old ones."""
    model, ids = model_of(), random_ids(2, 6)
    for text in (ids, ids[:, :4]):
        with pytest.raises(
            ValueError, match=f"past_key_values has read 6 tokens, but the text has {text.shape[1]}"
        ):
            generate(model, text, past_key_values=state_after(model, ids))
        embeds = model.get_input_embeddings()(text)
        with pytest.raises(ValueError, match="has read 6 tokens"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2, past_key_values=state_after(model, ids))  # pyright: ignore
    with pytest.raises(ValueError, match="of 2 rows, but the batch has 4"):
        generate(model, torch.cat([ids, ids], dim=1), past_key_values=state_after(model, ids), num_beams=2)
    text = torch.cat([ids, random_ids(2, 3, seed=1)], dim=1)
    expected = generate(model, text)
    assert torch.equal(generate(model, text, past_key_values=state_after(model, ids)), expected)
    new = generate(
        model, text[:, 6:], past_key_values=state_after(model, ids), attention_mask=torch.ones_like(text)
    )
    assert torch.equal(new, expected[:, 6:])
    sequences, state = generate_with_state(model, ids, 5)
    with pytest.raises(ValueError, match="has read 10 tokens, but the text has 10"):
        generate(model, sequences[:, :10], past_key_values=state)


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized", "paged"])
def test_ways_to_store_keys_and_values_are_refused(implementation):
    with pytest.raises(
        ValueError, match=f"cache_implementation='{implementation}'.* is a way to store keys and values"
    ):
        generate(model_of(), random_ids(2, 6), cache_implementation=implementation)
    assert torch.equal(
        generate(model_of(), random_ids(2, 6), cache_implementation="dynamic"),
        generate(model_of(), random_ids(2, 6)),
    )


def test_a_state_cannot_be_rewound():
    state = state_after(model_of(), random_ids(2, 6))
    for refused in (lambda: state.crop(-1), lambda: state.crop(2), state.activate_past_recording):
        with pytest.raises(RuntimeError, match="recurrent state"):
            refused()
    assert not state.is_croppable
    assert state.get_seq_length() == 6


def test_a_state_survives_reentrant_and_other_checkpointing():
    """Gradients of two chunks with the state between them: without checkpointing, reentrant, and not."""
    ids, grads = random_ids(2, 12), []
    for options in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model, state, losses = (
            new_model(dtype=torch.float64, tie_word_embeddings=False).train(),
            MinRNNCache(2),
            [],
        )
        if options is not None:
            model.activation_checkpointing_enable(options)
        for low, high in ((0, 5), (5, 12)):
            output = model(ids[:, low:high], labels=ids[:, low:high], past_key_values=state, use_cache=True)
            losses.append(output.loss)
        losses[-1].backward()  # reaches the first chunk through the state alone
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in grads[1:]:
        for name, gradient in grads[0].items():
            assert_close(other[name], gradient, atol=1e-12, name=name)
