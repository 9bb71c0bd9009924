"""Sentences and tables of quality for docs/, from the committed results."""

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
    """Name and content of each results file of runs."""
    for path in sorted(RESULTS.glob("runs-*.json")):
        yield path.name, Results.model_validate_json(path.read_text())


def _steps(entry: Entry) -> str:
    done, planned = entry.seeds[0].steps, entry.seeds[0].steps_asked
    return f"{done:,}" if done == planned else f"{done:,} of {planned:,}"


def shakespeare_lines() -> list[str]:
    """Best held-out loss of each cell beside the published one."""
    experiment = published().experiments["shakespeare"]
    lines = [
        "| Shakespeare, test loss (nats per character) | published | ours | steps | published steps | seeds "
        "|",
        "|---|---|---|---|---|---|",
    ]
    rows = {row.match.get("cell"): row for row in experiment.rows if row.match}
    for name, results in _runs():
        for entry in results.entries if results.experiment == "shakespeare" else []:
            row = rows[entry.config["model"]["cell"]]
            losses = [seed.best.loss for seed in entry.seeds if seed.best is not None]
            best = sum(losses) / len(losses)
            steps = f"{_steps(entry)} | {experiment.setup['train.steps']:,}"
            ours = f"[{best:.3f}](../evals/results/{name})"
            lines.append(f"| {row.model} | {row.value} | {ours} | {steps} | {len(losses)} |")
    return lines


def formal_lines() -> list[str]:
    """Accuracies of the formal languages, at training lengths and at longer ones."""
    lines = [
        "| formal language | cell | lengths 1 to 40 | 40 to 256 | published, 40 to 256 | steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in _runs():
        experiment = published().experiments[results.experiment]
        is_formal = experiment.group == "formal" or results.experiment == "parity"
        for entry in results.entries if is_formal else []:
            cell = entry.config["model"]["cell"]
            (seed,) = entry.seeds
            short, long = (METRICS[metric].value_of(seed) for metric in ("accuracy_scaled", "longer_scaled"))
            published_value = next(
                (row.value for row in experiment.rows if row.match == {"cell": cell}), None
            )
            published_cell = "-" if published_value is None else f"{published_value} %"
            lines.append(
                f"| [{experiment.title}](../evals/results/{name}) | {cell} | {short:.0f} % | {long:.0f} % | "
                f"{published_cell} | {_steps(entry)} |"
            )
    return lines


def long_context_line() -> str:
    """Loss with the state carried and reset, on a document of a million tokens."""
    result = _load("long-context-cpu")
    overall, memory = result["overall"], result["memory"]
    cuts = ", ".join(
        f"{cut['bits_per_byte']:.4f} with the state reset every {int(length):,}"
        for length, cut in overall["cut"].items()
    )
    shortest = overall["cut"][min(overall["cut"], key=int)]
    return (
        f"One document of {overall['tokens']:,} tokens ([file](../evals/results/long-context-cpu.json)): "
        f"{overall['carried']['bits_per_byte']:.4f} bits per byte with the state carried, {cuts} tokens. "
        f"The first two differ by {shortest['carried_minus_cut']:+.4f} ± "
        f"{shortest['carried_minus_cut_error']:.4f} nats per token. With "
        f"{memory['effective_memory_length']:,} "
        f"tokens of context the loss is within {memory['tolerance']:g} nats of that with the whole context."
    )


def rolling_line() -> str:
    """Loss of the same model through lm-eval."""
    result = _load("rolling-cpu")
    whole, windows = result["rows"][-2:]
    return (
        f"Through lm-eval, on {whole['bytes']:,} bytes ([file](../evals/results/rolling-cpu.json)): "
        f"{whole['bits_per_byte']:.4f} bits per byte with the state carried, {windows['bits_per_byte']:.4f} "
        f"in windows of {windows['window']:,}, in {whole['seconds']:.0f} seconds. A byte takes "
        f"{result['time_per_byte_whole_over_first']:.2f} of the time that a byte of the first sixteenth "
        "takes."
    )


def text() -> str:
    """The tables of docs/results.md."""
    formal = (
        "Formal languages: accuracy, scaled so that guessing gives 0 %. Two default blocks of width 128 and "
        "1,500 steps of 128 strings, one seed; the published numbers are from 500,000 steps. Most languages "
        "are learned at the training lengths, but not yet at greater ones. Decays in (-1, 1) learn Parity "
        "at all lengths."
    )
    blocks = [
        "\n".join(shakespeare_lines()),
        formal,
        "\n".join(formal_lines()),
        long_context_line(),
        rolling_line(),
    ]
    return "\n\n".join(blocks)


def transformers_lines() -> str:
    """How many of transformers' own tests passed, for each model."""
    models = _load("transformers-tests")["models"]
    rows = [f"| {name} | {m['passed']} | {len(m['failed'])} | {m['skipped']} |" for name, m in models.items()]
    return "\n".join(["| model | passed | failed | skipped |", "|---|---|---|---|", *rows])
