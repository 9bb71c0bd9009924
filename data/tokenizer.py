"""Tokenizers: bytes, or any fast tokenizer of Hugging Face.

The byte tokenizer is an ordinary `PreTrainedTokenizerFast` that needs no download: byte b has id b, followed
by <bos>, <eos> and <pad>. The names of these special tokens in a text are encoded as text.
"""

import array
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..common.errors import UserError
from .cutting import PIECE, TextCutter

BYTES = "bytes"
BATCH = 2**19  # characters that are tokenized in one call
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")
SMALL_VOCABULARY = 512
WORD_SPECIAL_TOKENS = (*SPECIAL_TOKENS, "<unk>")  # of `word_tokenizer`
SAVED_SETTINGS = {  # of every tokenizer that is saved with a run or an export (tokenizer_config.json)
    "padding_side": "left",
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 2**30,
    "model_input_names": ["input_ids", "attention_mask"],
}


def _byte_alphabet() -> list[str]:
    """The printable character that the byte-level pre-tokenizer writes for each byte value (the GPT-2 table).

    Printable Latin-1 characters stand for themselves; the other bytes get the code points from 256 on, in
    order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer(begins_with_bos: bool = True) -> Any:
    """A `PreTrainedTokenizerFast` over the 256 bytes.

    Args:
        begins_with_bos: write <bos> before each text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    vocabulary |= {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    if begins_with_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        **SAVED_SETTINGS,
    )


def word_tokenizer(symbols: Sequence[str]) -> Any:
    """A `PreTrainedTokenizerFast` whose words are the symbols, separated by spaces.

    It adds no tokens to a text. WORD_SPECIAL_TOKENS follow the symbols in the vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, *WORD_SPECIAL_TOKENS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2**30,
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what decides the tokens of a text: `rules:` and SHA-256 of normalizer, pre-tokenizer, model
    (vocabulary and merges) and added tokens.

    What is empty or false is left out, so that a new version of `tokenizers` with more options changes
    nothing.
    """
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: values.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return f"rules:{hashlib.sha256(json.dumps(_without_empty(rules), sort_keys=True).encode()).hexdigest()}"


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        # ids are numbers: 0 is no empty value
        kept = {key: _without_empty(item) for key, item in value.items()}
        return {
            key: item for key, item in kept.items() if item is not None and item is not False and item != []
        }
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def has_fingerprint(tokenizer: Any, saved: str) -> bool:
    """Whether a tokenizer has this fingerprint, which older versions made of the vocabulary with its ids."""
    if saved.startswith("rules:"):
        return saved == tokenizer_fingerprint(tokenizer)
    numbered = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return saved == hashlib.sha256(json.dumps(numbered).encode()).hexdigest()


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load `"bytes"`, or a folder or hub id with `AutoTokenizer`, converted by `document_tokenizer`.

    Args:
        trust_remote_code: run code that the tokenizer brings along. If it is False, such a tokenizer is
            refused here, since transformers would ask on standard input, which may be a pipe.

    Raises:
        UserError: it cannot be loaded, is not a fast tokenizer, has code that is not trusted, or has no token
            that could end a document.
    """
    if name == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub client, the file system and the parsers each raise their own
        if needs_code_trust(error):
            option = "data.trust_remote_code (of minrnn export: --trust-remote-code)"
            message = (
                f"{name!r} brings code of its own, which is not run; read it, and set {option} to run it"
            )
            raise UserError("data.tokenizer", message) from None
        message = str(error).splitlines()[0]
        raise UserError(
            "data.tokenizer",
            f"cannot load {name!r} (bytes, a folder, or a hub id): {type(error).__name__}: {message}",
        ) from error
    if not tokenizer.is_fast:
        raise UserError("data.tokenizer", f"{name!r} has no fast (tokenizers) version")
    return document_tokenizer(tokenizer, name)


def document_tokenizer(tokenizer: Any, name: str) -> Any:
    """A `PreTrainedTokenizerFast` with the same tokens that encodes any text as `<bos> text`, with nothing
    after it.

    It never has a model's own class, because such classes rebuild parts of themselves on loading; a plain one
    loads everywhere as it was saved. Names of special tokens in a text are encoded as text, padding is on the
    left, nothing is truncated. Missing bos, eos and pad tokens are filled in from each other.

    Raises:
        UserError: no token could end a document, or a text with that token's name would become the token.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    end = tokenizer.eos_token or tokenizer.bos_token
    if end is None:
        raise UserError(
            "data.tokenizer", f"{name!r} has neither an eos nor a bos token, so a document cannot end"
        )
    tokenizer.eos_token = end
    tokenizer.bos_token = tokenizer.bos_token or end
    tokenizer.pad_token = tokenizer.pad_token or end
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values |= {
        "truncation": None,
        "padding": None,
        "post_processor": _begins_with(tokenizer.bos_token, tokenizer.bos_token_id),
    }
    backend = Tokenizer.from_str(json.dumps(values))
    _split_names(backend)
    boundaries = {tokenizer.bos_token_id: tokenizer.bos_token, tokenizer.eos_token_id: tokenizer.eos_token}
    if unsplit := [boundaries[number] for number in _read_as_tokens(backend).keys() & boundaries.keys()]:
        names = " or ".join(map(repr, unsplit))
        problem = f"{name!r} reads the text {names} as the token that bounds documents"
        raise UserError("data.tokenizer", f"{problem}; choose a tokenizer that spells such names out")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        extra_special_tokens=tokenizer.extra_special_tokens,
        chat_template=tokenizer.chat_template,
        **SAVED_SETTINGS,
    )


