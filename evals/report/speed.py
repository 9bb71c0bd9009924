"""Results of benches and of the soak, as tables and sentences in Markdown."""

import json
from pathlib import Path
from typing import Any

TITLES = {
    "minrnn": "minrnn",
    "log-space": "log-space scan",
    "mambapy": "mambapy",
    "minGRU-pytorch": "minGRU-pytorch",
    "llama": "Llama (SDPA)",
    "lstm": "nn.LSTM",
    "gru": "nn.GRU",
    "mamba2": "Mamba-2",
    "xlstm": "xLSTM",
    "mamba": "Mamba",
}


def _load(source: Path) -> list[dict[str, Any]]:
    return json.loads(source.read_text())["rows"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _rows(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Rows with these values, those that ran."""
    return [
        row
        for row in rows
        if "reason" not in row and all(row.get(key) == value for key, value in wanted.items())
    ]


def scan_lines(source: Path, dtype: str = "fp32") -> list[str]:
    """Rates of the general scan as fractions of torch.add's in the same run."""
    rows = [row for row in _rows(_load(source), section="scan", dtype=dtype) if not row.get("sweep")]
    points = list(dict.fromkeys((tuple(row["shape"]), row["direction"]) for row in rows))
    table = {(row["contender"], tuple(row["shape"]), row["direction"]): row["of_torch.add"] for row in rows}
    titles = (f"{' x '.join(f'{size:,}' for size in shape)}, {direction}" for shape, direction in points)
    lines = [_line(f"scan, {dtype}", *titles), "|---|" + "---|" * len(points)]
    for name in ("minrnn", "mambapy", "log-space"):
        cells = (f"{table[name, *point]:.3f}" if (name, *point) in table else "-" for point in points)
        lines.append(_line(TITLES[name], *cells))
    return lines


def train_lines(source: Path) -> list[str]:
    """Tokens a second of training by length."""
    rows = _rows(_load(source), section="train")
    lengths = sorted({row["length"] for row in rows})
    table = {(row["contender"], row["length"]): row for row in rows}
    lines = [
        _line("training, tokens/s", *(f"length {length:,}" for length in lengths)),
        "|---|" + "---|" * len(lengths),
    ]
    for name in dict.fromkeys(row["contender"] for row in rows if row["contender"] in TITLES):
        cells = (
            f"{table[name, length]['tokens_per_second']:,.0f}" if (name, length) in table else "-"
            for length in lengths
        )
        lines.append(_line(TITLES[name], *cells))
    fractions = (
        f"{table['minrnn', length]['matmul_fraction']:.2f}" if ("minrnn", length) in table else "-"
        for length in lengths
    )
    return [*lines, _line("minrnn, of the matrix product's rate", *fractions)]


def generate_lines(source: Path) -> list[str]:
    """Milliseconds a token after contexts."""
    rows = _rows(_load(source), section="generate", batch=1)
    contexts = sorted({row["context"] for row in rows})
    table = {(row["contender"], row["context"]): row for row in rows}
    lines = [
        _line("decoding, ms/token", *(f"after {context:,}" for context in contexts)),
        "|---|" + "---|" * len(contexts),
    ]
    for name in dict.fromkeys(row["contender"] for row in rows if row["contender"] in TITLES):
        cells = (
            f"{1e3 * table[name, context]['median_seconds']:.1f}" if (name, context) in table else "-"
            for context in contexts
        )
        lines.append(_line(TITLES[name], *cells))
    return lines


def contexts_line(source: Path) -> str:
    """Ours after all contexts, measured in one rotation."""
    rows = _rows(_load(source), section="contexts", batch=1)
    first, last = (pick(rows, key=lambda row: row["context"]) for pick in (min, max))
    return (
        f"In one rotation of its own, minrnn's token after {last['context']:,} (all of them read) takes {last['of_shortest']:.2f} of the time "
        f"after {first['context']:,}, and {last['peak_bytes'] / 1e6:.0f} MB of memory, weights included, against "
        f"{first['peak_bytes'] / 1e6:.0f} MB."
    )


def stream_line(source: Path, rows: Path) -> str:
    """Training on long rows and on one long document."""
    (row,) = _rows(_load(source), section="stream")
    rates = {
        (row["contender"], row["length"]): row["tokens_per_second"]
        for row in _rows(_load(rows), section="train")
    }
    longest = max(length for _, length in rates)
    return (
        f"One document of {row['tokens_read']:,} tokens, read {row['chunk']:,} at a time with the state carried, trains at "
        f"{row['tokens_per_second']:,.0f} tokens/s in {row['peak_bytes'] / 1e9:.1f} GB. Rows of {longest:,} tokens train at "
        f"{rates['minrnn-chunked', longest] / rates['minrnn', 512]:.2f} of the rate of rows of 512 in such pieces, and at "
        f"{rates['minrnn', longest] / rates['minrnn', 512]:.2f} whole."
    )


def loop_line(source: Path, link: str) -> str:
    """What the loop adds to its steps; `link` is where a reader finds the file."""
    (row,) = _rows(_load(source), section="loop", contender="loop")
    return (
        f"At the quickstart's size, the loop with its data, logging, tracking and a checkpoint every {row['steps']} steps takes "
        f"{100 * row['overhead']:+.1f} % of the time of the steps alone ([file]({link}))."
    )


def soak_line(source: Path, link: str) -> str:
    """What a run survived; `link` is where a reader finds the file."""
    soak = json.loads(source.read_text())
    faults = ", ".join(f"{count} x {name}" for name, count in soak["faults"].items())
    return (
        f"In a soak of {soak['steps']:,} steps on two processes ([file]({link})), {soak['kills']} times `kill -9` among its "
        f"faults ({faults}), {soak['steps_repeated']:,} steps were taken again, {soak['checkpoints_refused']} broken checkpoints refused, and "
        f"{len(soak['problems'])} things differed from an undisturbed run"
        + ("." if soak["problems"] else ": every loss is equal to the bit, every step is there once.")
    )
