"""The results of `minrnn long-context` on a document, as tables and as a figure."""

from pathlib import Path
from typing import Any

from ...pipeline.pictures import save_figure
from ..output import si, table
from .bands import band_name
from .positions import NUM_TARGETS


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
    band_columns: dict[str, Any] = {
        "memory length": band_name,
        "cut": lambda row: f"{row['cut']:,}",
        "channels": lambda row: f"{row['channels']:,}",
        "cost (nats)": lambda row: f"{row['cost']:+.4f} ± {_number(row['error'])}",
    }
    band_title = "loss minus carried, if the channels of a band are reset at every cut"
    return "\n".join(
        [
            table(rows, columns, position_title),
            table(result["stages"], time_columns, "time and memory, state carried"),
            table(memory["curve"], memory_columns, memory_title),
            f"\neffective memory length: {length_text} "
            f"(within {memory['tolerance']:g} nats of all the context)",
            *([table(result["bands"], band_columns, band_title)] if result.get("bands") else []),
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
