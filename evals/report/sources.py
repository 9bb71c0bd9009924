"""The inputs of a report: results files and folders of runs.

Each is read once; the content determines its kind.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ...common.errors import UserError
from ...pipeline.source_settings import corpus_name
from .page import link, text
from .published import published
from .runs import Entry, Results, is_run, read_run

Kind = Literal[
    "runs",
    "families",
    "lm-eval",
    "long-context",
    "bench",
    "soak",
    "sweep soak",
    "fit",
    "rules",
    "ablation",
    "carrying",
    "quickstart",
    "kernels",
    "transformers",
]
NAMED = ("runs", "families", "long-context", "sweep soak", "fit", "rules", "ablation", "carrying")
# Kinds of files without a field `kind`, by fields that only they have.
FIELDS: tuple[tuple[Kind, set[str]], ...] = (
    ("bench", {"bench", "rows"}),
    ("lm-eval", {"results", "configs", "versions"}),
    ("soak", {"faults", "kills", "steps_repeated", "checkpoints_refused", "problems"}),
    ("quickstart", {"validation_subset", "validation_all_held_out_modules", "training_seconds"}),
    ("kernels", {"kernels", "issue_rate"}),
    ("transformers", {"models", "versions", "command"}),  # the library's own tests
    ("long-context", {"overall", "buckets"}),  # loss by position
    ("long-context", {"rows", "carried_minus_windows_bits_per_byte"}),  # one long document through lm-eval
)
MADE_BY = "minrnn results, minrnn eval, minrnn long-context and minrnn bench write such files"
NOT_RECORDED = "not recorded"


class UnreadableError(ValueError):
    """A file that cannot be shown; the message says why and what to do."""


@dataclass
class ResultSource:
    """A results file or a run."""

    path: Path
    kind: Kind
    data: dict[str, Any]
    results: Results | None = None
    """For kind `runs`."""
    name: str = field(default="")
    """Unique among the report's sources."""

    @property
    def command(self) -> str:
        return str(
            self.data.get("command") or (self.data.get("config") or {}).get("model_args") or NOT_RECORDED
        )

    @property
    def commit(self) -> str:
        return str(self.data.get("commit") or self.data.get("git_hash") or NOT_RECORDED)

    @property
    def machine(self) -> str:
        machine = self.data.get("machine")
        if not isinstance(machine, dict) or not machine:
            return NOT_RECORDED
        gpu = machine.get("gpu")
        if isinstance(gpu, dict):
            return str(gpu.get("name", gpu))
        return f"{machine.get('cpu', 'CPU')}, {machine.get('threads', '?')} threads"


def detect_kind(data: Any) -> Kind:
    """The kind of a file's content.

    Raises:
        UnreadableError: the content is of no known kind.
    """
    if not isinstance(data, dict):
        raise UnreadableError(f"holds no results ({type(data).__name__} instead of an object); {MADE_BY}")
    if "kind" in data:
        if data["kind"] in NAMED:
            return data["kind"]
        raise UnreadableError(f"is of the unknown kind {data['kind']!r}; {MADE_BY}")
    for kind, keys in FIELDS:
        if keys <= data.keys():
            return kind
    fields = ", ".join(map(str, list(data)[:6])) or "none"
    raise UnreadableError(f"holds no results that are known (its fields: {fields}); {MADE_BY}")


