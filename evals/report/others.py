"""Sections for results other than runs: long contexts, speed, kernels, the quickstart run, the soak test."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import speed
from .page import NOT_RUN, link, slug, table, text
from .sources import ResultSource

# Fields that describe a model; names of measures also occur in them.
DESCRIPTIVE_FIELDS = {"config", "model", "recipe", "machine", "versions"}


def _sections(source: ResultSource) -> set[str]:
    return {row["section"] for row in source.data["rows"] if "reason" not in row}


def _has_contender(source: ResultSource, section: str, name: str) -> bool:
    return any(
        row["section"] == section and row["contender"] == name and "reason" not in row
        for row in source.data["rows"]
    )


def _scans(source: ResultSource) -> str:
    """A table for each dtype."""
    dtypes = dict.fromkeys(row["dtype"] for row in source.data["rows"] if row["section"] == "scan")
    return "\n\n".join("\n".join(speed.scan_lines(source.path, dtype)) for dtype in dtypes)


@dataclass(frozen=True)
class Bench:
    """A part of the section on speed, for files that `accepts` selects."""

    name: str
    accepts: Callable[[ResultSource], bool]
    render: Callable[[ResultSource], str]


BENCHES = (
    Bench("scan", lambda source: "scan" in _sections(source), _scans),
    Bench(
        "training, by length",
        lambda source: "train" in _sections(source) and not _has_contender(source, "train", "minrnn-chunked"),
        lambda source: "\n".join(speed.train_lines(source.path)),
    ),
    Bench(
        "decoding",
        lambda source: "generate" in _sections(source),
        lambda source: "\n".join(speed.generate_lines(source.path)),
    ),
    Bench(
        "decoding after long contexts",
        lambda source: "contexts" in _sections(source),
        lambda source: speed.contexts_line(source.path),
    ),
    Bench(
        "the loop",
        lambda source: "loop" in _sections(source),
        lambda source: speed.loop_line(source.path, f"#{slug(source.name)}"),
    ),
)


def speed_section(sources: Sequence[ResultSource]) -> str:
    """The tables of the benchmarks; a part without a file is marked as not run."""
    benches = [source for source in sources if source.kind == "bench"]
    blocks = []
    for bench in BENCHES:
        files = [source for source in benches if bench.accepts(source)]
        for source in files:
            blocks += [
                f"{bench.name.capitalize()}, from {link(text(source.name), source.name)}:",
                bench.render(source),
            ]
        if not files:
            blocks.append(f"{bench.name.capitalize()}: {NOT_RUN}.")
    blocks.append(_streams(benches))
    shown = [source for source in benches if any(bench.accepts(source) for bench in BENCHES)]
    remaining = [source for source in benches if source not in shown and not _is_streams(source)]
    if remaining:
        links = ", ".join(link(text(source.name), source.name) for source in remaining)
        blocks.append(f"Further measurements, without a table here: {links}.")
    return "\n\n".join(blocks)


def _is_streams(source: ResultSource) -> bool:
    return "stream" in _sections(source) or _has_contender(source, "train", "minrnn-chunked")


def _streams(benches: Sequence[ResultSource]) -> str:
    stream = next((source for source in benches if "stream" in _sections(source)), None)
    rows = next((source for source in benches if _has_contender(source, "train", "minrnn-chunked")), None)
    if stream is None or rows is None:
        return f"One long document, and long rows: {NOT_RUN}."
    line = speed.stream_line(stream.path, rows.path)
    return f"{line} From {link(text(stream.name), stream.name)} and {link(text(rows.name), rows.name)}."


def speed_headline(sources: Sequence[ResultSource]) -> list[str]:
    """Training speed relative to an attention model, at the longest length at which both were measured."""
    title = "Training speed, minrnn to Llama"
    for source in sources:
        if source.kind != "bench":
            continue
        by_length = {
            (row["contender"], row["length"]): row
            for row in source.data["rows"]
            if row["section"] == "train" and "reason" not in row
        }
        common = sorted(
            length for name, length in by_length if name == "minrnn" and ("llama", length) in by_length
        )
        if common:
            ours, peer = by_length["minrnn", common[-1]], by_length["llama", common[-1]]
            ratio = ours["tokens_per_second"] / peer["tokens_per_second"]
            return [
                f"{title} at length {common[-1]:,}",
                f"{ours['parameters']:,} parameters",
                "-",
                link(f"{ratio:.2f} x", source.name),
                "-",
                "-",
                "-",
                "-",
            ]
    return [title, "-", "-", NOT_RUN, "-", "-", "-", "-"]


def quickstart_row(sources: Sequence[ResultSource]) -> list[str]:
    """The row of the quickstart run in the table at the top."""
    source = next((source for source in sources if source.kind == "quickstart"), None)
    title = "Main job: Python's standard library (bits per byte, all held-out modules)"
    if source is None:
        return [title, "-", "-", NOT_RUN, "-", "-", "-", "-"]
    loss = f"{source.data['validation_all_held_out_modules']['bits_per_byte']:.3f}"
    parameters, steps, seconds = (source.data[name] for name in ("parameters", "steps", "training_seconds"))
    label = f"{parameters:,} parameters, in {seconds:,} s"
    return [title, label, "-", link(loss, source.name), "-", "1", f"{steps:,}", "-"]


def kernels_line(source: ResultSource) -> str:
    """A sentence on the compiled kernels."""
    kernels = source.data["kernels"]
    spilling = sum(1 for kernel in kernels if kernel["spills"])
    machines = ", ".join(f"sm_{sm}" for sm in sorted({kernel["sm"] for kernel in kernels}))
    line = f"{len(kernels)} Triton kernels compile for {machines}; {spilling} of them spill registers."
    return f"{line} From {link(text(source.name), source.name)}."


def transformers_section(sources: Sequence[ResultSource]) -> str:
    """The section on the tests that transformers has for its own models."""
    results = [source for source in sources if source.kind == "transformers"]
    lines = [transformers_line(source) for source in results]
    return "\n\n".join(lines) or f"The tests of transformers on our models: {NOT_RUN}."


def transformers_line(source: ResultSource) -> str:
    """The counts of passed, failed and skipped tests of each model."""
    counts = "; ".join(
        f"{text(name)}: {model['passed']} passed, {len(model['failed'])} failed, {model['skipped']} skipped"
        for name, model in source.data["models"].items()
    )
    return f"{counts}. From {link(text(source.name), source.name)}."


def soak_section(sources: Sequence[ResultSource]) -> str:
    """The section on the soak test."""
    soaks = [source for source in sources if source.kind == "soak"]
    lines = [soak_line(source) for source in soaks] or [f"The soak: {NOT_RUN}."]
    lines += [sweep_soak_line(source) for source in sources if source.kind == "sweep soak"]
    return "\n\n".join(lines)


def sweep_soak_line(source: ResultSource) -> str:
    """The kills of a sweep's workers, and each difference from an undisturbed sweep."""
    data = source.data
    result = "no run was lost or trained twice, and all equal those of an undisturbed sweep to the bit"
    if data["problems"]:
        result = "; ".join(map(text, data["problems"]))
    faults = ", ".join(f"{text(name)} {count}" for name, count in data["faults"].items())
    return (
        f"A sweep of {data['runs']} runs under {data['kills']} `kill -9` ({faults}), with {data['starts']} "
        f"starts of training: {result}. From {link(text(source.name), source.name)}."
    )


