"""`MinRNNLM` gives the same results as lm-eval's own class, reads shared prefixes once and truncates
nothing.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import nn

from minrnn.data import byte_tokenizer
from minrnn.evals.harness.likelihood import group_by_prefix, read_contexts
from minrnn.evals.harness.model import MinRNNLM
from minrnn.models import MinRNNConfig, MinRNNForCausalLM

TOKENIZER = byte_tokenizer()
BOS = TOKENIZER.bos_token_id
TEXTS = st.text("ab \ncé", max_size=12)


def tiny_model(dtype: torch.dtype = torch.float64) -> MinRNNForCausalLM:
    """Untied embeddings, so predictions depend on more than the last token; sometimes ends a text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "tie_word_embeddings": False}
    tokens = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = MinRNNForCausalLM(MinRNNConfig(vocab_size=264, **sizes, **tokens)).eval()
    nn.Module.to(model, dtype)
    return model


def requests(kind: Any, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def forward_score(model: MinRNNForCausalLM, tokens: list[int], num_scored: int) -> tuple[float, bool]:
    """Log-likelihood of the last tokens of a text, from one forward pass over all of it."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0, -num_scored:]
    targets = torch.tensor(tokens[-num_scored:])
    return logits.log_softmax(-1).gather(1, targets[:, None]).sum().item(), bool(
        (logits.argmax(-1) == targets).all()
    )


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@given(
    pairs=st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=6),
    size=st.integers(1, 4),
    piece=st.integers(1, 9),
)
def test_log_likelihoods_are_those_of_one_forward_pass(dtype, tolerance, pairs, size, piece):
    """However requests share batches, prefixes and pieces.

    An empty context is the beginning of a document.
    """
    model = tiny_model(dtype)
    scores = MinRNNLM(model, TOKENIZER, batch_size=size, piece=piece).loglikelihood(
        requests("loglikelihood", *pairs), disable_tqdm=True
    )
    for (context, continuation), (value, is_greedy) in zip(pairs, scores, strict=True):
        num_scored = len(encode(context + continuation)) - len(encode(context.rstrip()))
        expected, greedy = forward_score(model, [BOS, *encode(context + continuation)], num_scored)
        assert value == pytest.approx(expected, rel=tolerance)
        assert is_greedy == greedy


def test_short_requests_score_as_with_hf():
    model = tiny_model(torch.float32)
    pairs = [
        ("", "It begins"),
        ("A state", " goes on"),
        ("A state", " ends"),
        ("x", "y"),
        ("spaces at its end  ", "and on"),
    ]
    pairs += [("x = '<eos>'", "\ny = '<pad><bos>'"), ("", "z<eos>")]  # names of special tokens are text
    factory: Any = HFLM
    hf = factory(pretrained=model, tokenizer=TOKENIZER, batch_size=2)
    expected = hf.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    scores = MinRNNLM(model, TOKENIZER, batch_size=3).loglikelihood(
        requests("loglikelihood", *pairs), disable_tqdm=True
    )
    for (context, continuation), (value, is_greedy), (hf_value, hf_greedy) in zip(
        pairs, scores, expected, strict=True
    ):
        tokens = [BOS, *encode(context + continuation)]
        if context == context.rstrip():
            assert value == pytest.approx(
                forward_score(model, tokens, len(encode(continuation)))[0], rel=1e-5
            )
        assert value == pytest.approx(hf_value, rel=1e-5)
        assert is_greedy == hf_greedy


def count_tokens(model: MinRNNForCausalLM, monkeypatch) -> list[int]:
    """The number of non-padding tokens of each forward pass from now on."""
    counted, forward = [], model.forward

    def counting(*arguments, attention_mask, **kwargs):
        counted.append(int(attention_mask.sum()))
        return forward(*arguments, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    return counted


def test_shared_prefixes_are_read_once(monkeypatch):
    model = tiny_model()
    counted = count_tokens(model, monkeypatch)
    lm = MinRNNLM(model, TOKENIZER, batch_size=4)
    endings = [" twice", " once", " never more", "!"]
    lm.loglikelihood(
        requests("loglikelihood", *(("A long context is read", ending) for ending in endings)),
        disable_tqdm=True,
    )
    assert sum(counted) == 1 + len("A long context is read") + sum(len(ending) - 1 for ending in endings)
    counted.clear()
    examples, questions = "The same examples before every question. ", ["Who?", "Why so?", "Where to?"]
    lm.loglikelihood(
        requests("loglikelihood", *((examples + question, "x") for question in questions)), disable_tqdm=True
    )
    shared = len(examples) + len("W")
    assert sum(counted) <= 1 + shared + sum(
        len(examples + question) - len(examples) for question in questions
    )


@given(
    contexts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=8, unique_by=tuple),
    size=st.integers(1, 4),
)
def test_contexts_are_read_after_their_shared_prefixes(contexts, size):
    groups = group_by_prefix(contexts)
    assert sorted(number for members in groups.values() for number in members) == list(range(len(contexts)))
    for prefix, members in groups.items():
        assert not prefix or len(members) > 1
        for number in members:
            assert tuple(contexts[number][: len(prefix)]) == prefix
            assert len(contexts[number]) > len(prefix)
            assert not prefix or 2 * len(prefix) >= len(contexts[number])
    model = tiny_model()
    for numbers, logits, _ in read_contexts(model, contexts, size, piece=5):
        for number, row in zip(numbers, logits, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(
                    row, model(torch.tensor([contexts[number]])).logits[0, -1], rtol=1e-10, atol=1e-10
                )


@pytest.mark.parametrize("size", [1, 3])
def test_a_document_is_read_whole_or_in_windows(size: int, monkeypatch):
    """Whole: the state is carried through it in pieces, and every token is read once.

    Windows are separate forward passes.
    """
    model, window = tiny_model(), 16
    documents = ["A document of some length. " * 5, "short", "", "0123456789abcdef", "0123456789abcdefg"]
    whole = [forward_score(model, [BOS, *encode(text)], len(text))[0] if text else 0.0 for text in documents]
    cut = []
    for text in documents:
        tokens = [BOS, *encode(text)]
        starts = range(0, len(text), window)
        parts = [tokens[start : start + window + 1] for start in starts]
        if len(text) > window:  # lm-eval's last window reaches back for a whole window of context
            parts[-1] = tokens[-window - 1 :]
        counts = [min(window, len(text) - start) for start in starts]
        cut.append(
            sum(forward_score(model, part, count)[0] for part, count in zip(parts, counts, strict=True))
        )
    lm = MinRNNLM(model, TOKENIZER, batch_size=size, piece=7)
    rolling = requests("loglikelihood_rolling", *((text,) for text in documents))
    counted = count_tokens(model, monkeypatch)
    assert lm.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(whole, rel=1e-10)
    assert sum(counted) == 1 + sum(max(len(text) - 1, 0) for text in documents)
    lm.rolling_window = window
    assert lm.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(cut, rel=1e-10)


CONTEXTS = ["The state", "", "a much longer context than the others", "def main"]


def generate_with_transformers(model: Any, contexts: list[str], **kwargs: Any) -> list[str]:
    """Text generated by transformers."""
    inputs = TOKENIZER(contexts, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = model.generate(**inputs, pad_token_id=TOKENIZER.pad_token_id, **kwargs)
    return TOKENIZER.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_greedy_text_equals_that_of_generate(size: int):
    model = tiny_model()
    lm = MinRNNLM(model, TOKENIZER, batch_size=size, piece=6)
    settings = {"until": [], "max_gen_toks": 20}
    texts = lm.generate_until(
        requests("generate_until", *((context, settings) for context in CONTEXTS)), disable_tqdm=True
    )
    assert texts == generate_with_transformers(model, CONTEXTS, max_new_tokens=20, do_sample=False)


def test_sampled_text_equals_that_of_generate():
    model = tiny_model()
    contexts = sorted(CONTEXTS, key=lambda context: -len(context))  # the order of a batch
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9}
    settings = {"until": ["\0"], "max_gen_toks": 20, **sampling}
    torch.manual_seed(1)
    texts = MinRNNLM(model, TOKENIZER, batch_size=4).generate_until(
        requests("generate_until", *((context, settings) for context in contexts)), disable_tqdm=True
    )
    torch.manual_seed(1)
    assert texts == [
        text.split("\0")[0]
        for text in generate_with_transformers(model, contexts, max_new_tokens=20, **sampling)
    ]


def test_a_stop_string_ends_a_text_and_is_not_part_of_it(monkeypatch):
    model = tiny_model()
    lm = MinRNNLM(model, TOKENIZER)
    (whole,) = lm.generate_until(
        requests("generate_until", ("def", {"until": [], "max_gen_toks": 30})), disable_tqdm=True
    )
    stop = whole[5:7]
    counted = []
    decode = lm.tok_decode
    monkeypatch.setattr(lm, "tok_decode", lambda tokens: counted.append(tokens) or decode(tokens))
    (text,) = lm.generate_until(
        requests("generate_until", ("def", {"until": ["never", stop], "max_gen_toks": 30})), disable_tqdm=True
    )
    assert text == whole.split(stop)[0]
    assert len(counted) < 30


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="num_beams not known here"):
        MinRNNLM(tiny_model(), TOKENIZER).generate_until(
            requests("generate_until", ("a", {"until": [], "num_beams": 2})), disable_tqdm=True
        )
    with pytest.raises(ValueError, match="batch_size must be a number of at least 1, not 'many'"):
        MinRNNLM(tiny_model(), TOKENIZER, batch_size="many")
    assert MinRNNLM(tiny_model(), TOKENIZER, batch_size="auto:4").batch_size == 32
