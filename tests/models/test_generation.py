"""generate() against the same search without the state, in fp64, so that rounding decides no near-tie."""

from typing import Any

import pytest
import torch
from helpers import VOCAB, generate, generate_with_state, new_model, random_ids, shared_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minrnn.models import MinRNNCache, MinRNNForCausalLM
from minrnn.models.registry import CELLS

cells = pytest.mark.parametrize("cell", CELLS)


def model_of(cell: str = "mingru", **fields) -> MinRNNForCausalLM:
    """Untied: with the embedding as output projection, a model that knows nothing repeats its last token."""
    return shared_model(dtype=torch.float64, cell=cell, tie_word_embeddings=False, **fields)


def greedy(model: MinRNNForCausalLM, ids: Tensor, num_tokens: int) -> Tensor:
    """Greedy decoding that reads the whole text for each token."""
    for _ in range(num_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def left_padded(lengths: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts [1, length], the padded batch, its attention mask."""
    prompts = [random_ids(1, length, seed=length) for length in lengths]
    time = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(prompt, (time - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(time) >= time - length for length in lengths]).long()
    return prompts, ids, mask


@cells
@pytest.mark.parametrize("kernel", [0, 4])
def test_greedy_is_the_argmax_of_the_whole(cell, kernel):
    model, ids = model_of(cell, conv_kernel=kernel), random_ids(3, 6)
    expected = greedy(model, ids, 12)
    assert torch.equal(generate(model, ids, 12), expected)
    assert torch.equal(generate(model, ids, 12, use_cache=False), expected)
    assert torch.equal(generate(model, ids, 12, cache_implementation=None), expected)


def test_one_token_prompt():
    model, ids = model_of(), random_ids(2, 1)
    assert torch.equal(generate(model, ids), greedy(model, ids, 10))


def test_generation_ends_at_eos():
    model, ids = model_of(), random_ids(2, 6)
    expected = greedy(model, ids, 12)
    eos = int(expected[0, 9])
    output = generate(model, ids, 12, eos_token_id=eos, pad_token_id=0)
    for row in range(2):
        new = expected[row, 6:].tolist()
        expected_tokens = new[: new.index(eos) + 1] if eos in new else new
        assert output[row, 6 : 6 + len(expected_tokens)].tolist() == expected_tokens
        assert not output[row, 6 + len(expected_tokens) :].any()


@cells
def test_sampling(cell):
    """Stays in the vocabulary, follows the seed, and draws the same with and without the state."""
    model, ids = model_of(cell), random_ids(2, 6)
    outputs = []
    for seed, use_cache in ((0, True), (0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        options = {"do_sample": True, "top_k": 0, "temperature": 1.2, "num_return_sequences": 2}
        outputs.append(generate(model, ids, 20, use_cache=use_cache, **options))
        assert outputs[-1].shape == (4, 26)
        assert ((outputs[-1] >= 0) & (outputs[-1] < VOCAB)).all()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[3])


@cells
@pytest.mark.parametrize("padded", [False, True])
def test_beam_search_reorders_the_state(cell, padded):
    model = model_of(cell)
    _, ids, mask = left_padded([4, 7] if padded else [6, 6])
    options = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask, "length_penalty": 0.0}
    actual = generate(model, ids, 20, **options)
    assert torch.equal(actual, generate(model, ids, 20, use_cache=False, **options))
    assert not torch.equal(actual[::2], generate(model, ids, 20, attention_mask=mask)), (
        "the beam never left the greedy path: a weak test"
    )


@cells
@pytest.mark.parametrize("kernel", [0, 4])
@pytest.mark.parametrize("chunk", [None, 2, 7])
def test_a_left_padded_batch_equals_separate_prompts(cell, kernel, chunk):
    model = model_of(cell, conv_kernel=kernel)
    prompts, ids, mask = left_padded([2, 9, 16])
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    output = generate(model, ids, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        assert torch.equal(output[row, 16:], greedy(model, prompt, 10)[0, prompt.shape[1] :]), row


@cells
@pytest.mark.parametrize("length", [6, 7, 8, 20])
def test_prefill_in_chunks(cell, length):
    model, ids = model_of(cell), random_ids(2, length)
    assert torch.equal(generate(model, ids, prefill_chunk_size=7), generate(model, ids))


@cells
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_generation_continues_a_returned_state(cell, padded, chunk):
    """Twice five tokens with the state between = ten tokens; so is a turn of new text in between."""
    model = model_of(cell)
    _, ids, mask = left_padded([3, 8] if padded else [8, 8])
    options = {} if chunk is None else {"prefill_chunk_size": chunk}

    def attention(text: Tensor) -> Tensor:
        return torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)

    text, cache = generate_with_state(model, ids, 5, attention_mask=mask)
    assert isinstance(cache, MinRNNCache)
    assert cache.get_seq_length() == 12
    second = generate(model, text, 5, attention_mask=attention(text), past_key_values=cache, **options)
    assert torch.equal(second, generate(model, ids, 10, attention_mask=mask))

    turn = torch.cat([second, random_ids(2, 4, seed=5)], dim=1)
    third = generate(model, turn, 5, attention_mask=attention(turn), past_key_values=cache, **options)
    assert torch.equal(third, generate(model, turn, 5, attention_mask=attention(turn)))


def test_generation_from_embeddings():
    model, ids = model_of(), random_ids(2, 6)
    search: Any = model
    output = search.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=10, do_sample=False
    )
    assert torch.equal(output, greedy(model, ids, 10)[:, 6:])


@pytest.mark.parametrize("mode", ["greedy", "sample", "beam", "beam sample"])
def test_requested_outputs(mode):
    """Scores, logits and hidden states have one entry per new token; logits are those of the whole text."""
    model, ids = model_of(), random_ids(2, 6)
    num_beams = 3 if "beam" in mode else 1
    names = ("output_scores", "output_logits", "output_hidden_states", "return_dict_in_generate")
    options = dict.fromkeys(names, True) | {"do_sample": "sample" in mode, "num_beams": num_beams, "top_k": 0}
    output: Any = generate(model, ids, 5, **options)
    num_tokens, rows = output.sequences.shape[1] - 6, 2 * num_beams
    assert num_tokens == 5
    assert [tuple(scores.shape) for scores in output.scores] == [(rows, VOCAB)] * 5
    assert len(output.hidden_states) == 5
    for time, layers in zip([6, 1, 1, 1, 1], output.hidden_states, strict=True):
        assert [tuple(layer.shape) for layer in layers] == [
            (rows, time, 16)
        ] * 3  # the embedding and two blocks
    assert isinstance(output.past_key_values, MinRNNCache)
    assert output.past_key_values.get_seq_length() == 10
    if num_beams == 1:
        with torch.no_grad():
            whole = model(output.sequences).logits
        assert torch.allclose(
            torch.stack(output.logits, dim=1), whole[:, 5:10].to(output.logits[0].dtype), atol=1e-9
        )


def test_no_attention_weights_are_returned():
    """Mamba's convention: a model without attention returns none, whatever is asked for."""
    output: Any = generate(
        model_of(), random_ids(2, 6), 3, output_attentions=True, return_dict_in_generate=True
    )
    assert not any(output.attentions or ())


def test_generation_without_a_prompt():
    search: Any = model_of()
    output = search.generate(bos_token_id=1, max_new_tokens=8, do_sample=False)
    assert torch.equal(output, greedy(search, torch.tensor([[1]]), 8))


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[3], [4, 5]]},
    "shortest": {"min_new_tokens": 12, "eos_token_id": 3, "pad_token_id": 0},
    "forced end": {"forced_eos_token_id": 2, "pad_token_id": 0},
    "guided": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processed_search_is_the_same_with_and_without_the_state(name):
    model, ids = model_of(), random_ids(2, 6)
    actual = generate(model, ids, 16, **PROCESSORS[name])
    assert torch.equal(actual, generate(model, ids, 16, use_cache=False, **PROCESSORS[name]))


