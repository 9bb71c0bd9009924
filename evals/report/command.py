"""`minrnn report`: one page from results files and runs, as Markdown and as one HTML file."""

import argparse
import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ...common.errors import UserError
from ...common.files import user_path, write_text
from ...common.output import warn
from ..output import RESULTS
from . import lm_eval, others, pictures, quality
from .compare import METRICS, pool
from .page import NOT_RUN, code, link, table, text, to_html
from .published import published
from .quality import Quality
from .sources import Source, gather

DESCRIPTION = """One page from results: ours beside published numbers, learning curves, speed, and what was not run.
Writes report.md, report.html (one file, pictures inside) and pictures/ into --out."""
EXAMPLES = """examples:
  minrnn report                                         the results that come with minrnn
  minrnn report evals/results runs                      and every run below runs/
  minrnn report runs/quickstart results.json --out page
  minrnn results runs/bucket-0 runs/bucket-1 --as bucket-sort      runs into a results file, seeds together"""
TITLE = "minrnn: results"
LEGEND = """Ours: mean over seeds ± half the width of a 95 % t-interval; a single seed has no interval. Published: as in the source;
*reported* where it was seen second-hand. Difference: ours less the published. Steps: done, and of how many where a run stopped earlier or still
goes on. Each number of ours leads to the file that it comes from."""
PERCENT_GROUPS = ("formal", "lra", "recall")  # experiments of one unit, which have a table side by side


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "minrnn report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        type=user_path,
        nargs="*",
        metavar="PATH",
        help="results files, folders of them, or runs (default: minrnn's own, in a checkout)",
    )
    parser.add_argument(
        "--out", type=user_path, default=Path("runs", "report"), help="folder to write (default: %(default)s)"
    )
    return parser


def _own_results() -> list[Path]:
    """minrnn's own results, which a checkout has and a wheel has not."""
    if not RESULTS.is_dir():
        raise UserError(
            "PATH",
            "this installation holds no results of minrnn's own; name results files or folders of runs",
        )
    return [RESULTS]


def check(source: Source) -> None:
    """Make what the report shows of one file.

    Raises:
        KeyError, TypeError, ValueError, ...: the file lacks it.
    """
    if source.kind == "runs":
        pooled, _ = pool([source])
        _quality_blocks(Quality(pooled, []))
    elif source.kind == "lm-eval":
        lm_eval.lines(source)
    elif source.kind == "long-context":
        others.long_context_lines(source)
    elif source.kind == "bench":
        others.speed_section([source])
    elif source.kind == "soak":
        others.soak_line(source)
    elif source.kind == "quickstart":
        others.quickstart_row([source])
    else:
        others.kernels_line(source)


def _quality_blocks(found: Quality) -> list[str]:
    """By group, then what nothing is published about."""
    blocks = []
    for key, group in found.published.groups.items():
        blocks += [f"### {text(group.title)}", text(group.note)]
        names = [name for name, experiment in found.published.experiments.items() if experiment.group == key]
        if key in PERCENT_GROUPS:
            blocks.append(quality.overview(key, found))
            names = [name for name in names if found.pooled.get(name)]
        for name in names:
            title = found.published.experiments[name].title
            blocks += [
                *([f"#### {text(title)}"] if key in PERCENT_GROUPS or len(names) > 1 else []),
                quality.details(name, found),
            ]
    for name in found.own():
        blocks += [
            f"### {text(name)}",
            "Nothing is published that this stands beside.",
            quality.own_details(name, found.pooled[name]),
        ]
    return blocks


def _picture(name: str, what: str, out: Path) -> Path:
    return out / "pictures" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}-{what}.png"


def _image(alt: str, picture: Path, out: Path) -> str:
    return f"![{text(alt)}]({picture.relative_to(out).as_posix()})"


def _curve_blocks(found: Quality, out: Path) -> tuple[list[str], list[str]]:
    """Accuracies by length, and learning curves; pictures are drawn."""
    lengths, curves = [], []
    for name, pooled in found.pooled.items():
        title = found.published.experiments[name].title if name in found.published.experiments else name
        if (of_lengths := quality.by_length(pooled)) is not None:
            picture = _picture(name, "by-length", out)
            pictures.accuracy_by_length(pooled, picture)
            lengths += [
                f"### {text(title)} by length",
                of_lengths,
                _image(f"accuracy by length: {title}", picture, out),
            ]
        picture = _picture(name, "curves", out)
        pictures.learning_curves(pooled, picture)
        curves += [f"### Learning curves of {text(title)}", _image(f"learning curves: {title}", picture, out)]
    return lengths, curves


