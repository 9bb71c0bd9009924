"""Results of benchmarks and of the soak test, as tables and sentences in Markdown."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
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


def _load(source: Path) -> Rows:
    return json.loads(source.read_text())["rows"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _rows(rows: Rows, **fields: Any) -> Rows:
    """The rows that ran and have these values."""
    return [
        row
        for row in rows
        if "reason" not in row and all(row.get(key) == value for key, value in fields.items())
    ]


def scan_lines(source: Path, dtype: str = "fp32") -> list[str]:
    """Rates of the scan, as fractions of the rate of torch.add in the same run."""
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
    """Training rates in tokens per second, by length."""
    rows = _rows(_load(source), section="train")
    lengths = sorted({row["length"] for row in rows})
    titles = ["training, tokens/s", *(f"length {length:,}" for length in lengths)]
    lines = _table(titles, rows, "length", lambda row: f"{row['tokens_per_second']:,.0f}")
    fractions = _cells(rows, "minrnn", "length", lengths, lambda row: f"{row['matmul_fraction']:.2f}")
    return [*lines, _line("minrnn, of the matrix product's rate", *fractions)]


def generate_lines(source: Path) -> list[str]:
    """Milliseconds per token after a context."""
    rows = _rows(_load(source), section="generate", batch=1)
    contexts = sorted({row["context"] for row in rows})
    titles = ["decoding, ms/token", *(f"after {context:,}" for context in contexts)]
    return _table(titles, rows, "context", lambda row: f"{1e3 * row['median_seconds']:.1f}")


def _table(titles: list[str], rows: Rows, key: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """A line for each contender, a column for each value of `key`, below the titles."""
    values = sorted({row[key] for row in rows})
    names = dict.fromkeys(row["contender"] for row in rows if row["contender"] in TITLES)
    lines = (_line(TITLES[name], *_cells(rows, name, key, values, cell)) for name in names)
    return [_line(*titles), "|---|" + "---|" * len(values), *lines]


def _cells(
    rows: Rows, name: str, key: str, values: list[int], cell: Callable[[dict[str, Any]], str]
) -> Iterator[str]:
    """The cells of a contender; `-` where it was not measured."""
    measured = {row[key]: row for row in rows if row["contender"] == name}
    return (cell(measured[value]) if value in measured else "-" for value in values)


def contexts_line(source: Path) -> str:
    """Time and memory of our decoding after the shortest and the longest context, measured in one
    rotation.
    """
    rows = _rows(_load(source), section="contexts", batch=1)
    first, last = (pick(rows, key=lambda row: row["context"]) for pick in (min, max))
    return (
        f"Measured in one rotation, a token of minrnn after a context of {last['context']:,} tokens takes "
        f"{last['of_shortest']:.2f} of the time of a token after {first['context']:,}, and "
        f"{last['peak_bytes'] / 1e6:.0f} MB of memory (weights included) instead of "
        f"{first['peak_bytes'] / 1e6:.0f} MB."
    )


def stream_line(source: Path, rows: Path) -> str:
    """Training rate on one long document, and on long rows."""
    (row,) = _rows(_load(source), section="stream")
    rates = {
        (row["contender"], row["length"]): row["tokens_per_second"]
        for row in _rows(_load(rows), section="train")
    }
    longest = max(length for _, length in rates)
    return (
        f"Training on one document of {row['tokens_read']:,} tokens, read {row['chunk']:,} at a time with "
        f"the state carried, runs at {row['tokens_per_second']:,.0f} tokens/s in "
        f"{row['peak_bytes'] / 1e9:.1f} GB. Rows of {longest:,} tokens train at "
        f"{rates['minrnn-chunked', longest] / rates['minrnn', 512]:.2f} of the rate of rows of 512 if they "
        f"are read in such pieces, and at {rates['minrnn', longest] / rates['minrnn', 512]:.2f} if they are "
        "read whole."
    )


def loop_line(source: Path, link: str) -> str:
    """The overhead of the training loop over its steps; `link` leads to the file."""
    (row,) = _rows(_load(source), section="loop", contender="loop")
    return (
        f"At the size of the quickstart, the loop with data, logging, tracking and a checkpoint every "
        f"{row['steps']} steps takes {100 * row['overhead']:+.1f} % of the time of the steps alone "
        f"([file]({link}))."
    )


def soak_line(source: Path, link: str) -> str:
    """The faults and the result of the soak test; `link` leads to the file."""
    soak = json.loads(source.read_text())
    faults = ", ".join(f"{name} {count}" for name, count in soak["faults"].items())
    num_differences = len(soak["problems"])
    result = (
        f"{num_differences} differences from an undisturbed run were found."
        if num_differences
        else "Every loss equals that of an undisturbed run to the bit, and every step is there once."
    )
    return (
        f"A soak test ([file]({link})) took {soak['steps']:,} steps on two processes under "
        f"{sum(soak['faults'].values())} faults ({faults}), {soak['kills']} of which use `kill -9`. "
        f"{soak['steps_repeated']:,} steps were repeated, and {soak['checkpoints_refused']} damaged "
        f"checkpoints were refused. {result}"
    )
