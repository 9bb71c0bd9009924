"""`minrnn report`: one page from results files and runs, in Markdown and as a single HTML file."""

import argparse
import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ...common.errors import UserError, missing_package_error
from ...common.files import user_path, write_text
from ...common.output import warn
from ...pipeline.options import new_parser
from ..output import RESULTS
from . import ablations, carrying, lm_eval, others, pictures, quality_tables, scaling
from .compare import METRICS, PooledRuns, pool
from .families import families_blocks
from .page import NOT_RUN, code, link, table, text, to_html
from .published import published
from .quality_tables import Quality
from .sources import ResultSource, gather_sources

DESCRIPTION = """Make one page of results: ours beside published numbers, learning curves, speed, and what was
not run. Writes report.md, report.html (a single file, pictures included) and pictures/ into --out."""
EXAMPLES = """examples:
  minrnn report                                         the repository's own results
  minrnn report evals/results runs                      these and every run below runs/
  minrnn report runs/quickstart results.json --out page
  minrnn results runs/bucket-0 runs/bucket-1 --as bucket-sort      make a results file of runs"""
TITLE = "minrnn: results"
LEGEND = """Ours: mean over seeds ± half the width of a 95 % t-interval; a single seed has no interval.
Published: as in the source; *reported* if taken from a secondary source. Difference: ours minus published.
Steps: done, and of how many if a run stopped earlier or is in progress. Each of our numbers links to its
file."""
# groups whose experiments share a unit, so one table compares them
PERCENT_GROUPS = ("formal", "lra", "recall")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn report", DESCRIPTION, EXAMPLES)
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
    """The repository's own results, which a wheel does not contain."""
    if not RESULTS.is_dir():
        raise UserError(
            "PATH",
            "this installation holds no results of minrnn's own; name results files or folders of runs",
        )
    return [RESULTS]


def check(source: ResultSource) -> None:
    """Render what the report shows of a file.

    Raises:
        KeyError, TypeError, ValueError, ...: the file lacks something.
    """
    if source.kind == "runs":
        pooled, _ = pool([source])
        _quality_blocks(Quality(pooled, []))
    elif source.kind == "families":
        families_blocks(source)
    elif source.kind == "lm-eval":
        lm_eval.scores_table(source)
    elif source.kind == "long-context":
        others.long_context_blocks(source)
    elif source.kind == "bench":
        others.speed_section([source])
    elif source.kind == "soak":
        others.soak_line(source)
    elif source.kind == "sweep soak":
        others.sweep_soak_line(source)
    elif source.kind == "fit":
        scaling.fit_blocks(source)
    elif source.kind == "rules":
        scaling.rules_line(source)
    elif source.kind == "ablation":
        ablations.ablation_blocks(source.data)
    elif source.kind == "carrying":
        carrying.carrying_blocks(source.data)
    elif source.kind == "quickstart":
        others.quickstart_row([source])
    elif source.kind == "transformers":
        others.transformers_line(source)
    else:
        others.kernels_line(source)


def _quality_blocks(quality: Quality) -> list[str]:
    """Published experiments by group, then experiments without a published number."""
    blocks = []
    experiments = quality.published.experiments
    for key, group in quality.published.groups.items():
        blocks += [f"### {text(group.title)}", text(group.note)]
        names = [name for name, experiment in experiments.items() if experiment.group == key]
        if key in PERCENT_GROUPS:
            blocks.append(quality_tables.overview(key, quality))
            names = [name for name in names if quality.pooled.get(name)]
        for name in names:
            if key in PERCENT_GROUPS or len(names) > 1:
                blocks.append(f"#### {text(experiments[name].title)}")
            blocks.append(quality_tables.experiment_blocks(name, quality))
    for name in quality.unpublished():
        blocks += [
            f"### {text(name)}",
            "There is no published number for this experiment.",
            quality_tables.unpublished_table(quality.pooled[name]),
        ]
    return blocks


