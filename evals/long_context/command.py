"""`minrnn long-context`: how a model uses the context of one document of a million tokens.

document -> loss with carried state, timed -> loss with the state reset every 2048, 8192, 32768 tokens
  -> by position, and effective memory length -> JSON, figure

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
from ...models import MinRNNForCausalLM
from ...pipeline.pictures import save_figure
from ..memory import current_memory, peak_memory, release_memory, reset_peak_memory, synchronize
from ..output import default_out, si, table
from . import documents
from .positions import (
    NUM_TARGETS,
    bucket_edges,
    bucket_losses,
    byte_counter,
    memory_contexts,
    memory_curve,
    token_nats,
)

DESCRIPTION = """Loss by position on one long document: with the state carried from first to last token, and
with the state reset ("cut") every so many tokens. Also how many tokens back the model looks, time and
memory. docs/long-context.md explains the results."""
EXAMPLES = """examples:
  minrnn long-context runs/quickstart
      the longest held-out module of python-stdlib
  minrnn long-context runs/quickstart --corpus "lib/sympy/**/*.py" --document polys
      the package "polys" of a library
  minrnn long-context my-model --corpus books.jsonl --join book_id
      the longest book, whose chapters are rows
  minrnn long-context my-model --corpus novel.txt --tokens 200000 --cuts 512,4096 --out novel.json"""


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
        help="reset the state every so many tokens, for comparison (default: %(default)s)",
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


def _cuts(arguments: argparse.Namespace) -> list[int]:
    """The cuts in rising order, if all arguments are valid.

    Raises:
        UserError: all errors in the arguments.
    """
    errors = documents.argument_errors(arguments, ("tokens", "anchors", "memory_tokens"))
    words = [word.strip() for word in arguments.cuts.split(",") if word.strip()]
    if invalid := [word for word in words if not word.isdecimal() or int(word) < 1]:
        errors.append(("--cuts", f"must be numbers of tokens, separated by commas, not {', '.join(invalid)}"))
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
    arguments: argparse.Namespace, cuts: Sequence[int], argv: Sequence[str], out: Path
) -> dict[str, Any]:
    """Measure everything, and write the file after each part."""
    model, tokenizer = documents.load_model(arguments)
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
    result = documents.result_header("minrnn long-context", argv, model, document)
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
    return result


def write(result: dict[str, Any], out: Path) -> None:
    """Write the file atomically."""
    write_json(out, result)


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def tables(result: dict[str, Any]) -> str:
    """The results as text."""
    cuts = list(result["overall"]["cut"])
    columns: dict[str, Any] = {
        "position": lambda row: f"{row['from']:,} to {row['to'] - 1:,}",
        "nats": lambda row: f"{row['carried']['nats']:.4f}",
        "bits/byte": lambda row: _number(row["carried"]["bits_per_byte"]),
    }
    for cut in cuts:
        columns[f"carried - cut {int(cut):,}"] = lambda row, cut=cut: (
            f"{row['cut'][cut]['carried_minus_cut']:+.4f} ± "
            + _number(row["cut"][cut]["carried_minus_cut_error"])
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
    length = memory["effective_memory_length"]
    length_text = f"{length:,} tokens" if length else f"more than {memory['curve'][-1]['context']:,} tokens"
    position_title = "loss by position, state carried; last row: all (standard errors from blocks of tokens)"
    memory_title = f"loss after so many tokens before {memory['anchors']} x {NUM_TARGETS} targets"
    return "\n".join(
        [
            table(rows, columns, position_title),
            table(result["stages"], time_columns, "time and memory, state carried"),
            table(memory["curve"], memory_columns, memory_title),
            f"\neffective memory length: {length_text} "
            f"(within {memory['tolerance']:g} nats of all the context)",
        ]
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw loss by position, the gain of carrying the state, and loss by number of tokens read before."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplot_mosaic(
        [["loss", "memory"], ["gain", "memory"]], height_ratios=(3, 2), width_ratios=(3, 2)
    )
    _draw_positions(axes, result)
    _draw_memory(axes["memory"], result["memory"])
    for name, panel in axes.items():
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        if name != "gain":
            panel.legend()
    size = f"{result['model']['parameters'] / 1e6:.1f}M parameters"
    figure.suptitle(f"{result['document']['name']}, {result['tokens']['read']:,} tokens; {size}", fontsize=10)
    FigureCanvasAgg(figure)
    save_figure(figure, path)


def _draw_positions(axes: dict[str, Any], result: dict[str, Any]) -> None:
    rows = result["buckets"]
    positions = [(max(row["from"], 1) * row["to"]) ** 0.5 for row in rows]
    axes["loss"].errorbar(
        positions,
        [row["carried"]["nats"] for row in rows],
        _error_bars(row["carried"]["error"] for row in rows),
        **_line(0, "carried"),
    )
    axes["gain"].axhline(0, color="tab:blue")
    for number, cut in enumerate(result["overall"]["cut"], 1):
        name = f"cut every {int(cut):,}"
        losses = [row["cut"][cut] for row in rows]
        axes["loss"].plot(positions, [loss["nats"] for loss in losses], **_line(number, name))
        axes["gain"].errorbar(
            positions,
            [loss["carried_minus_cut"] for loss in losses],
            _error_bars(loss["carried_minus_cut_error"] for loss in losses),
            **_line(number, name),
        )
    axes["loss"].set(ylabel="loss (nats per token)", title="loss by position in the document", xticklabels=[])
    axes["gain"].set(xlabel="position (tokens)", ylabel="carried minus cut (nats)\nbelow 0: carrying helps")


def _draw_memory(axes: Any, memory: dict[str, Any]) -> None:
    axes.errorbar(
        [row["context"] for row in memory["curve"]],
        [row["nats"] for row in memory["curve"]],
        _error_bars(row["error"] for row in memory["curve"]),
        **_line(0, None),
    )
    axes.axhline(memory["nats_with_all"], color="tab:gray", linestyle="--", label="all the context")
    if (length := memory["effective_memory_length"]) is not None:
        label = f"effective memory length: {length:,}"
        axes.axvline(length, color="tab:red", linestyle=":", label=label)
    axes.set(
        xlabel="tokens read before the targets, from an empty state",
        ylabel="loss (nats per token)",
        title="how far back the model looks",
    )


def _line(number: int, label: str | None) -> dict[str, Any]:
    return {"color": f"C{number}", "marker": "o", "markersize": 3, "linewidth": 1.2, "label": label}


def _error_bars(errors: Any) -> list[float]:
    """Lengths of error bars; NaN draws none."""
    return [float("nan") if error is None else error for error in errors]


def main(argv: list[str]) -> None:
    """Run `minrnn long-context`.

    Raises:
        UserError: the arguments, the model or the document are unusable.
    """
    arguments = _parser().parse_args(argv)
    cuts = _cuts(arguments)
    out = arguments.out or default_out(arguments.model, "long-context")
    result = measure(arguments, cuts, argv, out)
    draw(result, out.with_suffix(".png"))
    print(tables(result), f"\n{out} and {out.with_suffix('.png').name} written", sep="\n")
