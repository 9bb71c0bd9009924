"""Tokenizers: bytes, or any of Hugging Face's.

The byte tokenizer is an ordinary `PreTrainedTokenizerFast` that needs no download: byte b has id b; then come <bos>, <eos> and <pad>. Text that
contains such a name stays text.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import UserError

BYTES = "bytes"
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")
SAVED = {  # what an export says of its tokenizer: tokenizer_config.json holds what the constructor was given
    "padding_side": "left",
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 2**30,
    "model_input_names": ["input_ids", "attention_mask"],
}


def _byte_alphabet() -> list[str]:
    """The printable character that the byte-level pre-tokenizer writes for each byte, by byte value (the GPT-2 table).

    Printable Latin-1 stands for itself; the remaining bytes take the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` over the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    vocabulary |= {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        **SAVED,
    )


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary: which token has which number."""
    numbered = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(numbered).encode()).hexdigest()


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """`"bytes"`, or what `AutoTokenizer.from_pretrained` loads from a folder or the hub, as `document_tokenizer` makes it.

    Args:
        trust_remote_code: run the code that it brings along. Without it transformers would ask at a prompt, which a pipe can answer.

    Raises:
        UserError: it cannot be loaded, is not a fast tokenizer, brings code that is not trusted, or cannot say where a document ends.
    """
    if name == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub client, the file system and the parsers each raise their own
        if wants_trust(error):
            option = "data.trust_remote_code (of minrnn export: --trust-remote-code)"
            told = f"{name!r} brings code of its own, which is not run; read it, and set {option} to run it"
            raise UserError(("data.tokenizer", told)) from None
        message = str(error).splitlines()[0]
        raise UserError(
            (
                "data.tokenizer",
                f"cannot load {name!r} (bytes, a folder, or a hub id): {type(error).__name__}: {message}",
            )
        ) from error
    if not tokenizer.is_fast:
        raise UserError(("data.tokenizer", f"{name!r} has no fast (tokenizers) version"))
    return document_tokenizer(tokenizer, name)


def document_tokenizer(tokenizer: Any, name: str) -> Any:
    """A `PreTrainedTokenizerFast` of the same tokens that encodes any text as a document begins: `<bos> text`, nothing behind it.

    It is of no model's own class, since those rebuild parts of themselves when they are loaded: what is saved here is loaded everywhere
    as it is. Names of special tokens in a text are text, padding is on the left, nothing is cut off; bos, eos and pad are filled in from
    each other.

    Raises:
        UserError: there is no token that could end a document, or the text of its name would become that token.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    end = tokenizer.eos_token or tokenizer.bos_token
    if end is None:
        raise UserError(
            ("data.tokenizer", f"{name!r} has neither an eos nor a bos token, so a document cannot end")
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
    if whole := [boundaries[number] for number in _read_as_tokens(backend).keys() & boundaries.keys()]:
        problem = (
            f"{name!r} reads the text {' or '.join(map(repr, whole))} as the token that bounds documents"
        )
        raise UserError(("data.tokenizer", f"{problem}; choose a tokenizer that spells such names out"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        extra_special_tokens=tokenizer.extra_special_tokens,
        chat_template=tokenizer.chat_template,
        **SAVED,
    )


def _begins_with(bos: str, number: int) -> dict[str, Any]:
    """The post-processor that writes bos before each text, as tokenizer.json holds it (its Python class does not take every name)."""
    token, texts = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
    )
    return {
        "type": "TemplateProcessing",
        "single": [token, texts[0]],
        "pair": [token, texts[0], token, texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def _read_as_tokens(backend: Any) -> dict[int, str]:
    """Names of special tokens, by id, that the model finds in a text where they are to be text: pieces of its vocabulary, as T5's."""
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
    """Let the last step before the model cut such names behind their first character, so that none reaches it whole."""
    from tokenizers import Regex, pre_tokenizers

    names = [name for name in _read_as_tokens(backend).values() if len(name) > 1]
    if names:
        pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        before = backend.pre_tokenizer
        backend.pre_tokenizer = split if before is None else pre_tokenizers.Sequence([before, split])


def wants_trust(error: Exception) -> bool:
    """Whether transformers refused to load something since it brings code that was not trusted."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


@dataclass
class Encoder:
    """Text to a document's tokens, `<bos> text <eos>`; small enough to be sent to a worker process, which needs no transformers."""

    bos: int
    eos: int
    backend_json: str | None
    """None: bytes."""
    _backend: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> "Encoder":
        """The encoder of a tokenizer that `load_tokenizer(name)` returned."""
        backend_json = None if name == BYTES else tokenizer.backend_tokenizer.to_str()
        return cls(tokenizer.bos_token_id, tokenizer.eos_token_id, backend_json)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_backend": None}

    def __call__(self, text: str) -> np.ndarray:
        """int32 [1 + tokens + 1]. A special token's name in the text is text."""
        return np.concatenate([[self.bos], self.encode(text), [self.eos]]).astype(np.int32)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of the text alone."""
        if self.backend_json is None:
            return np.frombuffer(text.encode(), dtype=np.uint8)
        return np.asarray(self._tokenizer().encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def num_bytes(self, tokens: np.ndarray) -> int:
        """Bytes of the text that these tokens spell."""
        if self.backend_json is None:
            return len(tokens)
        return num_bytes(self._tokenizer().decode(tokens.tolist(), skip_special_tokens=False))

    def _tokenizer(self) -> Any:
        if self._backend is None:
            assert self.backend_json is not None
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_str(self.backend_json)
            self._backend.encode_special_tokens = True
            self._backend.no_truncation()  # saved with many a tokenizer of the hub
            self._backend.no_padding()
        return self._backend


def num_bytes(text: str) -> int:
    """Bytes of UTF-8, what bits per byte divides by."""
    return len(text.encode())


def model_vocab_size(tokenizer: Any, multiple: int = 8) -> int:
    """Rows of the model's embedding: the tokenizer's ids, rounded up for the matrix units."""
    return -(-(max(tokenizer.get_vocab().values()) + 1) // multiple) * multiple
