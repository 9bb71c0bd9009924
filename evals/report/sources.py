"""What a report is made of: results files, and folders of runs, each read once and recognized by what it holds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ...common.errors import UserError
from .published import published
from .runs import Entry, Results, is_run, read_run

Kind = Literal["runs", "lm-eval", "long-context", "bench", "soak", "quickstart", "kernels"]
# Files that bear no kind, by fields that only they have.
FIELDS: tuple[tuple[Kind, set[str]], ...] = (
    ("bench", {"bench", "rows"}),
    ("lm-eval", {"results", "configs", "versions"}),
    ("soak", {"faults", "kills", "steps_repeated", "checkpoints_refused", "problems"}),
    ("quickstart", {"validation_subset", "validation_all_held_out_modules", "training_seconds"}),
    ("kernels", {"kernels", "issue_rate"}),
    ("long-context", {"overall", "buckets"}),  # loss by position
    ("long-context", {"rows", "carried_minus_windows_bits_per_byte"}),  # one long document through lm-eval
)
MADE_BY = "minrnn results, minrnn eval, minrnn long-context and minrnn bench write such files"
NOT_RECORDED = "not recorded"


class Unreadable(ValueError):
    """A file that no section can show; the message says why, and what to do."""


@dataclass
class Source:
    """A results file, or a run."""

    path: Path
    kind: Kind
    data: dict[str, Any]
    results: Results | None = None
    """Of kind `runs`."""
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
        found = self.data.get("machine")
        if not isinstance(found, dict) or not found:
            return NOT_RECORDED
        gpu = found.get("gpu")
        if isinstance(gpu, dict):
            return str(gpu.get("name", gpu))
        return f"{found.get('cpu', 'CPU')}, {found.get('threads', '?')} threads"


def kind_of(data: Any) -> Kind:
    """What a file holds.

    Raises:
        Unreadable: nothing that is known.
    """
    if not isinstance(data, dict):
        raise Unreadable(f"holds no results ({type(data).__name__} instead of an object); {MADE_BY}")
    if "kind" in data:
        if data["kind"] in ("runs", "long-context"):
            return data["kind"]
        raise Unreadable(f"is of the unknown kind {data['kind']!r}; {MADE_BY}")
    for kind, keys in FIELDS:
        if keys <= data.keys():
            return kind
    raise Unreadable(
        f"holds no results that are known (its fields: {', '.join(map(str, list(data)[:6])) or 'none'}); {MADE_BY}"
    )


def read_file(path: Path, check: Callable[[Source], object]) -> Source:
    """A results file.

    Args:
        check: makes all of it that a report shows, so that what is broken is found here.

    Raises:
        Unreadable: no JSON, cut short, of an unknown kind, or without what its kind has.
    """
    if not path.is_file():  # reading a pipe would wait for who writes into it
        raise Unreadable("is no regular file; name a results file, a folder of them, or a run's folder")
    try:
        data = json.loads(path.read_text())
    except RecursionError:
        raise Unreadable("is nested too deep for results; leave it out") from None
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise Unreadable(f"is no JSON, or cut short ({error}); write it again, or leave it out") from None
    source = Source(path, kind_of(data), data)
    try:
        if source.kind == "runs":
            source.results = Results.model_validate(data)
        check(source)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise Unreadable(
            f"lacks what a file of runs has ({place}: {first['msg']}); write it again with minrnn results"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise Unreadable(
            f"lacks what a file of kind {source.kind} has ({type(error).__name__}: {error}); write it again, or leave it out"
        ) from None
    return source


def run_source(path: Path) -> Source:
    """A run's folder, under the published experiment about its corpus, or its corpus' name.

    Raises:
        UserError: nothing there yet.
    """
    config, seed = read_run(path)
    corpus = config["data"]["corpus"]
    matching = [name for name, experiment in published().experiments.items() if corpus in experiment.corpora]
    entries = [Entry(config=config, seeds=[seed])]
    told = {
        "command": f"(read from the run's folder {path.name})",
        "commit": None,
        "time": "",
        "machine": {},
        "versions": {},
    }
    results = Results(experiment=matching[0] if matching else corpus, entries=entries, **told)
    return Source(path, "runs", told, results)


def _runs_in(folder: Path) -> list[Path]:
    """Folders of runs below a folder, hidden ones left out; nothing inside a run is another."""
    found: list[Path] = []
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            found += [child] if is_run(child) else _runs_in(child)
    return found


def _of_run(run: Path) -> list[Path]:
    """A run, and what was evaluated on it."""
    return [run, *sorted(run.glob("evals/*.json"))]


def _scan(folder: Path) -> list[Path]:
    """What a folder holds: its JSON files, and the runs below it."""
    files = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
    return files + [path for run in _runs_in(folder) for path in _of_run(run)]


def gather(
    paths: Sequence[Path], check: Callable[[Source], object]
) -> tuple[list[Source], list[tuple[Path, str]]]:
    """Everything behind the paths.

    Args:
        paths: results files, folders of them, folders of runs, folders of such folders.
        check: see `read_file`.

    Returns:
        What could be read, each once; and what was found in a folder and could not, with the reason.

    Raises:
        UserError: each path that was named and is not there, is empty or cannot be read.
    """
    wanted: dict[Path, tuple[Path, bool]] = {}  # resolved path -> as it was found, was it named
    errors: list[tuple[str, str]] = []
    for path in paths:
        found: list[Path] = []
        if not path.exists():
            errors.append(
                (str(path), "is not there; name a results file, a folder of them, or a run's folder")
            )
        elif not path.is_dir() or is_run(path):
            wanted[path.resolve()] = (path, True)
            found = _of_run(path)[1:] if path.is_dir() else []
        else:
            try:
                if not (found := _scan(path)):
                    errors.append((str(path), "holds neither results files (*.json) nor runs"))
            except OSError as error:
                errors.append((str(path), f"cannot be read ({error.filename}: {error.strerror})"))
        for child in found:
            wanted.setdefault(child.resolve(), (child, False))
    sources: list[Source] = []
    unreadable: list[tuple[Path, str]] = []
    for path, named in wanted.values():
        try:
            sources.append(run_source(path) if path.is_dir() else read_file(path, check))
        except (Unreadable, UserError) as error:
            told = error.errors[0][1] if isinstance(error, UserError) else str(error)
            if named:
                errors.append((str(path), told))
            else:
                unreadable.append((path, told))
    if errors:
        raise UserError.from_list(errors)
    _name(sources)
    return sources, unreadable


def _name(sources: Sequence[Source]) -> None:
    """Each by the shortest end of its path that no other has."""
    for source in sources:
        parts = source.path.resolve().parts
        ends = (parts[-length:] for length in range(1, len(parts) + 1))
        name = next(
            "/".join(end)
            for end in ends
            if sum(other.path.resolve().parts[-len(end) :] == end for other in sources) == 1
        )
        source.name = f"{name} (run)" if source.path.is_dir() else name
