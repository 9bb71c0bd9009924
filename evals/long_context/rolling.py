"""`minrnn rolling`: lm-eval's loglikelihood_rolling on one text of a million bytes.

document -> its first 1/16, 1/8, 1/4, 1/2, all of it -> loglikelihood_rolling, state carried
            all of it -> the same in windows of 2048 tokens, state reset
         -> bits per byte, seconds

If the time per byte is the same in all rows, the cost of a byte does not depend on the length.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from ...common.errors import UserError, missing_package_error
from ...common.files import write_json
from ...data.tokenizer import num_bytes
from ..output import default_out, table
from . import documents

DESCRIPTION = (
    "Bits per byte and seconds for growing prefixes of one document, "
    "measured with lm-eval's loglikelihood_rolling and our model class."
)
EXAMPLES = """examples:
  minrnn rolling runs/quickstart
  minrnn rolling my-model --corpus "lib/sympy/**/*.py" --document polys --bytes 4000000"""
FRACTIONS = (16, 8, 4, 2, 1)
WINDOW = 2048  # tokens: the usual window of published perplexities


def _parser() -> argparse.ArgumentParser:
    parser = documents.make_parser("minrnn rolling", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--bytes",
        type=int,
        default=1_000_000,
        help="bytes to read from the document's start (default: %(default)s)",
    )
    return parser


def text_prefix(text: str, size: int) -> str:
    """At most the first `size` bytes of a text, without a partial character."""
    return text.encode()[:size].decode(errors="ignore")


def score_rolling(lm: Any, text: str, window: int | None) -> dict[str, Any]:
    """Log-likelihood of a text after <bos>, without <eos>, and the time it takes.

    Args:
        lm: a MinRNNLM.
        window: tokens after which the state is reset; None: carried.
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
    """Score every prefix with the state carried, and the whole text in windows.

    A first reading, of the shortest, is not counted.
    """
    from tqdm import tqdm

    parts = [text_prefix(text, num_bytes(text) // fraction) for fraction in FRACTIONS]
    score_rolling(lm, parts[0], None)
    rows = []
    for fraction, part in zip(tqdm([*FRACTIONS, None], desc="readings"), [*parts, text], strict=True):
        name = "all, in windows" if fraction is None else "all" if fraction == 1 else f"1/{fraction}"
        rows.append({"part": name, **score_rolling(lm, part, WINDOW if fraction is None else None)})
    whole, windows = rows[-2], rows[-1]
    return {
        "rows": rows,
        "carried_minus_windows_bits_per_byte": whole["bits_per_byte"] - windows["bits_per_byte"],
        "time_per_byte_whole_over_first": whole["seconds_per_byte"] / rows[0]["seconds_per_byte"],
    }


def tables(result: dict[str, Any]) -> str:
    """The results as text."""
    columns: dict[str, Any] = {
        "read": lambda row: row["part"],
        "bytes": lambda row: f"{row['bytes']:,}",
        "bits/byte": lambda row: f"{row['bits_per_byte']:.4f}",
        "seconds": lambda row: f"{row['seconds']:.2f}",
        "µs/token": lambda row: f"{1e6 * row['seconds_per_token']:.2f}",
    }
    name = result["document"]["name"]
    title = f"{name}: loglikelihood_rolling, state carried; last row: windows of {WINDOW} tokens"
    return "\n".join(
        [
            table(result["rows"], columns, title),
            f"\ncarried minus windows: {result['carried_minus_windows_bits_per_byte']:+.4f} bits per byte",
            f"time per byte, all to 1/{FRACTIONS[0]}: {result['time_per_byte_whole_over_first']:.2f}",
        ]
    )


def main(argv: Sequence[str]) -> None:
    """Run `minrnn rolling`.

    Raises:
        UserError: the arguments, the model or the document are unusable, or lm-eval is missing.
    """
    arguments = _parser().parse_args(argv)
    if errors := documents.argument_errors(arguments, ("bytes",)):
        raise UserError.from_list(errors)
    try:
        from ..harness.model import MinRNNLM
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise missing_package_error("rolling", "lm-eval", extra="eval") from None
    model, tokenizer = documents.load_model(arguments)
    document = documents.find_document(arguments)
    text = text_prefix(document.text, arguments.bytes)
    # checks the length
    documents.document_tokens(dataclasses.replace(document, text=text), documents.document_encoder(tokenizer))
    head = documents.result_header("minrnn rolling", argv, model, {"document": document.summary()})
    result = {**head, "bytes": {"read": num_bytes(text), "asked_for": arguments.bytes}}
    result |= measure(MinRNNLM(model, tokenizer, piece=arguments.piece), text)
    out = arguments.out or default_out(arguments.model, "rolling")
    write_json(out, result)
    print(tables(result), f"\n{out} written", sep="\n")
