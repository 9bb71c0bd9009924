"""The README's figures of quality, from the committed results: `minrnn figures quality` prints them.

`tests/launch/test_readme.py` asks that the README holds them word for word.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from ..output import RESULTS
from ..report.compare import METRICS
from ..report.published import published
from ..report.runs import Entry, Results


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _runs() -> Iterator[tuple[str, Results]]:
    """File name and content of each results file of runs."""
    for path in sorted(RESULTS.glob("runs-*.json")):
        yield path.name, Results.model_validate_json(path.read_text())


def _steps(entry: Entry) -> str:
    done, asked = entry.seeds[0].steps, entry.seeds[0].steps_asked
    return f"{done:,}" if done == asked else f"{done:,} of {asked:,}"


def shakespeare_lines() -> list[str]:
    """Best held-out loss beside the published one, of each cell."""
    experiment = published().experiments["shakespeare"]
    lines = [
        "| Shakespeare, test loss (nats per character) | published | ours | steps | published steps | seeds |",
        "|---|---|---|---|---|---|",
    ]
    rows = {row.match.get("cell"): row for row in experiment.rows if row.match}
    for name, results in _runs():
        for entry in results.entries if results.experiment == "shakespeare" else []:
            row = rows[entry.config["model"]["cell"]]
            losses = [seed.best.loss for seed in entry.seeds if seed.best is not None]
            best = sum(losses) / len(losses)
            steps = f"{_steps(entry)} | {experiment.setup['train.steps']:,}"
            lines.append(
                f"| {row.model} | {row.value} | [{best:.3f}](evals/results/{name}) | {steps} | {len(losses)} |"
            )
    return lines


def formal_lines() -> list[str]:
    """Accuracies of the formal languages, with lengths as in training and beyond."""
    lines = [
        "| formal language | cell | lengths 1 to 40 | 40 to 256 | published, 40 to 256 | steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in _runs():
        experiment = published().experiments[results.experiment]
        for entry in (
            results.entries if experiment.group == "formal" or results.experiment == "parity" else []
        ):
            cell = entry.config["model"]["cell"]
            (seed,) = entry.seeds
            inside, beyond = (METRICS[metric].of(seed) for metric in ("accuracy_scaled", "longer_scaled"))
            theirs = next((row.value for row in experiment.rows if row.match == {"cell": cell}), None)
            shown = "-" if theirs is None else f"{theirs} %"
            lines.append(
                f"| [{experiment.title}](evals/results/{name}) | {cell} | {inside:.0f} % | {beyond:.0f} % | {shown} | {_steps(entry)} |"
            )
    return lines


def long_context_line() -> str:
    """Carried against cut, over a document of a million tokens."""
    found = _load("long-context-cpu")
    overall = found["overall"]
    cuts = ", ".join(
        f"{cut['bits_per_byte']:.4f} cut every {int(length):,}" for length, cut in overall["cut"].items()
    )
    shortest = min(overall["cut"], key=int)
    difference, error = (
        overall["cut"][shortest]["carried_minus_cut"],
        overall["cut"][shortest]["carried_minus_cut_error"],
    )
    return (
        f"One document of {overall['tokens']:,} tokens ([file](evals/results/long-context-cpu.json)): "
        f"{overall['carried']['bits_per_byte']:.4f} bits per byte with the state carried, {cuts} tokens; {difference:+.4f} ± {error:.4f} nats "
        f"between the first two. {found['memory']['effective_memory_length']:,} tokens before a token are worth all but "
        f"{found['memory']['tolerance']:g} nats of everything before it."
    )


def rolling_line() -> str:
    """The same through lm-eval."""
    found = _load("rolling-cpu")
    whole, windows = found["rows"][-2:]
    return (
        f"Through lm-eval, {whole['bytes']:,} bytes ([file](evals/results/rolling-cpu.json)): {whole['bits_per_byte']:.4f} bits per byte "
        f"with the state carried, {windows['bits_per_byte']:.4f} in windows of {windows['window']:,}, in {whole['seconds']:.0f} seconds; "
        f"a byte takes {found['time_per_byte_whole_over_first']:.2f} of the time that it takes in the first sixteenth alone."
    )


def text() -> str:
    """The README's section."""
    formal = (
        "Formal languages, accuracy scaled so that a guess has 0 %: two default blocks of width 128 and 1,500 steps of 128 strings, one seed, "
        "beside the published 500,000 steps. Most are learned at the lengths of training; at greater ones they are not yet. Decays in (-1, 1) "
        "learn Parity at all lengths."
    )
    blocks = [
        "\n".join(shakespeare_lines()),
        formal,
        "\n".join(formal_lines()),
        long_context_line(),
        rolling_line(),
    ]
    return "\n\n".join(blocks)


def main(argv: list[str]) -> None:
    """Print it."""
    description = "Print the README's tables of quality."
    argparse.ArgumentParser("minrnn figures quality", description=description).parse_args(argv)
    print(text())
