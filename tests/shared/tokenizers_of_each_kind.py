"""Small tokenizers of the kinds on the hub, each with transformers' class for it, trained on a few lines."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
)

LINES = [
    "the cat sat on the mat, and the other cat sat on the hat.\n" * 20,
    "def f(x):\n    return x + 1\n" * 20,
    "Any tokenizer of text can spell this sentence. ABCxyz<>/|[]_:'",
]


def _trained(backend: Tokenizer, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(LINES, trainer)
    return backend


def _byte_level(add_prefix_space: bool, special: list[str]) -> tuple[dict[str, int], Any]:
    """Vocabulary and merges of a byte-level BPE."""

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    model = json.loads(_trained(backend, trainer).to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def gpt2() -> Any:
    """Adds no tokens; one special token for all purposes."""
    vocabulary, merges = _byte_level(False, ["<|endoftext|>"])
    return GPT2Tokenizer(vocab=vocabulary, merges=merges)


def roberta() -> Any:
    """Ends every encoding with </s>; adds a space before the first word."""
    vocabulary, merges = _byte_level(True, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return RobertaTokenizer(vocab=vocabulary, merges=merges, add_prefix_space=True)


def llama() -> Any:
    """Metaspace and byte fallback: the first word is encoded as after a space."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]

    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    model = json.loads(_trained(backend, trainer).to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def bert() -> Any:
    """WordPiece between [CLS] and [SEP], in lower case."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _trained(backend, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    return BertTokenizer(vocab=backend.get_vocab(), bos_token="[CLS]", eos_token="[SEP]")


def t5() -> Any:
    """Unigram, ends with </s>, no bos; </s> is a piece that the model can match in a text."""

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    vocabulary = json.loads(_trained(backend, trainer).to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[tuple(piece) for piece in vocabulary], extra_ids=3)


def odd() -> Any:
    """Truncation, padding, special tokens that look like template syntax, other added tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<|x:1|>", "<e nd>", "$A"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _trained(
        backend,
        trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.add_tokens(["    ", "cat sat"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|x:1|>",
        eos_token="<e nd>",
        pad_token="$A",
        padding_side="right",
    )


KINDS = {"gpt2": gpt2, "roberta": roberta, "llama": llama, "bert": bert, "t5": t5, "odd": odd}


def saved(kind: str, folder: Path) -> str:
    """Save a tokenizer of this kind to a folder, and return its path."""
    KINDS[kind]().save_pretrained(folder)
    return str(folder)