def _picture_path(name: str, kind: str, out: Path) -> Path:
    return out / "pictures" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}-{kind}.png"


def _image(alt: str, picture: Path, out: Path) -> str:
    return f"![{text(alt)}]({picture.relative_to(out).as_posix()})"


def _curve_blocks(quality: Quality, out: Path) -> tuple[list[str], list[str]]:
    """Accuracies by length, and learning curves; draws the pictures."""
    lengths, curves = [], []
    for name, pooled in quality.pooled.items():
        experiment = quality.published.experiments.get(name)
        title = experiment.title if experiment else name
        if (length_table := quality_tables.accuracy_by_length_table(pooled)) is not None:
            picture = _picture_path(name, "by-length", out)
            pictures.accuracy_by_length(pooled, picture)
            lengths += [
                f"### {text(title)} by length",
                length_table,
                _image(f"accuracy by length: {title}", picture, out),
            ]
        if len(pooled) > 1 and all(_is_text(runs) for runs in pooled):
            picture = _picture_path(name, "by-cost", out)
            pictures.loss_by_tokens_and_seconds(pooled, picture)
            curves += [
                f"### {text(title)} by cost",
                "Held-out loss against the tokens read, and against the time of training.",
                _image(f"loss by tokens and by seconds: {title}", picture, out),
            ]
        picture = _picture_path(name, "curves", out)
        pictures.learning_curves(pooled, picture)
        curves += [f"### Learning curves of {text(title)}", _image(f"learning curves: {title}", picture, out)]
    return lengths, curves


def _is_text(runs: PooledRuns) -> bool:
    """Whether the runs were validated on text, all of them."""
    return all(seed.final is not None and seed.final.bits_per_byte is not None for seed in runs.seeds)


def _other_files(sources: Sequence[ResultSource], out: Path) -> list[str]:
    """Results of lm-eval, and of long contexts."""
    blocks = ["## Language model evaluation"]
    for source in (lm_eval_files := [source for source in sources if source.kind == "lm-eval"]):
        blocks += [f"From {link(text(source.name), source.name)}:", lm_eval.scores_table(source)]
    blocks += ["## Long context"] if lm_eval_files else [f"lm-eval: {NOT_RUN}.", "## Long context"]
    for source in (long_contexts := [source for source in sources if source.kind == "long-context"]):
        blocks += [f"From {link(text(source.name), source.name)}:", others.long_context_blocks(source)]
        blocks += _copied_picture(source, "long-context", out)
    return blocks if long_contexts else [*blocks, f"Loss by position, and memory: {NOT_RUN}."]


def _copied_picture(source: ResultSource, name: str, out: Path) -> list[str]:
    """The image of the picture beside a results file, copied into the page's folder; empty without one."""
    picture = others.picture_beside(source)
    if picture is None:
        return []
    copy = _picture_path(source.name.removesuffix(".json"), name, out)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(picture, copy)
    return [_image(f"{name}: {source.name}", copy, out)]


def _family_blocks(sources: Sequence[ResultSource], out: Path) -> list[str]:
    """Models of all families on one text, for each such file."""
    blocks = ["## Families on one text"]
    for source in (files := [source for source in sources if source.kind == "families"]):
        blocks += [f"From {link(text(source.name), source.name)}:", families_blocks(source)]
        blocks += _copied_picture(source, "families", out)
    return blocks if files else [*blocks, f"Equal parameters, equal tokens, tuned learning rates: {NOT_RUN}."]


def _missing_blocks(quality: Quality) -> list[str]:
    experiments = quality.published.experiments
    lines = []
    for name in quality.missing():
        experiment = experiments[name]
        unit = METRICS[experiment.metric].title if experiment.metric else "for reference"
        has_runs = bool(quality.pooled.get(name))
        note = f" ({text(experiment.not_run)})" if experiment.not_run else ""
        note += "; above are runs of another task, or without a validation so far" * has_runs
        lines.append(f"- {code(name)}: {text(experiment.title)} ({unit}): {NOT_RUN}{note}")
    return ["## Not run", "\n".join(lines) or "Nothing is missing."]