def _other_files(sources: Sequence[Source], out: Path) -> list[str]:
    """lm-eval's files and long contexts."""
    blocks = ["## Language model evaluation"]
    for source in (found := [source for source in sources if source.kind == "lm-eval"]):
        blocks += [f"From {link(text(source.name), source.name)}:", lm_eval.lines(source)]
    blocks += ["## Long context"] if found else [f"lm-eval: {NOT_RUN}.", "## Long context"]
    for source in (found := [source for source in sources if source.kind == "long-context"]):
        blocks += [f"From {link(text(source.name), source.name)}:", others.long_context_lines(source)]
        if (picture := others.picture_beside(source)) is not None:
            copy = _picture(source.name.removesuffix(".json"), "long-context", out)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, copy)
            blocks.append(_image(f"long context: {source.name}", copy, out))
    return blocks if found else [*blocks, f"Loss by position, and memory: {NOT_RUN}."]


def _missing_blocks(found: Quality) -> list[str]:
    experiments = found.published.experiments
    lines = []
    for name in found.missing():
        experiment = experiments[name]
        unit = METRICS[experiment.metric].title if experiment.metric else "for reference"
        started = (
            "; runs at another task, or without a validation yet, are above" if found.pooled.get(name) else ""
        )
        lines.append(f"- {code(name)}: {text(experiment.title)} ({unit}): {NOT_RUN}{started}")
    return ["## Not run", "\n".join(lines) or "Nothing is missing."]


def _source_blocks(sources: Sequence[Source], out: Path) -> list[str]:
    """What each number leads to."""
    blocks = ["## Sources"]
    for source in sources:
        path = Path(os.path.relpath(source.path.resolve(), out.resolve())).as_posix()
        where = f"[{text(source.name)}]({quote(path)})"
        lines = [
            f"- file: {where}",
            f"- command: {code(source.command)}",
            f"- commit: {code(source.commit)}",
            f"- machine: {text(source.machine)}",
        ]
        blocks += [f"### {text(source.name)}", "\n".join(lines)]
    rows = [[text(key), text(source)] for key, source in published().sources.items()]
    return [*blocks, f"### {quality.PUBLISHED}", table(["name", "source"], rows)]


def make(sources: Sequence[Source], unreadable: Sequence[tuple[Path, str]], out: Path) -> tuple[str, int]:
    """The page as Markdown, with its pictures in `out`; and how many published experiments were not run."""
    pooled, notes = pool(sources)
    found = Quality(pooled, [source for source in sources if source.kind == "lm-eval"])
    headline = [*quality.headline_rows(found), others.quickstart_row(sources), others.speed_headline(sources)]
    lengths, curves = _curve_blocks(found, out)
    kernels = [others.kernels_line(source) for source in sources if source.kind == "kernels"] or [
        f"GPU kernels, compiled: {NOT_RUN}."
    ]
    blocks = [
        f"# {TITLE}",
        LEGEND,
        "## In short",
        table(["what", "model", "published", "ours", "difference", "seeds", "steps", "set-up"], headline),
    ]
    blocks += ["## Quality", *_quality_blocks(found), *(text(note) for note in notes)]
    blocks += ["## Accuracy by length", *(lengths or [f"Tasks with test lengths: {NOT_RUN}."])]
    blocks += ["## Learning curves", *(curves or [f"Runs: {NOT_RUN}."])]
    blocks += _other_files(sources, out)
    blocks += ["## Speed", others.speed_section(sources), *kernels]
    blocks += ["## Endurance", others.soak_section(sources), *_missing_blocks(found)]
    if unreadable:
        blocks += [
            "## Could not be read",
            "\n".join(f"- {code(path.name)} {text(why)}" for path, why in unreadable),
        ]
    return "\n\n".join([*blocks, *_source_blocks(sources, out)]) + "\n", len(found.missing())


def main(argv: list[str]) -> None:
    """`minrnn report ...`

    Raises:
        UserError: a path that was named and cannot be read.
    """
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    for module, package in (("markdown_it", "markdown-it-py"), ("scipy", "scipy")):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                "report", f"{package} is not installed: make setup-eval, or pip install 'minrnn[eval]'"
            )
    if out.exists() and not out.is_dir():
        raise UserError("--out", f"{out} is a file; name a folder")
    sources, unreadable = gather(arguments.paths or _own_results(), check)
    for path, why in unreadable:
        warn(f"{path} {why}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--out", f"cannot make {out} ({error.strerror})") from None
    markdown, num_missing = make(sources, unreadable, out)
    write_text(out / "report.md", markdown)
    write_text(out / "report.html", to_html(markdown, TITLE, out))
    print(
        f"{out / 'report.md'} and {out / 'report.html'}: {len(sources)} sources, {num_missing} published experiments not run"
    )