def read_file(path: Path, check: Callable[[ResultSource], object]) -> ResultSource:
    """Read a results file.

    Args:
        check: renders all that a report shows of it, so that incomplete files are found here.

    Raises:
        UnreadableError: the file is not JSON, is truncated, is of an unknown kind, or lacks fields of its
            kind.
    """
    if not path.is_file():  # reading a pipe would block
        raise UnreadableError("is no regular file; name a results file, a folder of them, or a run's folder")
    try:
        data = json.loads(path.read_text())
    except RecursionError:
        raise UnreadableError("is nested too deep for results; leave it out") from None
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror})") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise UnreadableError(
            f"is no JSON, or cut short ({error}); write it again, or leave it out"
        ) from None
    source = ResultSource(path, detect_kind(data), data)
    try:
        if source.kind == "runs":
            source.results = Results.model_validate(data)
        check(source)
    except ValidationError as error:
        first = error.errors()[0]
        field_path = ".".join(map(str, first["loc"]))
        raise UnreadableError(
            f"lacks what a file of runs has ({field_path}: {first['msg']}); "
            "write it again with minrnn results"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableError(
            f"lacks what a file of kind {source.kind} has ({reason}); write it again, or leave it out"
        ) from None
    return source


def blocks_by_file(
    sources: Sequence[ResultSource], kind: Kind, blocks: Callable[[dict[str, Any]], str]
) -> str:
    """A link to each file of a kind, and its blocks; empty without such files."""
    return "\n\n".join(
        f"From {link(text(source.name), source.name)}:\n\n{blocks(source.data)}"
        for source in sources
        if source.kind == kind
    )


def run_source(path: Path) -> ResultSource:
    """Read a run's folder; its experiment is the published one about its corpus, or the corpus's name.

    Raises:
        UserError: the run has no step yet.
    """
    config, seed = read_run(path)
    corpus = config["data"]["corpus"]
    matching = [name for name, experiment in published().experiments.items() if corpus in experiment.corpora]
    entries = [Entry(config=config, seeds=[seed])]
    header = {
        "command": f"(read from the run's folder {path.name})",
        "commit": None,
        "time": "",
        "machine": {},
        "versions": {},
    }
    results = Results(experiment=matching[0] if matching else corpus_name(corpus), entries=entries, **header)
    return ResultSource(path, "runs", header, results)


def _find_runs(folder: Path) -> list[Path]:
    """Folders of runs below a folder, without hidden folders; runs do not contain runs."""
    runs: list[Path] = []
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            runs += [child] if is_run(child) else _find_runs(child)
    return runs


def _run_paths(run: Path) -> list[Path]:
    """A run, and its evaluation files."""
    return [run, *sorted(run.glob("evals/*.json"))]


def _scan(folder: Path) -> list[Path]:
    """The JSON files of a folder, and the runs below it with their evaluation files."""
    files = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
    return files + [path for run in _find_runs(folder) for path in _run_paths(run)]


def gather_sources(
    paths: Sequence[Path], check: Callable[[ResultSource], object]
) -> tuple[list[ResultSource], list[tuple[Path, str]]]:
    """Read all sources at the paths.

    Args:
        paths: results files, folders of them, folders of runs, folders of such folders.
        check: see `read_file`.

    Returns:
        The readable sources, each once; and the files found in a folder that cannot be read, with the reason.

    Raises:
        UserError: every named path that does not exist, is empty or cannot be read.
    """
    candidates: dict[Path, tuple[Path, bool]] = {}  # resolved path -> (path, whether it was named)
    errors: list[tuple[str, str]] = []
    for path in paths:
        children: list[Path] = []
        if not path.exists():
            errors.append(
                (str(path), "is not there; name a results file, a folder of them, or a run's folder")
            )
        elif not path.is_dir() or is_run(path):
            candidates[path.resolve()] = (path, True)
            children = _run_paths(path)[1:] if path.is_dir() else []
        else:
            try:
                if not (children := _scan(path)):
                    errors.append((str(path), "holds neither results files (*.json) nor runs"))
            except OSError as error:
                errors.append((str(path), f"cannot be read ({error.filename}: {error.strerror})"))
        for child in children:
            candidates.setdefault(child.resolve(), (child, False))
    sources: list[ResultSource] = []
    unreadable: list[tuple[Path, str]] = []
    for path, is_named in candidates.values():
        try:
            sources.append(run_source(path) if path.is_dir() else read_file(path, check))
        except (UnreadableError, UserError) as error:
            reason = error.errors[0][1] if isinstance(error, UserError) else str(error)
            if is_named:
                errors.append((str(path), reason))
            else:
                unreadable.append((path, reason))
    if errors:
        raise UserError.from_list(errors)
    _set_names(sources)
    return sources, unreadable


def _set_names(sources: Sequence[ResultSource]) -> None:
    """Name each source by the shortest end of its path that is unique."""
    for source in sources:
        parts = source.path.resolve().parts
        ends = (parts[-length:] for length in range(1, len(parts) + 1))
        name = next(
            "/".join(end)
            for end in ends
            if sum(other.path.resolve().parts[-len(end) :] == end for other in sources) == 1
        )
        source.name = f"{name} (run)" if source.path.is_dir() else name