def _source_blocks(sources: Sequence[ResultSource], out: Path) -> list[str]:
    """The origin of the numbers: file, command, commit and machine."""
    blocks = ["## Sources"]
    for source in sources:
        path = Path(os.path.relpath(source.path.resolve(), out.resolve())).as_posix()
        file_link = f"[{text(source.name)}]({quote(path)})"
        lines = [
            f"- file: {file_link}",
            f"- command: {code(source.command)}",
            f"- commit: {code(source.commit)}",
            f"- machine: {text(source.machine)}",
        ]
        blocks += [f"### {text(source.name)}", "\n".join(lines)]
    rows = [[text(key), text(source)] for key, source in published().sources.items()]
    return [*blocks, f"### {quality_tables.PUBLISHED}", table(["name", "source"], rows)]


def make(
    sources: Sequence[ResultSource], unreadable: Sequence[tuple[Path, str]], out: Path
) -> tuple[str, int]:
    """The page in Markdown, with its pictures in `out`, and the number of published experiments that were not
    run.
    """
    pooled, notes = pool(sources)
    quality = Quality(pooled, [source for source in sources if source.kind == "lm-eval"])
    headline = [
        *quality_tables.headline_rows(quality),
        others.quickstart_row(sources),
        others.speed_headline(sources),
    ]
    lengths, curves = _curve_blocks(quality, out)
    kernels = [others.kernels_line(source) for source in sources if source.kind == "kernels"] or [
        f"GPU kernels, compiled: {NOT_RUN}."
    ]
    blocks = [
        f"# {TITLE}",
        LEGEND,
        "## In short",
        table(["what", "model", "published", "ours", "difference", "seeds", "steps", "set-up"], headline),
    ]
    blocks += ["## Quality", *_quality_blocks(quality), *(text(note) for note in notes)]
    blocks += ["## Accuracy by length", *(lengths or [f"Tasks with test lengths: {NOT_RUN}."])]
    blocks += ["## Learning curves", *(curves or [f"Runs: {NOT_RUN}."])]
    blocks += _family_blocks(sources, out)
    blocks += _other_files(sources, out)
    blocks += ["## Scaling laws", scaling.scaling_section(sources)]
    blocks += ["## Ablations", ablations.ablation_section(sources)]
    blocks += ["## The carried state", carrying.carrying_section(sources)]
    blocks += ["## Speed", others.speed_section(sources), *kernels]
    blocks += ["## Tests of transformers", others.transformers_section(sources)]
    blocks += ["## Endurance", others.soak_section(sources), *_missing_blocks(quality)]
    if unreadable:
        blocks += [
            "## Could not be read",
            "\n".join(f"- {code(path.name)} {text(reason)}" for path, reason in unreadable),
        ]
    return "\n\n".join([*blocks, *_source_blocks(sources, out)]) + "\n", len(quality.missing())


def main(argv: list[str]) -> None:
    """Run `minrnn report`.

    Raises:
        UserError: a path that was named cannot be read.
    """
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    for module, package in (("markdown_it", "markdown-it-py"), ("scipy", "scipy")):
        if importlib.util.find_spec(module) is None:
            raise missing_package_error("report", package, extra="eval")
    if out.exists() and not out.is_dir():
        raise UserError("--out", f"{out} is a file; name a folder")
    sources, unreadable = gather_sources(arguments.paths or _own_results(), check)
    for path, reason in unreadable:
        warn(f"{path} {reason}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--out", f"cannot make {out} ({error.strerror})") from None
    markdown, num_missing = make(sources, unreadable, out)
    write_text(out / "report.md", markdown)
    write_text(out / "report.html", to_html(markdown, TITLE, out))
    print(
        f"{out / 'report.md'} and {out / 'report.html'}: {len(sources)} sources, "
        f"{num_missing} published experiments not run"
    )
