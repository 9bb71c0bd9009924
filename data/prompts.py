"""Encodes prompts as training does, and decodes generated tokens to text piece by piece.

prompt file or standard input -> text -> <bos> tokens -> (a model) -> new tokens -> text, piece by piece
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from .sources import decode_utf8

STANDARD_INPUT = "-"
NUM_CONTEXT_TOKENS = 16  # of the prompt: the decoding of a token may depend on the tokens before it
LONGEST_CHARACTER = 16  # in tokens; bytes that make no character by then never will
BROKEN = "\ufffd"  # what decoders write for bytes that make no character


def read_prompt(path: Path, key: str) -> str:
    """Read a prompt from a file or from standard input (`-`), like a text of a corpus: without a byte order
    mark.

    Args:
        key: the option that named the file, for errors.

    Raises:
        UserError: the input cannot be read, or is not UTF-8.
    """
    is_file = str(path) != STANDARD_INPUT
    name = str(path) if is_file else "standard input"
    try:
        return decode_utf8(path.read_bytes() if is_file else sys.stdin.buffer.read())
    except UnicodeDecodeError as error:
        raise UserError(key, f"{name} is not UTF-8 (byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(key, f"cannot read {name}: {error.strerror or error}") from None


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Encode `<bos> text` as training reads a document, independent of the tokenizer's post-processor (old
    exports differ).
    """
    return [
        tokenizer.bos_token_id,
        *tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False),
    ]


def begin_token(tokenizer: Any) -> int:
    """The token before a text without context: bos, else eos, as in lm-eval's own class."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def family_prompt_tokens(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Encode a prompt for a model of transformers as its tokenizer does, as lm-eval's own class reads it.

    It has bos only if the tokenizer writes it: those of exports do, those of the hub may not. Names of
    special tokens in the text are tokens, if the tokenizer reads them so. Without text there may be no token
    at all; a model then reads `begin_token`.
    """
    is_begun = text.startswith(tokenizer.decode([begin_token(tokenizer)]))
    return tokenizer.encode(text, add_special_tokens=add_special_tokens and not is_begun, verbose=False)


def prompt_batch(tokenizer: Any, texts: Sequence[str]) -> Any:
    """`input_ids` and `attention_mask` [texts, longest] of the encoded prompts, padded on the left."""
    rows = [prompt_tokens(tokenizer, text) for text in texts]
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


class TextStream:
    """Decodes tokens as they are generated, to whole characters without special tokens, at constant cost per
    token.

    tokenizers' DecodeStream (0.23) is not used: it raises where single bytes make no character (byte
    fallback, as in Llama's tokenizer), and repeats a prompt that ends in U+FFFD.

    Args:
        tokenizer: that of the prompt.
        prompt: the tokens before the generated ones.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self._special = set(tokenizer.all_special_ids)
        self._backend = tokenizer.backend_tokenizer
        last = self._text_tokens(prompt[-NUM_CONTEXT_TOKENS:])
        # a suffix that begins within a character decodes to BROKEN
        ends = (last[first:] for first in range(len(last)))
        self._context = next((end for end in ends if BROKEN not in self._decode(end)), last)
        self._waiting: list[int] = []

    def _text_tokens(self, tokens: Iterable[int]) -> list[int]:
        return [token for token in tokens if token not in self._special]

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)

    def _text(self) -> str:
        """The text of the tokens that were not written yet."""
        return self._decode(self._context + self._waiting)[len(self._decode(self._context)) :]

    def write(self, tokens: Iterable[int]) -> str:
        """Add tokens and return the new text. An incomplete character is held back until it is complete."""
        parts = []
        for token in self._text_tokens(tokens):
            self._waiting.append(token)
            text = self._text()
            if not text.endswith(BROKEN) or len(self._waiting) > LONGEST_CHARACTER:
                parts.append(text)
                self._context, self._waiting = self._waiting, []
        return "".join(parts)

    def end(self) -> str:
        """Return the text that was held back, without an incomplete character."""
        return self._text().rstrip(BROKEN)
