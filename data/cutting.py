"""Where a long text can be cut so that the tokens of its pieces are the tokens of the whole text.

The only places are between a letter and an ASCII whitespace character. Most tokenizers that divide a text
into words before their model reads it (byte-level BPE, WordPiece) divide it there. `TextCutter` refuses every
tokenizer for which this is not certain: normalizers and pre-tokenizers of other kinds, patterns that look
back, added tokens that could span such a place. It then compares the tokens of random texts with those of
their pieces, and at every cut the tokens around it. Texts of a tokenizer that is refused are not cut.
"""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

PIECE = 2**14  # characters of a piece, at least
CONTEXT = 64  # characters on either side of a cut that are compared
NUM_TRIALS = 400
ALPHABET = (
    *("a", "B", "z", "s", "t", "ll", "é", "漢", "字", "ß", "İ", "ﬁ", "Ω", "1", "23", "٣", "½", "."),
    *(",", "'", '"', "-", "_", "(", "<", "|", ">", "/", "#", "\u0301", "\u200d", "🙂", "\u00a0", "\u2028"),
    *(" ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "the", "it's", "▁", "Ġ"),
)

NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}  # local to a character and its combining marks
PRE_TOKENIZERS = {
    *("ByteLevel", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits", "Punctuation", "Split"),
    "UnicodeScripts",
}
CUT = re.compile(r"[^\W\d_](?=[ \t\r\n])")
CLASS_OR_LITERAL = re.compile(r"\[(?:\\.|[^\]\\])*\]|\\[^bBAzZGK]")  # of a pattern; none of them looks back
LOOKS_BACK = re.compile(r"\(\?<[=!]|\\[bBAzZGK]|[\^$]")  # lookbehind, boundaries, anchors


class TextCutter:
    """Cuts texts for a `tokenizers.Tokenizer`."""

    def __init__(self, backend: Any):
        self._backend = backend
        self.can_cut = _has_local_parts(json.loads(backend.to_str())) and self._agrees_on_random_texts()
        """Whether texts may be cut at all."""

    def pieces(self, text: str) -> Iterator[str]:
        """The pieces of a text: each at least PIECE characters, up to the next place that is safe."""
        start = 0
        while self.can_cut and len(text) - start > PIECE:
            end = self._next_place(text, start + PIECE)
            if end is None:
                break
            yield text[start:end]
            start = end
        yield text[start:] if start else text

    def _next_place(self, text: str, after: int) -> int | None:
        for match in CUT.finditer(text, after):
            place = match.end()
            context = text[place - CONTEXT : place], text[place : place + CONTEXT]
            if match[0].isalpha() and self._agrees(context):
                return place
        return None

    def _agrees(self, *contexts: tuple[str, str]) -> bool:
        """Whether the tokens of each pair of texts, encoded together, are those of both alone."""
        texts = [text for left, right in contexts for text in (left + right, left, right)]
        ids = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        return all(ids[i] == ids[i + 1] + ids[i + 2] for i in range(0, len(ids), 3))

    def _agrees_on_random_texts(self) -> bool:
        generator = random.Random(0)
        contexts = []
        for _ in range(NUM_TRIALS):
            text = "".join(generator.choices(ALPHABET, k=24))
            if places := [match.end() for match in CUT.finditer(text) if match[0].isalpha()]:
                place = generator.choice(places)
                contexts.append((text[:place], text[place:]))
        return self._agrees(*contexts)


def _has_local_parts(tokenizer: dict[str, Any]) -> bool:
    """Whether normalizer, pre-tokenizer and added tokens cannot reach across a place of `CUT`.

    Args:
        tokenizer: the content of tokenizer.json.
    """
    pre_tokenizers = _parts(tokenizer["pre_tokenizer"], "pretokenizers")
    return (
        all(part["type"] in NORMALIZERS for part in _parts(tokenizer["normalizer"], "normalizers"))
        and bool(pre_tokenizers)
        and all(part["type"] in PRE_TOKENIZERS and not _reaches(part) for part in pre_tokenizers)
        and not any(token["rstrip"] or CUT.search(token["content"]) for token in tokenizer["added_tokens"])
    )


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The components that a component, which may be a sequence, consists of."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for inner in component[key] for part in _parts(inner, key)]


def _reaches(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a pattern can depend on what is before it, or hold a place of `CUT`."""
    pattern = pre_tokenizer.get("pattern", {})
    expression = CLASS_OR_LITERAL.sub("", pattern.get("Regex", ""))
    return bool(LOOKS_BACK.search(expression) or CUT.search(pattern.get("String", "")))
