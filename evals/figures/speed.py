"""Sentences and tables of speed for README.md and docs/, from the committed results."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from ..output import RESULTS
from ..report import speed

GPU = RESULTS / "gpu"
TRAIN, GENERATE = RESULTS / "bench-train-cpu.json", RESULTS / "bench-generate-cpu.json"
scan_lines = partial(speed.scan_lines, RESULTS / "bench-scan-cpu.json")
train_lines = partial(speed.train_lines, TRAIN)
generate_lines = partial(speed.generate_lines, GENERATE)
contexts_line = partial(speed.contexts_line, GENERATE)
stream_line = partial(speed.stream_line, RESULTS / "bench-stream-cpu.json", RESULTS / "bench-length-cpu.json")
loop_line = partial(
    speed.loop_line, RESULTS / "bench-loop-cpu.json", link="../evals/results/bench-loop-cpu.json"
)
soak_line = partial(speed.soak_line, RESULTS / "soak.json", link="../evals/results/soak.json")


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def text() -> str:
    """The tables of docs/results.md: scan, training, decoding, one long document, the loop."""
    tables = ["\n".join(lines) for lines in (scan_lines(), train_lines(), generate_lines())]
    return "\n\n".join([*tables, contexts_line(), stream_line(), loop_line()])


def quickstart_line() -> str:
    """What the quickstart took, and what it reached."""
    results = _load(RESULTS / "quickstart.json")
    return (
        f"Measured on two cores of an AMD EPYC without a GPU ([file](evals/results/quickstart.json)): "
        f"{results['tokens'] / 1e6:.2f}M tokens in {results['training_seconds']} seconds, validation "
        f"included; {results['validation_subset']['bits_per_byte']:.2f} bits per byte on the held-out "
        f"modules that the run validates on, "
        f"{results['validation_all_held_out_modules']['bits_per_byte']:.2f} on all held-out modules."
    )


def comparison() -> str:
    """The README's table: training and decoding of all models that were measured, at two lengths each."""
    rates = {
        (row["contender"], row["length"]): f"{row['tokens_per_second']:,.0f}"
        for row in _load(TRAIN)["rows"]
        if row["section"] == "train" and "reason" not in row
    }
    times = {
        (row["contender"], row["context"]): f"{1e3 * row['median_seconds']:.1f}"
        for row in _load(GENERATE)["rows"]
        if row["section"] == "generate" and row["batch"] == 1 and "reason" not in row
    }
    lengths = sorted({length for _, length in rates})
    contexts = (1024, 131_072)
    names = [name for name in speed.TITLES if any(name == measured for measured, _ in rates)]
    titles = [f"training at length {length:,}, tokens/s" for length in lengths]
    titles += [f"decoding after {context:,}, ms/token" for context in contexts]
    lines = [f"| model | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for name in names:
        cells = [rates.get((name, length), "-") for length in lengths]
        cells += [times.get((name, context), "-") for context in contexts]
        lines.append(f"| {speed.TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_lines() -> str:
    """Training beside Llama, and the scan, on one GPU."""
    training = _load(GPU / "train.json")
    rows = [row for row in training["rows"] if row["section"] == "train" and "reason" not in row]
    rates = {(row["contender"], row["length"]): row["tokens_per_second"] for row in rows}
    lengths = sorted(length for name, length in rates if name == "llama")
    lines = ["| training, tokens/s | " + " | ".join(f"length {length:,}" for length in lengths) + " |"]
    lines.append("|---|" + "---|" * len(lengths))
    for name in ("minrnn", "llama"):
        cells = " | ".join(f"{rates[name, length]:,.0f}" for length in lengths)
        lines.append(f"| {speed.TITLES[name]} | {cells} |")
    ratios = " | ".join(f"{rates['minrnn', length] / rates['llama', length]:.1f}" for length in lengths)
    lines.append(f"| ratio | {ratios} |")
    first = next(row["shape"] for row in _load(GPU / "fused.json")["rows"] if row["section"] == "scan")
    of_add = {
        row["direction"]: row["of_torch.add"]
        for row in _load(GPU / "fused.json")["rows"]
        if (row["section"], row["contender"], row["shape"]) == ("scan", "minrnn", first)
    }
    scan = (
        f"The scan reaches {of_add['forward']:.2f} of `torch.add`'s rate forward, and "
        f"{of_add['forward+backward']:.2f} forward and backward ([file](../evals/results/gpu/fused.json))."
    )
    gpu = training["machine"]["gpu"]["name"]
    size = rows[0]["parameters"] / 1e6
    head = f"One {gpu}, bf16, {size:,.0f}M parameters ([file](../evals/results/gpu/train.json)):"
    return "\n\n".join([head, "\n".join(lines), scan])
