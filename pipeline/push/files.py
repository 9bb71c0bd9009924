"""The files of a push, in a staging folder.

    model.safetensors, config.json, *.py, tokenizer, generation_config.json    as an export writes them
    README.md              the model card, with scores, loss curve, data, limits and licence
    training/recipe.yaml   the resolved recipe, without credentials and local paths
    training/metrics.jsonl, loss.png, accuracy_by_length.png, samples.txt      up to the checkpoint's step
    training/run.json      the run's id, the weights' SHA-256, and the SHA-256 of each file of the push

The same checkpoint gives the same bytes, so a push that is repeated sends nothing that the hub has already.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...common.errors import UserError
from ...common.files import sha256_of, write_json
from ...common.locks import lock
from ...data import is_labelled
from .. import card
from ..evaluation import validation_summary
from ..export import find_checkpoint, load_checkpoint, model_facts, write_model
from ..export_folder import edited_card, exported_files
from ..metrics import History
from ..pictures import draw_accuracy, draw_loss
from ..public import public_config, public_value
from .errors import error_of
from .target import MARKER, TIMEOUT, Identity, PushOptions, hub_api

STAGED, LOCK = ".push", ".push.lock"
RECORD = "training"
BY_SOURCE = ("sources", "by_source")
"""Fields of metrics.jsonl whose keys are the sources of a mixture."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run."""

    run: Path
    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


def checkpoint_of(run: Path, step: int | None) -> Checkpoint:
    """As `export.find_checkpoint`."""
    return Checkpoint(run, *find_checkpoint(run, step))


@contextlib.contextmanager
def staging(run: Path) -> Iterator[Path]:
    """An empty folder for the files of a push, in the run's folder, which has the space.

    Raises:
        HubError: another push of this run is in progress.
        UserError: the folder cannot be written.
    """
    staged = run / STAGED
    try:
        file = (run / LOCK).open("a")
    except OSError as error:
        raise UserError("RUN", f"cannot write to {run} ({error.strerror})") from None
    with file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise error_of("busy", "RUN", f"another push of {run} is in progress; wait for it") from None
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def stage_checkpoint(
    checkpoint: Checkpoint, staged: Path, options: PushOptions, dtype: str = "fp32", trust: bool = False
) -> None:
    """Write everything but training/run.json.

    Args:
        dtype: of the weights.
        trust: run the code that the tokenizer contains, whatever the run's config.yaml says.
    """
    manifest, run = checkpoint.manifest, checkpoint.run
    masks = manifest.get("masks_padding", False)
    model, tokenizer, config = load_checkpoint(checkpoint.path, manifest["vocab_size"], dtype, trust, masks)
    write_model(model, tokenizer, staged)
    published = public_config(config)
    history = _stage_record(checkpoint, staged / RECORD, published)
    last = [entry for entry in history.validations if entry["step"] == checkpoint.step]
    results = card.validation_results([*last, *history.of_kind("test")], published["data"])
    if _has_its_scores(run, checkpoint.step):
        results += card.lm_eval_results(_result_files(run))
    score = f", {validation_summary(last[-1])} on held-out data" if last else ""
    name = options.repo.rpartition("/")[2]
    training = card.TrainingFacts(config, manifest["tokens"], score, results)
    publication = card.Publication(
        options.repo,
        options.revision,
        options.license,
        dataset_licences(published["data"]),
        f"{RECORD}/loss.png",
    )
    text = edited_card(run / "model")
    if text is None:
        text = card.model_card(name, model_facts(model, config), training, publication)
    (staged / card.NAME).write_text(text)


