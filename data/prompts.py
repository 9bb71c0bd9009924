"""Prompts: text to the tokens that training makes of it, and what is written behind them to text.

prompt file or standard input -> text -> <bos> tokens -> (a model) -> new tokens -> text, piece by piece
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .sources import utf8

STANDARD_INPUT = "-"
NUM_CONTEXT_TOKENS = 16  # of the prompt: how a token is spelt may depend on the one before it
LONGEST_CHARACTER = 16  # tokens; bytes that spell no character by then never will
BROKEN = "\ufffd"  # what decoders write for bytes that spell no character


def read_prompt(path: Path, key: str) -> str:
    """The text of a file, or of standard input (`-`), as a corpus's files are read: its bytes as they are, without a byte order mark.

    Args:
        key: the option that named it, for errors.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    is_file = str(path) != STANDARD_INPUT
    name = str(path) if is_file else "standard input"
    try:
        return utf8(path.read_bytes() if is_file else sys.stdin.buffer.read())
    except UnicodeDecodeError as error:
        raise UserError((key, f"{name} is not UTF-8 (byte {error.start}); convert it")) from None
    except OSError as error:
        raise UserError((key, f"cannot read {name}: {error.strerror or error}")) from None


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """`<bos> text` as training reads a document, whatever the tokenizer writes around a text by itself (as those of old exports do)."""
    return [
        tokenizer.bos_token_id,
        *tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False),
    ]


def prompt_batch(tokenizer: Any, texts: Sequence[str]) -> Any:
    """`input_ids` and `attention_mask` [texts, longest] of `prompt_tokens`, padded on the left."""
    rows = [prompt_tokens(tokenizer, text) for text in texts]
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


class TextStream:
    """Tokens to text as they come: whole characters, no special tokens; each token costs the same, however much came before.

    (tokenizers' DecodeStream 0.23 raises where single bytes spell no character, as those of Llama's kind can, and writes a prompt again that
    ends in U+FFFD.)

    Args:
        tokenizer: that of the prompt.
        prompt: tokens that the text goes on behind.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self._special = set(tokenizer.all_special_ids)
        self._backend = tokenizer.backend_tokenizer
        last = self._text_tokens(prompt[-NUM_CONTEXT_TOKENS:])
        ends = (last[first:] for first in range(len(last)))  # those that begin amid a character spell none
        self._context = next((end for end in ends if BROKEN not in self._decode(end)), last)
        self._waiting: list[int] = []

    def _text_tokens(self, tokens: Iterable[int]) -> list[int]:
        return [token for token in tokens if token not in self._special]

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)

    def _text(self) -> str:
        """That of the waiting tokens."""
        return self._decode(self._context + self._waiting)[len(self._decode(self._context)) :]

    def write(self, tokens: Iterable[int]) -> str:
        """The text of these tokens; a character that is not whole yet waits for the next ones."""
        parts = []
        for token in self._text_tokens(tokens):
            self._waiting.append(token)
            text = self._text()
            if not text.endswith(BROKEN) or len(self._waiting) > LONGEST_CHARACTER:
                parts.append(text)
                self._context, self._waiting = self._waiting, []
        return "".join(parts)

    def end(self) -> str:
        """What still waits, but for a character that was never whole."""
        return self._text().rstrip(BROKEN)