def _begins_with(bos: str, number: int) -> dict[str, Any]:
    """The post-processor that writes bos before each text, as tokenizer.json holds it.

    The Python class TemplateProcessing does not accept every token name.
    """
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [token, texts[0]],
        "pair": [token, texts[0], token, texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def _read_as_tokens(backend: Any) -> dict[int, str]:
    """Special tokens, by id, that the model produces for their names in a text: those in its own vocabulary,
    as T5's.
    """
    backend.encode_special_tokens = True
    special = {
        number: token.content for number, token in backend.get_added_tokens_decoder().items() if token.special
    }
    ids = {
        number: backend.encode(f"{name} x{name}", add_special_tokens=False).ids
        for number, name in special.items()
    }
    return {number: name for number, name in special.items() if number in ids[number]}


def _split_names(backend: Any) -> None:
    """Make the last pre-tokenizer cut such names after their first character, so that the model never sees
    one whole.
    """
    from tokenizers import Regex, pre_tokenizers

    names = [name for name in _read_as_tokens(backend).values() if len(name) > 1]
    if names:
        pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        before = backend.pre_tokenizer
        backend.pre_tokenizer = split if before is None else pre_tokenizers.Sequence([before, split])


def needs_code_trust(error: Exception) -> bool:
    """Whether transformers refused to load something because its code was not trusted."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


@dataclass
class Encoder:
    """Encodes a document as `<bos> text <eos>`.

    It is small to pickle, and worker processes need no transformers for it.
    """

    bos: int
    eos: int
    backend_json: str | None
    """The `tokenizers` tokenizer as JSON; None for bytes."""
    _backend: Any = field(default=None, repr=False)
    _cutter: Any = field(default=None, repr=False)
    _dtype: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, name: str) -> "Encoder":
        """The encoder for a tokenizer that `load_tokenizer(name)` returned."""
        backend_json = None if name == BYTES else tokenizer.backend_tokenizer.to_str()
        return cls(tokenizer.bos_token_id, tokenizer.eos_token_id, backend_json)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_backend": None, "_cutter": None}

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of uint16 and uint32 that holds every token."""
        if self._dtype is None:
            largest = 255 if self.backend_json is None else max(self._tokenizer().get_vocab().values())
            self._dtype = np.dtype(np.uint16 if max(largest, self.bos, self.eos) < 2**16 else np.uint32)
        return self._dtype

    def __call__(self, text: str) -> np.ndarray:
        """Encode a document, `dtype` [1 + tokens + 1]; names of special tokens in the text are text."""
        return self.documents([text])[0]

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode documents as `__call__`, many in each call of the tokenizer, which uses all cores and
        releases the GIL.

        A text of n bytes takes at most 5 n bytes besides itself and the result of one call: long texts are
        encoded piece by piece, unless `TextCutter` cannot cut them.
        """
        if self.backend_json is None:
            return self.with_bounds([np.frombuffer(text.encode(), np.uint8) for text in texts])
        documents = [array.array(self.dtype.char, [self.bos]) for _ in texts]
        for batch in self._batches(texts):
            encodings = self._tokenizer().encode_batch_fast(
                [piece for _, piece in batch], add_special_tokens=False
            )
            for (number, _), encoding in zip(batch, encodings, strict=True):
                documents[number].extend(encoding.ids)
        for document in documents:
            document.append(self.eos)
        return [np.frombuffer(document, self.dtype) for document in documents]

    def _batches(self, texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
        """The pieces of all texts, each with the number of its text, in groups of about BATCH characters."""
        batch: list[tuple[int, str]] = []
        size = 0
        for number, text in enumerate(texts):
            for piece in self._pieces(text):
                batch.append((number, piece))
                size += len(piece)
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _pieces(self, text: str) -> Iterable[str]:
        if len(text) <= PIECE:
            return [text]
        if self._cutter is None:
            self._cutter = TextCutter(self._tokenizer())
        return self._cutter.pieces(text)

    def with_bounds(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The tokens of each text between bos and eos, `dtype`; views of one array."""
        ends = list(itertools.accumulate(len(tokens) + 2 for tokens in texts))
        joined = np.empty(ends[-1] if ends else 0, self.dtype)
        documents = [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        for document, tokens in zip(documents, texts, strict=True):
            document[0], document[1:-1], document[-1] = self.bos, tokens, self.eos
        return documents

    def encode(self, text: str) -> np.ndarray:
        """The tokens of the text alone, `dtype`, without bos and eos."""
        return self(text)[1:-1]

    def num_ids(self) -> int:
        """All ids are below this number."""
        if self.backend_json is None:
            return max(256, self.bos + 1, self.eos + 1)
        return max(self._tokenizer().get_vocab(with_added_tokens=True).values()) + 1

    def num_bytes(self, tokens: np.ndarray) -> int:
        """Number of bytes of the text that the tokens decode to."""
        if self.backend_json is None:
            return len(tokens)
        return num_bytes(self._tokenizer().decode(tokens.tolist(), skip_special_tokens=False))

    def _tokenizer(self) -> Any:
        if self._backend is None:
            assert self.backend_json is not None
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_str(self.backend_json)
            self._backend.encode_special_tokens = True
            self._backend.no_truncation()  # many hub tokenizers were saved with truncation
            self._backend.no_padding()
        return self._backend


def num_bytes(text: str) -> int:
    """Number of bytes of a text in UTF-8: the divisor of bits per byte."""
    return len(text.encode())


def num_token_ids(tokenizer: Any) -> int:
    """All ids of a tokenizer are below this number."""
    return max(tokenizer.get_vocab().values()) + 1


def model_vocab_size(tokenizer: Any, multiple: int | None = None) -> int:
    """Number of rows of the model's embedding: the number of ids, rounded up for the matrix units.

    Args:
        multiple: what the number is a multiple of; None: 64, and 8 for fewer than 512 ids (bytes, the symbols
            of a task), whose products are one tile wide in any case.
    """
    num_ids = num_token_ids(tokenizer)
    multiple = multiple or (8 if num_ids < SMALL_VOCABULARY else 64)
    return -(-num_ids // multiple) * multiple
