"""The section on models of all families, trained on one text (`minrnn figures families`)."""

from .page import link, table, text
from .sources import ResultSource

COLUMNS = ("model", "bits per byte, each seed", "learning rate", "tokens/s", "not finished", "limits")


def families_blocks(source: ResultSource) -> str:
    """What was equal for all models, and a table of them, the best first."""
    grid, rows = source.data["grid"], source.data["rows"]
    rates = ", ".join(f"{rate:g}" for rate in grid["learning_rates"])
    size = grid["recipe"]["model"]["num_parameters"]
    setup = (
        f"{grid['tokens']:,} tokens of {text(source.data['text'])}, {size:,} parameters without embeddings; "
        f"the learning rate is the best of {rates} after {grid['tuning_tokens']:,} tokens."
    )
    ordered = sorted(rows, key=lambda row: min(row["final"].values(), default=float("inf")))
    return f"{setup}\n\n{table(COLUMNS, [_cells(row, source.name) for row in ordered])}"


def _cells(row: dict, name: str) -> list[str]:
    losses = ", ".join(f"{loss:.4f}" for loss in row["final"].values())
    speed = row["tokens_per_second"]
    remaining = row.get("reason") or (
        f"{row['hours_left']:.1f} h are missing" if row.get("hours_left") else ""
    )
    return [
        text(row["model"]),
        link(losses, name) if losses else "-",
        f"{row['learning_rate']:g}" if "learning_rate" in row else "-",
        "-" if speed is None else f"{speed:,.3g}" if speed < 100 else f"{speed:,.0f}",
        text(remaining) or "-",
        text("; ".join(row.get("limits", []))) or "-",
    ]
