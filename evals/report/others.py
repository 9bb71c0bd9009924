"""What is no run: long contexts, speed, kernels, the main job, the soak."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import speed
from .page import NOT_RUN, link, slug, table, text
from .sources import Source

OF_A_MODEL = {
    "config",
    "model",
    "recipe",
    "machine",
    "versions",
}  # settings, in which the names of measures occur


def _sections(source: Source) -> set[str]:
    return {row["section"] for row in source.data["rows"] if "reason" not in row}


def _has_contender(source: Source, section: str, name: str) -> bool:
    return any(
        row["section"] == section and row["contender"] == name and "reason" not in row
        for row in source.data["rows"]
    )


def _scans(source: Source) -> str:
    """A table for each dtype."""
    dtypes = dict.fromkeys(row["dtype"] for row in source.data["rows"] if row["section"] == "scan")
    return "\n\n".join("\n".join(speed.scan_lines(source.path, dtype)) for dtype in dtypes)


@dataclass(frozen=True)
class Bench:
    """A part of the section on speed."""

    name: str
    fits: Callable[[Source], bool]
    told: Callable[[Source], str]


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


def speed_section(sources: Sequence[Source]) -> str:
    """The benches' tables; what no file has is not run."""
    benches = [source for source in sources if source.kind == "bench"]
    blocks = []
    for bench in BENCHES:
        fitting = [source for source in benches if bench.fits(source)]
        for source in fitting:
            blocks += [
                f"{bench.name.capitalize()}, from {link(text(source.name), source.name)}:",
                bench.told(source),
            ]
        if not fitting:
            blocks.append(f"{bench.name.capitalize()}: {NOT_RUN}.")
    blocks.append(_streams(benches))
    shown = [source for source in benches if any(bench.fits(source) for bench in BENCHES)]
    rest = [source for source in benches if source not in shown and not _is_streams(source)]
    if rest:
        files = ", ".join(link(text(source.name), source.name) for source in rest)
        blocks.append(f"More was measured, which has no table here: {files}.")
    return "\n\n".join(blocks)


def _is_streams(source: Source) -> bool:
    return "stream" in _sections(source) or _has_contender(source, "train", "minrnn-chunked")


def _streams(benches: Sequence[Source]) -> str:
    stream = next((source for source in benches if "stream" in _sections(source)), None)
    rows = next((source for source in benches if _has_contender(source, "train", "minrnn-chunked")), None)
    if stream is None or rows is None:
        return f"One long document, and long rows: {NOT_RUN}."
    told = speed.stream_line(stream.path, rows.path)
    return f"{told} From {link(text(stream.name), stream.name)} and {link(text(rows.name), rows.name)}."


def speed_headline(sources: Sequence[Source]) -> list[str]:
    """Training beside an attention model at the longest length both were measured at."""
    title = "Training speed, minrnn to Llama"
    for source in sources:
        if source.kind != "bench":
            continue
        found = {
            (row["contender"], row["length"]): row
            for row in source.data["rows"]
            if row["section"] == "train" and "reason" not in row
        }
        both = sorted(length for name, length in found if name == "minrnn" and ("llama", length) in found)
        if both:
            ours, peer = found["minrnn", both[-1]], found["llama", both[-1]]
            ratio = ours["tokens_per_second"] / peer["tokens_per_second"]
            return [
                f"{title} at length {both[-1]:,}",
                f"{ours['parameters']:,} parameters",
                "-",
                link(f"{ratio:.2f} x", source.name),
                "-",
                "-",
                "-",
                "-",
            ]
    return [title, "-", "-", NOT_RUN, "-", "-", "-", "-"]


def quickstart_row(sources: Sequence[Source]) -> list[str]:
    """The main job, for the table at the top."""
    found = next((source for source in sources if source.kind == "quickstart"), None)
    title = "Main job: Python's standard library (bits per byte, all held-out modules)"
    if found is None:
        return [title, "-", "-", NOT_RUN, "-", "-", "-", "-"]
    told = f"{found.data['validation_all_held_out_modules']['bits_per_byte']:.3f}"
    parameters, steps, seconds = (found.data[name] for name in ("parameters", "steps", "training_seconds"))
    label = f"{parameters:,} parameters, in {seconds:,} s"
    return [title, label, "-", link(told, found.name), "-", "1", f"{steps:,}", "-"]


def kernels_line(source: Source) -> str:
    """What was compiled."""
    kernels = source.data["kernels"]
    spilling = sum(1 for kernel in kernels if kernel["spills"])
    machines = ", ".join(f"sm_{sm}" for sm in sorted({kernel["sm"] for kernel in kernels}))
    told = f"{len(kernels)} Triton kernels compile for {machines}; {spilling} of them spill registers."
    return f"{told} From {link(text(source.name), source.name)}."


def soak_section(sources: Sequence[Source]) -> str:
    """What a run survived."""
    found = [source for source in sources if source.kind == "soak"]
    return "\n\n".join(soak_line(source) for source in found) or f"The soak: {NOT_RUN}."


def soak_line(source: Source) -> str:
    """The README's sentence, and each problem that was found."""
    errors = [f"- {text(problem)}" for problem in source.data["problems"]]
    return "\n".join(
        [speed.soak_line(source.path, f"#{slug(source.name)}"), *(["", *errors] if errors else [])]
    )


def _measures(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float | None]]:
    """Values below keys that name bits per byte or a memory length; None for a memory that is longer than what was measured."""
    if isinstance(value, dict):
        for key, child in value.items():
            if path or key not in OF_A_MODEL:
                yield from _measures(child, (*path, str(key)))
        return
    if isinstance(value, list):
        for child in value:
            if isinstance(child, dict) and "part" in child:  # of a document
                yield from _measures(child, (str(child["part"]),))
        return
    is_memory = bool(path) and path[-1].endswith("memory_length")
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if (is_number and (is_memory or path[-1].endswith("bits_per_byte"))) or (value is None and is_memory):
        yield " ".join(path).replace("_", " "), value


def long_context_lines(source: Source) -> str:
    """What was read, and its numbers, whatever a version of the file calls the parts they are in."""
    data = source.data
    rows = []
    for name, value in _measures(data):
        told = (
            "longer than measured"
            if value is None
            else f"{value:,}"
            if isinstance(value, int)
            else f"{value:.4f}"
        )
        rows.append([text(name), link(told, source.name)])
    if not rows:
        raise ValueError("it holds neither bits per byte nor a memory length")
    facts = {"parameters": _fact(data, "parameters") or _fact(data, "model", "parameters")}
    facts |= {key: _fact(data, key) or _fact(data, key, "name") for key in ("corpus", "document")}
    facts["tokens"] = _fact(data, "tokens") or _fact(data, "tokens", "read")
    told = [
        f"{key}: {text(f'{value:,}' if isinstance(value, int) else value)}"
        for key, value in facts.items()
        if value
    ]
    return "\n\n".join([*(["; ".join(told)] if told else []), table(["measure", "value"], rows)])


def _fact(data: Any, *keys: str) -> str | int | None:
    """A word or a count at a place, if there is one."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, str | int) else None


def picture_beside(source: Source) -> Path | None:
    """A picture of the same name as the file."""
    picture = source.path.with_suffix(".png")
    return picture if picture.is_file() else None