def _stage_record(checkpoint: Checkpoint, folder: Path, published: dict[str, Any]) -> History:
    """Write training/; returns what metrics.jsonl says up to the checkpoint's step."""
    folder.mkdir()
    run, metrics = checkpoint.run, folder / "metrics.jsonl"
    sections = {name: fields for name, fields in published.items() if name != "tracking"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    with metrics.open("w") as file:
        for line in _lines_up_to(run / "metrics.jsonl", checkpoint.step):
            file.write(line)
    history = History(metrics).update()
    is_classifier = is_labelled(published["data"]["corpus"])
    draw_loss(history, folder / "loss.png", run.resolve().name, "example" if is_classifier else "token")
    if any(entry.get("by_length") for entry in history.validations):
        draw_accuracy(history, folder / "accuracy_by_length.png", run.resolve().name)
    if _has_its_scores(run, checkpoint.step) and (run / "samples.txt").exists():
        shutil.copyfile(run / "samples.txt", folder / "samples.txt")
    return history


def _lines_up_to(metrics: Path, step: int) -> Iterator[str]:
    """The whole lines of a run's metrics.jsonl up to a step."""
    if not metrics.exists():
        return
    with metrics.open() as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that is being written
                entry = json.loads(line)
                if entry["step"] <= step:
                    yield published_line(entry, line)


def published_line(entry: dict[str, Any], line: str) -> str:
    """A line of metrics.jsonl whose sources, which may be local paths, have public names.

    Args:
        entry: the line's object.
    """
    named = {field: entry[field] for field in BY_SOURCE if isinstance(entry.get(field), dict)}
    if not named:
        return line
    for field, values in named.items():
        names: dict[str, Any] = {}
        for name, value in values.items():
            public = public_value(name)
            same = sum(other == public or other.startswith(f"{public} (") for other in names)
            names[f"{public} ({same + 1})" if same else public] = value
        entry[field] = names
    return json.dumps(entry) + "\n"


def _has_its_scores(run: Path, step: int) -> bool:
    """Whether samples.txt and evals/ of a run are those of its weights at a step: it ended there."""
    note = run / ".finished"
    return note.exists() and note.read_text().strip() == str(step)


def _result_files(run: Path) -> list[Path]:
    """The results files of a run's exported model, oldest first. Those of an earlier export are left out."""
    weights = run / "model" / "model.safetensors"
    exported = weights.stat().st_mtime if weights.exists() else 0.0
    files = [(path.stat().st_mtime, path) for path in (run / "evals").glob("*.json")]
    return [path for time, path in sorted(files) if time >= exported]


def dataset_licences(data: dict[str, Any]) -> dict[str, str]:
    """The licences of a run's hub datasets as the hub states them; those that it does not state are left
    out."""
    api, licences = hub_api(), {}
    for source in card.data_sources(data):
        if not source.is_hub:
            continue
        with contextlib.suppress(Exception):  # a dataset that was removed, or a hub that does not answer
            info = api.dataset_info(source.name, revision=source.revision, timeout=TIMEOUT)
            stated = (info.card_data or {}).get("license")
            if stated:
                licences[source.name] = ", ".join(stated) if isinstance(stated, list) else str(stated)
    return licences


def stage_export(folder: Path, staged: Path) -> None:
    """Copy the files of an export that belongs to no run.

    Raises:
        UserError: the folder holds no export.
    """
    names = exported_files(folder)
    if not names or "config.json" not in names:
        message = f"{folder} is neither a run's folder nor an export of minrnn export, which lists its files"
        raise UserError("RUN", f"{message}; `hf upload` pushes other folders")
    for name in names:
        shutil.copyfile(folder / name, staged / name)


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights in a folder: of the file, or of the files' hashes if there are several."""
    hashes = [sha256_of(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def staged_files(staged: Path) -> list[str]:
    """Relative paths of the staged files."""
    return sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())


def write_marker(staged: Path, identity: Identity, name: str, step: int | None, keeps_card: bool) -> None:
    """Write training/run.json.

    Args:
        name: of the run or the export, for messages.
        step: of the checkpoint; None for an export.
        keeps_card: the card of the repository stays, so this push does not write one.
    """
    files = {
        path: sha256_of(staged / path)
        for path in staged_files(staged)
        if not (path == card.NAME and keeps_card)
    }
    content = {
        "name": name,
        "run": identity.run,
        "step": step,
        "weights": identity.weights or weights_sha256(staged),
        "files": files,
    }
    write_json(staged / MARKER, content)