def soak_line(source: ResultSource) -> str:
    """The sentence of the README, and each difference that was found."""
    errors = [f"- {text(problem)}" for problem in source.data["problems"]]
    return "\n".join(
        [speed.soak_line(source.path, f"#{slug(source.name)}"), *(["", *errors] if errors else [])]
    )


def _measures(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float | None]]:
    """Values of keys that end in bits_per_byte or memory_length; None if the memory is longer than
    measured.
    """
    if isinstance(value, dict):
        for key, child in value.items():
            if path or key not in DESCRIPTIVE_FIELDS:
                yield from _measures(child, (*path, str(key)))
        return
    if isinstance(value, list):
        for child in value:
            if isinstance(child, dict) and "part" in child:  # part of a document
                yield from _measures(child, (str(child["part"]),))
        return
    is_memory = bool(path) and path[-1].endswith("memory_length")
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if (is_number and (is_memory or path[-1].endswith("bits_per_byte"))) or (value is None and is_memory):
        yield " ".join(path).replace("_", " "), value


def long_context_blocks(source: ResultSource) -> str:
    """The document and the measures of a file, independent of how a version of the file names its parts.

    Raises:
        ValueError: the file holds no measure.
    """
    data = source.data
    rows = []
    for name, value in _measures(data):
        if value is None:
            shown = "longer than measured"
        else:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        rows.append([text(name), link(shown, source.name)])
    if not rows:
        raise ValueError("it holds neither bits per byte nor a memory length")
    facts = {"parameters": _fact(data, "parameters") or _fact(data, "model", "parameters")}
    facts |= {key: _fact(data, key) or _fact(data, key, "name") for key in ("corpus", "document")}
    facts["tokens"] = _fact(data, "tokens") or _fact(data, "tokens", "read")
    described = [
        f"{key}: {text(f'{value:,}' if isinstance(value, int) else value)}"
        for key, value in facts.items()
        if value
    ]
    return "\n\n".join([*(["; ".join(described)] if described else []), table(["measure", "value"], rows)])


def _fact(data: Any, *keys: str) -> str | int | None:
    """The string or integer at a path of keys, or None."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, str | int) else None


def picture_beside(source: ResultSource) -> Path | None:
    """The picture with the same name as the file, if it exists."""
    picture = source.path.with_suffix(".png")
    return picture if picture.is_file() else None
