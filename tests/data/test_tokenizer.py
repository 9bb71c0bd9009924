"""Encoding and decoding with bytes and with a real BPE; an encoder in a worker equals the Hugging Face
tokenizer.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minrnn.common.errors import UserError
from minrnn.data import BYTES, Encoder, byte_tokenizer, load_tokenizer, model_vocab_size
from minrnn.data.tokenizer import num_bytes

TOKENIZER = byte_tokenizer()
ENCODER = Encoder.from_tokenizer(TOKENIZER, BYTES)
NAMES = "a<bos>b<eos> <pad> <|endoftext|>"
TEXTS = st.text() | st.lists(
    st.sampled_from(["<", ">", "a", "<bos>", "<eos>", "<pad>", " ", "é", "漢", "🙂"])
).map("".join)
FEW = settings(max_examples=60, deadline=None)


def train_bpe(folder: Path, edit: Any = None, **special: str) -> str:
    """Train a byte-level BPE with 400 tokens and save it as a folder that AutoTokenizer loads."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(special.values()), show_progress=False
    )
    text = "the cat sat on the mat, and the other cat sat on the hat: 漢字 and été; <bos> is text\n"
    backend.train_from_iterator([text * 20, "def f(x):\n    return x + 1\n" * 20], trainer)
    if edit is not None:
        edit(backend)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


@FEW
@given(TEXTS)
def test_bytes_round_trip(text: str):
    tokens = ENCODER(text)
    assert tokens.dtype == np.uint16
    assert tokens[0] == TOKENIZER.bos_token_id == 256
    assert tokens[-1] == TOKENIZER.eos_token_id == 257
    assert bytes(tokens[1:-1].astype(np.uint8)) == text.encode(), "id = byte; a special token's name is text"
    assert TOKENIZER.decode(tokens[1:-1].tolist()) == text
    assert TOKENIZER.decode(tokens.tolist(), skip_special_tokens=True) == text
    assert ENCODER.num_bytes(tokens[1:-1]) == num_bytes(text) == len(text.encode())


@FEW
@given(TEXTS)
def test_the_byte_tokenizer_object_is_the_encoder(text: str):
    ids = TOKENIZER(text).input_ids
    assert ids[0] == 256, "a prompt begins as a document does, and does not end"
    assert TOKENIZER.decode(ids[1:], skip_special_tokens=False) == text, (
        "whatever it makes of special tokens' names"
    )
    as_text = TOKENIZER(text, split_special_tokens=True).input_ids
    assert as_text == ENCODER(text)[:-1].tolist()
    if "<" not in text:
        assert ids == as_text


