"""`minrnn long-context`: how a model uses the context of one document of a million tokens.

document -> loss with carried state, timed -> loss with the state reset every 2048, 8192, 32768 tokens
  -> by position, and effective memory length -> the bands of memory length -> JSON, figure

or, for a synthetic task of long documents, accuracy by distance (distance.py).

The file is rewritten after each part, so finished measurements are kept.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...common.errors import UserError
from ...common.files import write_json
from ...data import is_task
from ...models import MinRNNForCausalLM
from ..memory import current_memory, peak_memory, release_memory, reset_peak_memory, synchronize
from ..output import default_out
from . import bands, distance, documents
from .positions import (
    NUM_TARGETS,
    bucket_edges,
    bucket_losses,
    byte_counter,
    memory_contexts,
    memory_curve,
    token_nats,
)
from .show import draw, tables

DESCRIPTION = """Loss by position on one long document: with the state carried from first to last token, and
with the state reset ("cut") every so many tokens. Also how many tokens back the model looks, time and
memory. --bands says which channels carry the context. With a task of long documents (synthetic/distant-key
or distant-register), accuracy by distance. docs/long-context.md explains the results."""
EXAMPLES = """examples:
  minrnn long-context runs/quickstart
      the longest held-out module of python-stdlib
  minrnn long-context runs/quickstart --corpus "lib/sympy/**/*.py" --document polys
      the package "polys" of a library
  minrnn long-context my-model --corpus books.jsonl --join book_id
      the longest book, whose chapters are rows
  minrnn long-context my-model --corpus novel.txt --tokens 200000 --cuts 512,4096 --out novel.json
  minrnn long-context my-model --corpus novel.txt --cuts 1024 --bands 16,256,4096
      which channels carry the gain: the loss if those of one memory length are reset every 1,024 tokens
  minrnn long-context runs/far --corpus synthetic/distant-key --cuts 64 --task '{test_lengths: [65538]}'
      accuracy by distance, on the task as the run was trained and at a distance of 65,536"""


def _parser() -> argparse.ArgumentParser:
    parser = documents.make_parser("minrnn long-context", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--tokens",
        type=int,
        default=2**20,
        help="tokens to read from the document's start (default: %(default)s)",
    )
    parser.add_argument(
        "--cuts",
        default="2048,8192,32768",
        help="reset the state every so many tokens, for comparison; all cuts are read in one pass "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--bands",
        default="",
        help="memory lengths in tokens that divide the channels into bands, e.g. 16,256,4096: the channels "
        "of one band are reset at every cut (default: not measured)",
    )
    parser.add_argument(
        "--task",
        metavar="OPTIONS",
        help="options of a synthetic task, as data.task (default: those of the run)",
    )
    parser.add_argument(
        "--anchors",
        type=int,
        default=256,
        help=f"positions before which {NUM_TARGETS} targets are scored, after 1, 2, 4, ... tokens of context "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--memory-tokens",
        type=int,
        default=4_000_000,
        help="maximum of tokens to read for the memory length (default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help="nats above the loss with all the context that the memory length allows (default: %(default)s)",
    )
    return parser


def _numbers(text: str) -> tuple[list[int], list[str]]:
    """The numbers of an option in rising order, and the words that are none."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    invalid = [word for word in words if not word.isdecimal() or int(word) < 1]
    return sorted({int(word) for word in words if word not in invalid}), invalid


