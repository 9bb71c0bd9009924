"""A long text is cut only where the tokens of its pieces are those of the whole text."""

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minrnn.data import Encoder
from minrnn.data import cutting as cutting_module
from minrnn.data.cutting import ALPHABET, CUT, TextCutter

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(use_regex: bool = True, prefix: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


CUTTABLE = {
    "gpt-2": (byte_level(), None),
    "llama-3": (split_by(LLAMA_3), None),
    "gpt-4o": (split_by(GPT_4O), normalizers.NFC()),
    "digits": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]), normalizers.NFKC()),
    "words": (pre_tokenizers.BertPreTokenizer(), normalizers.Sequence([normalizers.NFD()])),
}
UNCUTTABLE = {
    "no words": (byte_level(False), None),
    "a prefix": (byte_level(prefix=True), None),
    "metaspace": (pre_tokenizers.Metaspace(), None),
    "no pre-tokenizer": (None, normalizers.NFC()),
    "words with a space": (split_by(r"\p{L}+\s?|\s+"), None),
    "a look back": (split_by(r"(?<=q)\s|\p{L}+"), None),
    "an anchor": (split_by(r"^\s+|\p{L}+"), None),
    "a prepended mark": (byte_level(), normalizers.Prepend("_")),
    "a replaced space": (byte_level(), normalizers.Replace("e ", "e")),
}


def train(pre_tokenizer: Any, normalizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.decoder = decoders.ByteLevel()
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>", "<eos>", "<unk>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat. it's the 23rd\n\n  of\tMay"] * 3, trainer)
    return tokenizer


def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(0, 1, tokenizer.to_str())


@pytest.fixture(scope="module", autouse=True)
def no_threads():
    """Threads cost more than they save on short texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(scope="module", params=CUTTABLE)
def cuttable(request: pytest.FixtureRequest) -> Tokenizer:
    return train(*CUTTABLE[request.param])


@pytest.fixture(scope="module")
def cutter(cuttable: Tokenizer) -> TextCutter:
    return TextCutter(cuttable)


TEXTS = st.lists(st.sampled_from(ALPHABET) | st.text(max_size=3), max_size=60).map("".join)


@settings(max_examples=40)
@given(text=TEXTS, size=st.integers(1, 12))
def test_the_pieces_have_the_tokens_of_the_text(
    cuttable: Tokenizer, cutter: TextCutter, text: str, size: int
):
    assert cutter.can_cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting_module, "PIECE", size)
        pieces = list(cutter.pieces(text))
    assert "".join(pieces) == text
    ids = [cuttable.encode(piece, add_special_tokens=False).ids for piece in pieces]
    assert list(itertools.chain(*ids)) == cuttable.encode(text, add_special_tokens=False).ids


def test_a_long_text_is_cut_often_and_encoded_as_a_whole(cuttable: Tokenizer, cutter: TextCutter):
    text = "the cat sat, on the mat's 23rd\n\n  day é漢字 of\tMay. " * 2000
    pieces = list(cutter.pieces(text))
    assert max(map(len, pieces)) < cutting_module.PIECE + 100
    ids = cuttable.encode(text, add_special_tokens=False).ids
    texts = [text, "", "a cat", text[:50_000]]
    documents = encoder(cuttable).documents(texts)
    assert documents[0].tolist() == [0, *ids, 1]
    for document, expected in zip(documents, texts, strict=True):
        assert document.dtype == np.uint16
        assert document[1:-1].tolist() == cuttable.encode(expected, add_special_tokens=False).ids


@pytest.mark.parametrize("name", UNCUTTABLE)
def test_what_could_change_the_tokens_is_not_cut(name: str):
    tokenizer = train(*UNCUTTABLE[name])
    cutter, text = TextCutter(tokenizer), "the cat sat " * 3000
    assert not cutter.can_cut
    assert list(cutter.pieces(text)) == [text]


@pytest.mark.parametrize(
    "token", [AddedToken("the cat"), AddedToken("<sep>", rstrip=True), AddedToken("a\nb", special=True)]
)
def test_added_tokens_that_reach_across_a_place(token: AddedToken):
    tokenizer = train(*CUTTABLE["gpt-2"])
    tokenizer.add_tokens([AddedToken("    "), AddedToken("<mask>")])
    assert TextCutter(tokenizer).can_cut
    tokenizer.add_tokens([token])
    assert not TextCutter(tokenizer).can_cut


def test_a_rare_word_with_a_space_is_not_cut():
    """Random texts do not show it; the comparison at each cut does."""
    tokenizer = train(split_by(r"sat on|\p{L}+|\s+|[^\p{L}\s]+"), None)
    cutter = TextCutter(tokenizer)
    text = "sat on " * 5000
    assert cutter.can_cut
    pieces = list(cutter.pieces(text))
    assert len(pieces) > 1
    assert all(piece.lstrip().startswith("sat") for piece in pieces)
    assert encoder(tokenizer)(text)[1:-1].tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_text_without_a_place_is_one_piece():
    cutter = TextCutter(train(*CUTTABLE["gpt-2"]))
    for text in ("x" * 40_000, "1 " * 20_000, "漢字。" * 20_000):
        assert not CUT.search(text) or not any(match[0].isalpha() for match in CUT.finditer(text))
        assert list(cutter.pieces(text)) == [text]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_document_takes_at_most_five_times_its_bytes(kind: str):
    """Only memory that Python and numpy allocate is counted; that of a call of the tokenizer is bounded by
    the characters of a call."""
    text = "def f(x): return x + 1 " * 30_000
    encode = Encoder(256, 257, None) if kind == "bytes" else encoder(train(*CUTTABLE["llama-3"]))
    encode(text[:50_000])
    tracemalloc.start()
    tokens = encode(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(text)
    assert tokens.nbytes <= 2 * len(text) + 4


def test_large_vocabularies_need_32_bits():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = Encoder(2, 3, tokenizer.to_str())("a b c")
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [2, 0, 70_000, 1, 3]