@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_generation_is_refused(option: str):
    """Assisted generation rejects tokens afterwards, and a recurrent state cannot be rewound."""
    options: dict[str, Any] = {
        "prompt_lookup_num_tokens": 2,
        "assistant_model": new_model(dtype=torch.float64),
    }
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model_of(), random_ids(1, 6), **{option: options[option]})


def test_the_model_is_refused_as_the_assistant_of_another():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, intermediate_size=24, num_attention_heads=2
    )
    main = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="cannot be an assistant_model"):
        generate(main, random_ids(1, 6), assistant_model=new_model())


def test_a_compiled_forward_generates_the_same():
    model, ids = (
        new_model(dtype=torch.float64, tie_word_embeddings=False, num_hidden_layers=1),
        random_ids(2, 6),
    )
    expected = generate(model, ids)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(generate(model, ids), expected)
    torch._dynamo.reset()


def test_the_state_does_not_grow():
    """Bytes held, the storages behind the tensors included, are the same after 3 and after 300 tokens."""
    model, held = new_model(), []
    for length in (3, 30, 300):
        _, cache = generate_with_state(model, random_ids(2, length), 4)
        tensors = [
            tensor for layer in cache.layers for tensor in (layer.recurrent, layer.conv) if tensor is not None
        ]
        assert len(tensors) == 4
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        assert held[-1] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    config = model.config
    assert held == [2 * 2 * 4 * (config.recurrent_size + (config.conv_kernel - 1) * config.hidden_size)] * 3
