"""`minrnn long-context`: what a model makes of a document's first million tokens.

document -> carried state, timed -> state cut every 2048, 8192, 32768 tokens -> by position, and how far back the model looks -> JSON, picture

The file is written anew behind each part, so that what was measured stays.
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
from ...models import MinRNNForCausalLM
from ...pipeline.pictures import save_figure
from ..memory import current_memory, peak_memory, release_memory, reset_peak_memory, synchronize
from ..output import default_out, si, table
from . import documents
from .positions import (
    NUM_TARGETS,
    bucket_edges,
    buckets,
    byte_counter,
    memory_contexts,
    memory_curve,
    token_nats,
)

DESCRIPTION = """Loss by position on one long document, the state carried from its first token to its last, beside the same model with its
state cut (reset) every so many tokens; how many tokens back the model looks; time and memory. docs/long-context.md says how to read it."""
EXAMPLES = """examples:
  minrnn long-context runs/quickstart                                         the longest held-out module of python-stdlib
  minrnn long-context runs/quickstart --corpus "lib/sympy/**/*.py" --document polys      of a library's packages, the one of that name
  minrnn long-context my-model --corpus books.jsonl --join book_id            the longest book, whose chapters are rows
  minrnn long-context my-model --corpus novel.txt --tokens 200000 --cuts 512,4096 --out novel.json"""


def _parser() -> argparse.ArgumentParser:
    parser = documents.make_parser("minrnn long-context", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--tokens",
        type=int,
        default=2**20,
        help="tokens of the document, from its start (default: %(default)s)",
    )
    parser.add_argument(
        "--cuts",
        default="2048,8192,32768",
        help="tokens after which the state is reset, to compare (default: %(default)s)",
    )
    parser.add_argument(
        "--anchors",
        type=int,
        default=256,
        help=f"places whose last {NUM_TARGETS} tokens are read from 1, 2, 4, ... tokens before",
    )
    parser.add_argument(
        "--memory-tokens",
        type=int,
        default=4_000_000,
        help="tokens to read for that, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help="nats that may be lacking at the effective memory length (default: %(default)s)",
    )
    return parser


def _cuts(arguments: argparse.Namespace) -> list[int]:
    """The cuts, rising, when all arguments are as they should be.

    Raises:
        UserError: all that is wrong with the arguments by themselves.
    """
    errors = documents.argument_errors(arguments, ("tokens", "anchors", "memory_tokens"))
    words = [word.strip() for word in arguments.cuts.split(",") if word.strip()]
    if strange := [word for word in words if not word.isdecimal() or int(word) < 1]:
        errors.append(("--cuts", f"must be numbers of tokens, separated by commas, not {', '.join(strange)}"))
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
    return sorted({int(word) for word in words})


class Stages:
    """Seconds and memory of a reading, at each power of two and at its end."""

    def __init__(self, device: torch.device, length: int, bar: Any):
        self.device, self.length, self.bar = device, length, bar
        self.rows: list[dict[str, Any]] = []
        self._start = self._base = 0.0

    def __call__(self, position: int) -> None:
        """Called with 0 at the start, and behind each piece."""
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
    """Nats of each token [n], the state carried, and what that took. The first piece is read before, as code is compiled on the way."""
    length = len(tokens) - 1
    token_nats(model, tokens[: piece + 1], piece=piece)
    with tqdm(total=length, desc="state carried", unit="tok", unit_scale=True) as bar:
        stages = Stages(model.device, length, bar)
        (nats,) = token_nats(model, tokens, piece=piece, moved=stages)
    return nats, stages.rows


def read_cut(
    model: MinRNNForCausalLM, tokens: np.ndarray, cuts: Sequence[int], piece: int
) -> dict[int, np.ndarray]:
    """Nats of each token [n] by how often the state is reset; all of them in one reading, a row for each."""
    if not cuts:
        return {}
    with tqdm(total=len(cuts) * (len(tokens) - 1), desc="state cut", unit="tok", unit_scale=True) as bar:
        nats = token_nats(
            model, tokens, cuts, piece, lambda position: bar.update(position * len(cuts) - bar.n)
        )
    return dict(zip(cuts, nats, strict=True))


def measure(
    arguments: argparse.Namespace, cuts: Sequence[int], argv: Sequence[str], out: Path
) -> dict[str, Any]:
    """All there is to measure, in the file as soon as it is known."""
    model, tokenizer = documents.load_model(arguments)
    document = documents.find_document(arguments)
    encoder = documents.encoder_of(tokenizer)
    tokens = documents.tokens_of(document, encoder, arguments.tokens)
    length, is_whole = len(tokens) - 1, tokens[-1] == encoder.eos
    print(
        f"{document.name}: {length:,} tokens"
        + (f", all of it (--tokens asks for {arguments.tokens:,})" if is_whole else ", its beginning")
    )
    for cut in [cut for cut in cuts if cut >= length]:
        print(f"a cut every {cut:,} tokens would leave it whole: not measured")
    result = documents.what_was_run("minrnn long-context", argv, model, document)
    result["tokens"] = {
        "read": length,
        "asked_for": arguments.tokens,
        "whole_document": bool(is_whole),
        "piece": arguments.piece,
    }
    carried, result["stages"] = read_carried(model, tokens, arguments.piece)
    (result["overall"],) = buckets(carried, {}, byte_counter(encoder, tokens), [0, length])
    write(result, out)
    cut = read_cut(model, tokens, [cut for cut in cuts if cut < length], arguments.piece)
    num_bytes = byte_counter(encoder, tokens)
    (result["overall"],) = buckets(carried, cut, num_bytes, [0, length])
    result["buckets"] = buckets(carried, cut, num_bytes, bucket_edges(length))
    write(result, out)
    options = (arguments.anchors, arguments.memory_tokens, arguments.tolerance, arguments.piece)
    with tqdm(desc="memory length", unit="tok", unit_scale=True) as bar:
        result["memory"] = memory_curve(model, tokens, carried, *options, moved=bar.update)
    write(result, out)
    return result


def write(result: dict[str, Any], out: Path) -> None:
    """The file, whole or not at all."""
    write_json(out, result)


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def tables(result: dict[str, Any]) -> str:
    """What was found, to be read on a terminal."""
    cuts = list(result["overall"]["cut"])
    columns: dict[str, Any] = {
        "position": lambda row: f"{row['from']:,} to {row['to'] - 1:,}",
        "nats": lambda row: f"{row['carried']['nats']:.4f}",
        "bits/byte": lambda row: _number(row["carried"]["bits_per_byte"]),
    }
    for cut in cuts:
        columns[f"carried - cut {int(cut):,}"] = lambda row, cut=cut: (
            f"{row['cut'][cut]['carried_minus_cut']:+.4f} ± {_number(row['cut'][cut]['carried_minus_cut_error'])}"
        )
    time_columns: dict[str, Any] = {
        "tokens": lambda row: f"{row['tokens']:,}",
        "seconds": lambda row: f"{row['seconds']:.2f}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "memory grew by": lambda row: si(row["peak_growth_bytes"], "B"),
    }
    memory_columns: dict[str, Any] = {
        "tokens before": lambda row: f"{row['context']:,}",
        "nats": lambda row: f"{row['nats']:.4f}",
        "above all context": lambda row: f"{row['above_all']:+.4f} ± {_number(row['error'])}",
    }
    memory = result["memory"]
    rows = [*result["buckets"], result["overall"]]
    found = memory["effective_memory_length"]
    told = f"{found:,} tokens" if found else f"more than {memory['curve'][-1]['context']:,} tokens"
    return "\n".join(
        [
            table(
                rows,
                columns,
                "loss by position, state carried; last: over all (standard errors from blocks of neighbours)",
            ),
            table(result["stages"], time_columns, "time and memory, state carried"),
            table(
                memory["curve"],
                memory_columns,
                f"loss from so many tokens before {memory['anchors']} x {NUM_TARGETS} targets",
            ),
            f"\neffective memory length: {told} (within {memory['tolerance']:g} nats of all the context)",
        ]
    )


def draw(result: dict[str, Any], picture: Path) -> None:
    """Loss over position, what carrying the state gains over cutting it, and loss over the number of tokens read before."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplot_mosaic(
        [["loss", "memory"], ["gain", "memory"]], height_ratios=(3, 2), width_ratios=(3, 2)
    )
    rows = result["buckets"]
    places = [(max(row["from"], 1) * row["to"]) ** 0.5 for row in rows]
    axes["loss"].errorbar(
        places,
        [row["carried"]["nats"] for row in rows],
        _errors(row["carried"]["error"] for row in rows),
        **_line(0, "carried"),
    )
    axes["gain"].axhline(0, color="tab:blue")
    for number, cut in enumerate(result["overall"]["cut"], 1):
        name = f"cut every {int(cut):,}"
        found = [row["cut"][cut] for row in rows]
        axes["loss"].plot(places, [one["nats"] for one in found], **_line(number, name))
        gains, errors = (
            [one["carried_minus_cut"] for one in found],
            _errors(one["carried_minus_cut_error"] for one in found),
        )
        axes["gain"].errorbar(places, gains, errors, **_line(number, name))
    axes["loss"].set(ylabel="loss (nats per token)", title="loss by position in the document", xticklabels=[])
    axes["gain"].set(xlabel="position (tokens)", ylabel="carried minus cut (nats)\nbelow 0: carrying helps")
    memory = result["memory"]
    contexts = [row["context"] for row in memory["curve"]]
    axes["memory"].errorbar(
        contexts,
        [row["nats"] for row in memory["curve"]],
        _errors(row["error"] for row in memory["curve"]),
        **_line(0, None),
    )
    axes["memory"].axhline(memory["nats_with_all"], color="tab:gray", linestyle="--", label="all the context")
    if (found := memory["effective_memory_length"]) is not None:
        axes["memory"].axvline(
            found, color="tab:red", linestyle=":", label=f"effective memory length: {found:,}"
        )
    axes["memory"].set(
        xlabel="tokens read before the targets, from an empty state",
        ylabel="loss (nats per token)",
        title="how far back it looks",
    )
    for name, panel in axes.items():
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        if name != "gain":
            panel.legend()
    size = f"{result['model']['parameters'] / 1e6:.1f}M parameters"
    figure.suptitle(f"{result['document']['name']}, {result['tokens']['read']:,} tokens; {size}", fontsize=10)
    FigureCanvasAgg(figure)
    save_figure(figure, picture)


def _line(number: int, label: str | None) -> dict[str, Any]:
    return {"color": f"C{number}", "marker": "o", "markersize": 3, "linewidth": 1.2, "label": label}


def _errors(errors: Any) -> list[float]:
    """Lengths of error bars; none where there is no error."""
    return [float("nan") if error is None else error for error in errors]


def main(argv: list[str]) -> None:
    """`minrnn long-context ...`

    Raises:
        UserError: arguments, a model or a document that cannot be used.
    """
    arguments = _parser().parse_args(argv)
    cuts = _cuts(arguments)
    out = arguments.out or default_out(arguments.model, "long-context")
    result = measure(arguments, cuts, argv, out)
    draw(result, out.with_suffix(".png"))
    print(tables(result), f"\n{out} and {out.with_suffix('.png').name} written", sep="\n")
