"""`minrnn rolling`: lm-eval's own measure of a text, on one text that is a million bytes long.

document -> its first 1/16, 1/8, 1/4, 1/2, all of it -> MinRNNLM.loglikelihood_rolling, state carried -> bits per byte, seconds
                                       all of it     -> the same in windows of 2048 tokens, state reset

What a byte costs is the same at any length if the last column stays what it was.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from ...common.errors import UserError
from ...common.files import write_json
from ...data.tokenizer import num_bytes
from ..output import default_out, table
from . import documents

DESCRIPTION = (
    "Bits per byte and seconds of ever longer beginnings of one document, "
    "through lm-eval's loglikelihood_rolling with our model class."
)
EXAMPLES = """examples:
  minrnn rolling runs/quickstart
  minrnn rolling my-model --corpus "lib/sympy/**/*.py" --document polys --bytes 4000000"""
FRACTIONS = (16, 8, 4, 2, 1)
WINDOW = 2048  # tokens: how perplexities are mostly reported


def _parser() -> argparse.ArgumentParser:
    parser = documents.make_parser("minrnn rolling", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--bytes", type=int, default=1_000_000, help="of the document, from its start (default: %(default)s)"
    )
    return parser


def beginning(text: str, size: int) -> str:
    """The text's first bytes, `size` at most, whole characters."""
    return text.encode()[:size].decode(errors="ignore")


def score(lm: Any, text: str, window: int | None) -> dict[str, Any]:
    """Log-likelihood of a text behind <bos>, without its end, and what that took.

    Args:
        lm: A MinRNNLM.
        window: Tokens after which the state is reset; None: carried.
    """
    from lm_eval.api.instance import Instance

    lm.rolling_window = window
    start = time.perf_counter()
    (log_likelihood,) = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True
    )
    seconds = time.perf_counter() - start
    size, num_tokens = num_bytes(text), len(lm.tok_encode(text, add_special_tokens=False))
    return {
        "bytes": size,
        "tokens": num_tokens,
        "window": window,
        "nats": -log_likelihood,
        "bits_per_byte": -log_likelihood / (size * math.log(2)),
        "seconds": seconds,
        "seconds_per_token": seconds / num_tokens,
        "seconds_per_byte": seconds / size,
    }


def measure(lm: Any, text: str) -> dict[str, Any]:
    """Every beginning of the text with the state carried, and all of it in windows; a first reading, of the shortest, is not counted."""
    from tqdm import tqdm

    parts = [beginning(text, num_bytes(text) // fraction) for fraction in FRACTIONS]
    score(lm, parts[0], None)
    rows = []
    for fraction, part in zip(tqdm([*FRACTIONS, None], desc="readings"), [*parts, text], strict=True):
        name = "all, in windows" if fraction is None else "all" if fraction == 1 else f"1/{fraction}"
        rows.append({"part": name, **score(lm, part, WINDOW if fraction is None else None)})
    whole, windows = rows[-2], rows[-1]
    return {
        "rows": rows,
        "carried_minus_windows_bits_per_byte": whole["bits_per_byte"] - windows["bits_per_byte"],
        "time_per_byte_whole_over_first": whole["seconds_per_byte"] / rows[0]["seconds_per_byte"],
    }


def tables(result: dict[str, Any]) -> str:
    """What was found, to be read on a terminal."""
    columns: dict[str, Any] = {
        "read": lambda row: row["part"],
        "bytes": lambda row: f"{row['bytes']:,}",
        "bits/byte": lambda row: f"{row['bits_per_byte']:.4f}",
        "seconds": lambda row: f"{row['seconds']:.2f}",
        "µs/token": lambda row: f"{1e6 * row['seconds_per_token']:.2f}",
    }
    return "\n".join(
        [
            table(
                result["rows"],
                columns,
                f"{result['document']['name']}: loglikelihood_rolling, state carried; last: windows of {WINDOW} tokens",
            ),
            f"\ncarried minus windows: {result['carried_minus_windows_bits_per_byte']:+.4f} bits per byte",
            f"time per byte, all to 1/{FRACTIONS[0]}: {result['time_per_byte_whole_over_first']:.2f}",
        ]
    )


def main(argv: Sequence[str]) -> None:
    """Measure, print, write.

    Raises:
        UserError: arguments, a model or a document that cannot be used, or lm-eval is missing.
    """
    arguments = _parser().parse_args(argv)
    if errors := documents.argument_errors(arguments, ("bytes",)):
        raise UserError.from_list(errors)
    try:
        from ..harness.model import MinRNNLM
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError(
            "rolling", "lm-eval is not installed: make setup-eval, or pip install 'minrnn[eval]'"
        ) from None
    model, tokenizer = documents.load_model(arguments)
    document = documents.find_document(arguments)
    text = beginning(document.text, arguments.bytes)
    documents.tokens_of(
        dataclasses.replace(document, text=text), documents.encoder_of(tokenizer)
    )  # long enough?
    head = documents.what_was_run("minrnn rolling", argv, model, document)
    result = {**head, "bytes": {"read": num_bytes(text), "asked_for": arguments.bytes}}
    result |= measure(MinRNNLM(model, tokenizer, piece=arguments.piece), text)
    out = arguments.out or default_out(arguments.model, "rolling")
    write_json(out, result)
    print(tables(result), f"\n{out} written", sep="\n")