def test_every_byte_has_its_own_id():
    vocabulary = TOKENIZER.get_vocab()
    assert sorted(vocabulary.values()) == list(range(259))
    for byte in range(256):
        expected = bytes([byte]).decode(errors="replace")
        assert TOKENIZER.decode([byte]) == expected
    assert (TOKENIZER.bos_token, TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert TOKENIZER.pad_token_id == 258


def test_a_batch_is_padded_on_the_left():
    for tokenizer in (TOKENIZER, load_tokenizer(BYTES)):
        batch = tokenizer(["a", "abc"], padding=True)
        assert batch.input_ids == [[258, 258, 256, 97], [256, 97, 98, 99]]
        assert batch.attention_mask == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_the_byte_tokenizer_is_saved_and_loaded(tmp_path: Path):
    TOKENIZER.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        for text in ("", "plain", NAMES, "漢 é 🙂\r\n\t x", " leading", "a  .  b , c n't"):
            assert loaded(text).input_ids == TOKENIZER(text).input_ids
            assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == TOKENIZER.decode(
                TOKENIZER(text).input_ids, skip_special_tokens=True
            )
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (
            256,
            257,
            258,
            "left",
        )
        assert loaded(["a", "bc"], padding=True).input_ids == [[258, 256, 97], [256, 98, 99]]
    encoder = Encoder.from_tokenizer(loaded, str(tmp_path))
    assert encoder(NAMES).tolist() == ENCODER(NAMES).tolist()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Encoder]:
    path = train_bpe(tmp_path_factory.mktemp("bpe"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer = load_tokenizer(path)
    return tokenizer, Encoder.from_tokenizer(tokenizer, path)


def test_a_bpe_encoder_is_its_tokenizer(bpe: tuple[Any, Encoder]):
    tokenizer, encoder = bpe

    @FEW
    @given(TEXTS | st.text(st.sampled_from("the cat sat.\n")))
    def check(text: str):
        tokens = encoder(text)
        assert tokens.dtype == np.uint16
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert not np.isin(tokens[1:-1], tokenizer.all_special_ids).any(), "a special token's name is text"
        assert (
            tokens[1:-1].tolist()
            == tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        )
        assert tokenizer.decode(tokens[1:-1].tolist()) == text
        assert encoder.num_bytes(tokens[1:-1]) == num_bytes(text)

    check()
    assert len(encoder("the cat sat on the mat")) < 12, "it did learn words"


@pytest.mark.parametrize("which", ["bytes", "bpe"])
def test_an_encoder_is_pickled_without_its_backend(which: str, bpe: tuple[Any, Encoder]):
    encoder = ENCODER if which == "bytes" else bpe[1]
    encoder("used before")
    unpickled = pickle.loads(pickle.dumps(encoder))
    assert unpickled == Encoder(encoder.bos, encoder.eos, encoder.backend_json)
    assert unpickled(NAMES).tolist() == encoder(NAMES).tolist()


def test_truncation_and_padding_saved_with_a_tokenizer_do_not_cut_documents(tmp_path: Path):
    """Many tokenizer.json files on the hub were saved with both enabled."""

    def edit(backend: Tokenizer) -> None:
        backend.enable_truncation(4)
        backend.enable_padding(length=8)

    path = train_bpe(tmp_path, edit, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer = load_tokenizer(path)
    encoder = Encoder.from_tokenizer(tokenizer, path)
    for text in ("one", "the cat sat on the mat, and so on and on"):
        assert tokenizer.decode(encoder.encode(text).tolist()) == text


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"eos_token": "<e>"}, ("<e>", "<e>", "<e>")),
        ({"bos_token": "<b>"}, ("<b>", "<b>", "<b>")),
        ({"bos_token": "<b>", "eos_token": "<e>"}, ("<b>", "<e>", "<e>")),
        ({"eos_token": "<e>", "pad_token": "<p>"}, ("<e>", "<e>", "<p>")),
    ],
)
def test_missing_special_tokens_are_filled_in(
    special: dict[str, str], expected: tuple[str, str, str], tmp_path: Path
):
    tokenizer = load_tokenizer(train_bpe(tmp_path, **special))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == expected
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    batch = tokenizer(["the", "the cat sat on"], padding=True)
    assert batch.attention_mask[0][0] == 0
    assert batch.attention_mask[0][-1] == 1


def test_unusable_tokenizers_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.tokenizer: .* neither an eos nor a bos token"):
        load_tokenizer(train_bpe(tmp_path / "none", pad_token="<p>"))
    with pytest.raises(UserError, match=r"error: data\.tokenizer: cannot load .*missing"):
        load_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"error: data\.tokenizer: cannot load .*broken"):
        load_tokenizer(str(tmp_path / "broken"))


def test_a_tokenizers_code_runs_only_if_it_is_trusted(tmp_path: Path, monkeypatch):
    """Nothing is asked on standard input, which may be a pipe."""
    folder = Path(train_bpe(tmp_path / "tokenizer", bos_token="<b>", eos_token="<e>"))
    config, ran = folder / "tokenizer_config.json", tmp_path / "code-was-run"
    values = json.loads(config.read_text()) if config.exists() else {}
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    config.write_text(json.dumps({**values, "tokenizer_class": "OwnTokenizer", "auto_map": auto_map}))
    (folder / "tokenization_own.py").write_text(
        "from pathlib import Path\n\nfrom transformers import PreTrainedTokenizerFast\n\n"
        f"Path({str(ran)!r}).touch()\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(
        UserError,
        match=r"data\.tokenizer: .* brings code of its own, which is not run; .*data\.trust_remote_code",
    ):
        load_tokenizer(str(folder))
    assert not ran.exists()
    assert load_tokenizer(str(folder), trust_remote_code=True).bos_token == "<b>"
    assert ran.exists()


def test_the_models_vocabulary_holds_every_id():
    assert model_vocab_size(TOKENIZER) == 264
    assert model_vocab_size(TOKENIZER, 1) == 259
    assert model_vocab_size(TOKENIZER, 64) == 320
    holes = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 99}, unk_token="a"))
    )
    assert model_vocab_size(holes) == 104, "ids need not be consecutive"
