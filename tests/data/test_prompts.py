"""Prompts are encoded as training encodes text, for every kind of tokenizer, and new tokens are decoded to
their text.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers_of_each_kind import KINDS, saved
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minrnn.common.errors import UserError
from minrnn.data import (
    Encoder,
    TextStream,
    load_tokenizer,
    prompt_batch,
    prompt_tokens,
    read_prompt,
)
from minrnn.data.prompts import BROKEN

NAMES = ["<s>", "</s>", "<pad>", "<|endoftext|>", "[CLS]", "[SEP]", "<|x:1|>", "<e nd>", "$A", "<extra_id_0>"]
TEXTS = st.text() | st.lists(
    st.sampled_from([*NAMES, "the", "cat sat", " ", "    ", "\n", "\r\n", "x = '", "é", "漢", "🙂"])
).map("".join)
FEW = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module", params=["bytes", *KINDS])
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Encoder, Any]:
    """The kind's name, its training tokenizer, the training encoder, and the tokenizer loaded from an
    export.
    """
    folder = tmp_path_factory.mktemp(request.param)
    name = "bytes" if request.param == "bytes" else saved(request.param, folder / "hub")
    tokenizer = load_tokenizer(name)
    tokenizer.save_pretrained(folder / "export")
    return (
        request.param,
        tokenizer,
        Encoder.from_tokenizer(tokenizer, name),
        AutoTokenizer.from_pretrained(folder / "export"),
    )


def test_an_exports_tokenizer_encodes_as_training_does(kind: tuple[str, Any, Encoder, Any]):
    _, tokenizer, encoder, exported = kind
    boundaries = [tokenizer.bos_token_id, tokenizer.eos_token_id]

    @FEW
    @given(TEXTS)
    def check(text: str):
        document = encoder(text).tolist()
        assert exported(text).input_ids == exported.encode(text) == document[:-1]
        assert prompt_tokens(exported, text) == document[:-1]
        assert not set(boundaries) & set(document[1:-1]), "a special token's name is text"

    check()


def test_tokenizer_settings_survive_saving(kind: tuple[str, Any, Encoder, Any], tmp_path: Path):
    _, tokenizer, _, exported = kind
    exported.save_pretrained(tmp_path)
    for loaded in (exported, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        for name in (
            "bos_token",
            "eos_token",
            "pad_token",
            "unk_token",
            "model_max_length",
            "padding_side",
            "split_special_tokens",
        ):
            assert getattr(loaded, name) == getattr(tokenizer, name), name
        assert None not in (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
        batch = loaded(["the", "the cat sat on the mat"], padding=True)
        assert batch.keys() == {"input_ids", "attention_mask"}
        assert batch.attention_mask[0][0] == 0
        assert batch.attention_mask[0][-1] == 1
        assert loaded.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", KINDS)
def test_prompts_are_encoded_correctly_with_an_unconverted_tokenizer(name: str, tmp_path: Path):
    """Exports from before `document_tokenizer` kept each tokenizer's own post-processor and lost the padding
    side.
    """
    folder = saved(name, tmp_path / "hub")
    encoder = Encoder.from_tokenizer(load_tokenizer(folder), folder)
    old = AutoTokenizer.from_pretrained(folder)
    old.eos_token = old.eos_token or old.bos_token
    old.bos_token = old.bos_token or old.eos_token
    old.pad_token = old.pad_token or old.eos_token
    for text in ("the cat sat", " the cat", "", "x = '<s>'", f"{'漢' * 3} the"):
        assert prompt_tokens(old, text) == [encoder.bos, *encoder.encode(text)]
    batch = prompt_batch(old, ["the", "the cat sat"])
    assert batch["input_ids"][1].tolist() == prompt_tokens(old, "the cat sat")
    (short, long), num_real = batch["attention_mask"].tolist(), len(prompt_tokens(old, "the"))
    assert short == [0] * (len(long) - num_real) + [1] * num_real


def test_a_tokenizer_that_reads_its_boundary_from_a_text_is_refused(tmp_path: Path):
    backend = Tokenizer(models.WordLevel({"the": 0, "e": 1}, unk_token="e"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="e").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"data\.tokenizer: .* reads the text 'e' as the token that bounds documents"
    ):
        load_tokenizer(str(tmp_path))


def test_a_text_stream_decodes_the_text(kind: tuple[str, Any, Encoder, Any]):
    """For text, all of it, whatever the prompt; for arbitrary tokens, complete characters."""
    _, tokenizer, encoder, _ = kind
    special = {*tokenizer.all_special_ids}

    @FEW
    @given(prompt=TEXTS, text=TEXTS, split=st.integers(0, 9))
    def check(prompt: str, text: str, split: int):
        start = prompt_tokens(tokenizer, prompt + BROKEN * (split == 0))
        new = [token for token in encoder.encode(text).tolist() if token not in special]
        stream = TextStream(tokenizer, start)
        before = [token for token in start if token not in special]
        expected = tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]
        parts = [stream.write([token]) for token in new]
        assert ("".join(parts) + stream.end()).rstrip(BROKEN) == expected.rstrip(BROKEN)
        assert BROKEN in expected or not any(BROKEN in part for part in parts)

    @FEW
    @given(st.lists(st.integers(0, len(tokenizer) - 1)))
    def check_any(tokens: list[int]):
        stream = TextStream(tokenizer, prompt_tokens(tokenizer, "the cat"))
        text = "".join(stream.write([token]) for token in tokens) + stream.end()
        assert not any(name in text for name in NAMES if name in tokenizer.get_vocab() and len(name) > 2)

    check()
    check_any()


def test_the_cost_of_decoding_a_token_does_not_depend_on_the_prompt(kind: tuple[str, Any, Encoder, Any]):
    """The cost is the number of tokens that are decoded again."""
    _, tokenizer, encoder, _ = kind
    decoded = []

    class Counting:
        """The tokenizer's backend."""

        def decode(self, tokens: list[int], **options: Any) -> str:
            decoded.append(len(tokens))
            return tokenizer.backend_tokenizer.decode(tokens, **options)

    counting = SimpleNamespace(all_special_ids=tokenizer.all_special_ids, backend_tokenizer=Counting())
    stream = TextStream(counting, prompt_tokens(tokenizer, "the cat sat on the mat\n " * 400))
    new = encoder.encode("the other cat sat on the hat " * 40).tolist()
    assert stream.write(new)
    assert max(decoded) < 40
    assert len(decoded) <= 2 * len(new) + 20


def test_a_prompt_file_is_read_like_a_corpus_file(tmp_path: Path, monkeypatch):
    file = tmp_path / "prompt.txt"

    def from_file(data: bytes) -> str:
        file.write_bytes(data)
        return read_prompt(file, "--prompt-file")

    def from_input(data: bytes) -> str:
        file.write_bytes(data)
        with file.open() as stream:
            monkeypatch.setattr("sys.stdin", stream)
            return read_prompt(Path("-"), "--prompt-file")

    for read in (from_file, from_input):
        assert read(b"\xef\xbb\xbfa\r\nb\rc\n\xef\xbb\xbf") == "a\r\nb\rc\n\ufeff"
        assert read(b"") == ""
        with pytest.raises(
            UserError,
            match=r"^error: --prompt-file: (.*prompt.txt|standard input) "
            r"is not UTF-8 \(byte 5\); convert it$",
        ):
            read(b"\xef\xbb\xbfab\xff")
    with pytest.raises(
        UserError, match=r"^error: --prompt-file: cannot read .*missing: No such file or directory$"
    ):
        read_prompt(tmp_path / "missing", "--prompt-file")