def _cuts_and_bands(arguments: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The cuts and the edges of the bands in rising order, if all arguments are valid.

    Raises:
        UserError: all errors in the arguments.
    """
    errors = documents.argument_errors(arguments, ("tokens", "anchors", "memory_tokens"))
    cuts, edges = _numbers(arguments.cuts), _numbers(arguments.bands)
    for name, (_, invalid) in (("--cuts", cuts), ("--bands", edges)):
        if invalid:
            message = f"must be numbers of tokens, separated by commas, not {', '.join(invalid)}"
            errors.append((name, message))
    if edges[0] and not cuts[0]:
        errors.append(("--bands", "are reset at every cut; name one in --cuts"))
    if arguments.task is not None and not is_task(arguments.corpus):
        errors.append(("--task", f"is for synthetic/NAME, not for {arguments.corpus}; leave it out"))
    if not arguments.tolerance >= 0:
        errors.append(("--tolerance", f"must be 0 or more, not {arguments.tolerance:g}"))
    if not errors and not memory_contexts(2, arguments.anchors, arguments.memory_tokens):
        least = arguments.anchors * (NUM_TARGETS + 1)
        errors.append(
            (
                "--memory-tokens",
                f"must be at least {least} for {arguments.anchors} anchors; lower --anchors, or raise it",
            )
        )
    if errors:
        raise UserError.from_list(errors)
    return cuts[0], edges[0]


class Stages:
    """Records time and memory of reading a document, at each power of two and at the end."""

    def __init__(self, device: torch.device, length: int, bar: Any):
        self.device, self.length, self.bar = device, length, bar
        self.rows: list[dict[str, Any]] = []
        self._start = self._base = 0.0

    def __call__(self, position: int) -> None:
        """Call with 0 at the start, then with the position after each piece."""
        if position == 0:
            release_memory(self.device)
            reset_peak_memory(self.device)
            self._base = current_memory(self.device)
            synchronize(self.device)
            self._start = time.perf_counter()
            return
        self.bar.update(position - self.bar.n)
        if position.bit_count() == 1 or position == self.length:
            seconds = time.perf_counter() - self._start
            growth = max(0, peak_memory(self.device) - self._base)
            self.rows.append(
                {
                    "tokens": position,
                    "seconds": seconds,
                    "tokens_per_second": position / seconds,
                    "peak_growth_bytes": growth,
                }
            )


def read_carried(
    model: MinRNNForCausalLM, tokens: np.ndarray, piece: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Nats of each token [n] with the state carried, and time and memory.

    The first piece is read once before timing, to compile the code.
    """
    length = len(tokens) - 1
    token_nats(model, tokens[: piece + 1], piece=piece)
    with tqdm(total=length, desc="state carried", unit="tok", unit_scale=True) as bar:
        stages = Stages(model.device, length, bar)
        (nats,) = token_nats(model, tokens, piece=piece, on_progress=stages)
    return nats, stages.rows


def read_cut(
    model: MinRNNForCausalLM, tokens: np.ndarray, cuts: Sequence[int], piece: int
) -> dict[int, np.ndarray]:
    """Nats of each token [n], by cut. All cuts are computed in one pass, one row each."""
    if not cuts:
        return {}
    with tqdm(total=len(cuts) * (len(tokens) - 1), desc="state cut", unit="tok", unit_scale=True) as bar:
        nats = token_nats(
            model, tokens, cuts, piece, lambda position: bar.update(position * len(cuts) - bar.n)
        )
    return dict(zip(cuts, nats, strict=True))


def measure(
    arguments: argparse.Namespace, cuts: Sequence[int], edges: Sequence[int], argv: Sequence[str], out: Path
) -> dict[str, Any]:
    """Measure everything, and write the file after each part.

    Args:
        edges: of the bands; none leaves them out.
    """
    model, tokenizer = documents.load_model(arguments)
    if edges:
        bands.require_channels(model)
    document = documents.find_document(arguments)
    encoder = documents.document_encoder(tokenizer)
    tokens = documents.document_tokens(document, encoder, arguments.tokens)
    length, is_whole = len(tokens) - 1, tokens[-1] == encoder.eos
    print(
        f"{document.name}: {length:,} tokens"
        + (f", all of it (--tokens asks for {arguments.tokens:,})" if is_whole else ", its beginning")
    )
    for cut in [cut for cut in cuts if cut >= length]:
        print(f"a cut every {cut:,} tokens would leave it whole: not measured")
    text = {"document": document.summary()}
    result = documents.result_header("minrnn long-context", argv, model, text)
    result["tokens"] = {
        "read": length,
        "asked_for": arguments.tokens,
        "whole_document": bool(is_whole),
        "piece": arguments.piece,
    }
    carried, result["stages"] = read_carried(model, tokens, arguments.piece)
    (result["overall"],) = bucket_losses(carried, {}, byte_counter(encoder, tokens), [0, length])
    write(result, out)
    cut = read_cut(model, tokens, [cut for cut in cuts if cut < length], arguments.piece)
    num_bytes = byte_counter(encoder, tokens)
    (result["overall"],) = bucket_losses(carried, cut, num_bytes, [0, length])
    result["buckets"] = bucket_losses(carried, cut, num_bytes, bucket_edges(length))
    write(result, out)
    options = (arguments.anchors, arguments.memory_tokens, arguments.tolerance, arguments.piece)
    with tqdm(desc="memory length", unit="tok", unit_scale=True) as bar:
        result["memory"] = memory_curve(model, tokens, carried, *options, on_progress=bar.update)
    write(result, out)
    if edges:
        with tqdm(total=len(cut) * length, desc="bands", unit="tok", unit_scale=True) as bar:
            result["bands"] = bands.band_costs(
                model, tokens, carried, list(cut), edges, arguments.piece, bar.update
            )
        write(result, out)
    return result


def measure_task(
    arguments: argparse.Namespace, cuts: Sequence[int], edges: Sequence[int], argv: Sequence[str], out: Path
) -> dict[str, Any]:
    """Measure accuracy by distance on a task, write the file and draw it."""
    task = distance.stream_task(arguments)
    model, tokenizer = documents.load_model(arguments, spells_text=False)
    distance.check_vocabulary(arguments.corpus, task, tokenizer)
    text = {"task": distance.task_summary(arguments.corpus, task)}
    result = documents.result_header("minrnn long-context", argv, model, text)
    result |= distance.measure_task(model, task, cuts, edges, arguments.piece)
    write(result, out)
    distance.draw_task(result, arguments.corpus, out.with_suffix(".png"))
    return result


def write(result: dict[str, Any], out: Path) -> None:
    """Write the file atomically."""
    write_json(out, result)


def main(argv: list[str]) -> None:
    """Run `minrnn long-context`.

    Raises:
        UserError: the arguments, the model or the document are unusable.
    """
    arguments = _parser().parse_args(argv)
    cuts, edges = _cuts_and_bands(arguments)
    out = arguments.out or default_out(arguments.model, "long-context")
    if is_task(arguments.corpus):
        text = distance.task_tables(measure_task(arguments, cuts, edges, argv, out))
    else:
        result = measure(arguments, cuts, edges, argv, out)
        draw(result, out.with_suffix(".png"))
        text = tables(result)
    print(text, f"\n{out} and {out.with_suffix('.png').name} written", sep="\n")
