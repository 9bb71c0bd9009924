"""The plan of a sweep: what each run costs. `sweep.json` in the sweep's folder holds it for all workers.

    {"format", "id", "sweep", "runs": [{"name", "family", "settings", "trunk", "branch_step", "save_at",
                                        "lr_factor", "sizes", "parameters", "steps", "tokens",
                                        "flops_per_token", "flops"}]}

`flops` are those that the run trains itself: a branch without its trunk's part. Runs of a search have a
`trial`, its number, and the costs of the middle of all ranges.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import make_folder, sync, write_json
from ...common.locks import lock
from ...evals.scaling.points import PLAN
from .checks import launch_errors
from .expand import PlannedRun
from .spec import Sweep

FORMAT = 1
OWN = ("name", "family", "settings", "trunk", "branch_step", "save_at", "trial")
"""What the file of the sweep says about a run; the rest is computed from it."""


def planned(sweep: Sweep, runs: list[PlannedRun]) -> list[dict[str, Any]]:
    """The entries of a sweep's runs, with their costs: those of its folder, if it holds this sweep, else
    computed now.

    Args:
        runs: of the sweep, from `expand`.

    Raises:
        UserError: errors of the launch; or the folder holds another sweep.
    """
    if errors := dict.fromkeys(launch_errors(sweep, runs)):
        raise UserError.from_list(errors)
    path = Path(sweep.out) / PLAN
    if not path.exists():
        return _entries(runs)
    saved = {entry["name"]: entry for entry in _published(sweep, [_own(run) for run in runs])}
    added = {entry["name"]: entry for entry in _entries([run for run in runs if run.name not in saved])}
    return [{**saved, **added}[run.name] for run in runs]


def sweep_id(folder: Path) -> str:
    """What distinguishes a sweep from others in folders of the same name; "" for one of an older version."""
    return json.loads((folder / PLAN).read_text()).get("id", "")


def publish(sweep: Sweep, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the plan, unless another worker has, and what a sweep of variants has gained since. Returns the
    entries in the folder.

    Args:
        runs: entries, from `planned`.

    Raises:
        UserError: the folder cannot be used, or holds another sweep.
    """
    folder = Path(sweep.out)
    path = folder / PLAN
    document = {
        "format": FORMAT,
        "id": uuid.uuid4().hex[:8],
        "sweep": sweep.model_dump(mode="json"),
        "runs": runs,
    }
    text = json.dumps(document, indent=1)
    try:
        make_folder(folder)
        if path.exists():
            return _with_new_variants(path, sweep, document)
        if foreign := [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]:
            names = ", ".join(sorted(foreign)[:3])
            message = f"{folder} holds {names} and no {PLAN}; name a folder of the sweep's own"
            raise UserError("out", message)
        unfinished = folder / f".{PLAN}.{uuid.uuid4().hex}"
        unfinished.write_text(text + "\n")
        sync(unfinished)
        try:
            os.link(unfinished, path)  # fails if another worker was first
        except FileExistsError:
            return _with_new_variants(path, sweep, document)
        finally:
            unfinished.unlink()
    except OSError as error:
        raise UserError("out", f"cannot use {folder}: {error.strerror}") from None
    return runs


def _with_new_variants(path: Path, sweep: Sweep, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the runs of a document that the published plan lacks, and return those of the document.

    Runs of variants that are no longer in the sweep's file stay in the plan, and are not trained.
    """
    with (path.parent / f".{PLAN}.lock").open("a") as file:
        lock(file, wait=True)
        saved = {entry["name"] for entry in _published(sweep, document["runs"])}
        if added := [entry for entry in document["runs"] if entry["name"] not in saved]:
            old = json.loads(path.read_text())
            write_json(path, old | {"sweep": document["sweep"], "runs": [*old["runs"], *added]})
    return document["runs"]


def _published(sweep: Sweep, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries in the sweep's folder, which must be of these runs. Of a sweep of variants, those of the
    same name must be.

    Raises:
        UserError: the folder holds another sweep.
    """
    document = json.loads((Path(sweep.out) / PLAN).read_text())
    saved, new = (
        {entry["name"]: {key: entry.get(key) for key in OWN} for entry in entries}
        for entries in (document["runs"], runs)
    )
    names = list({**saved, **new})
    if sweep.variants and document["sweep"].get("variants"):  # they come and go
        names = [name for name in saved if name in new] or names
    different = [name for name in names if saved.get(name) != new.get(name)]
    if document["sweep"].get("search") != sweep.model_dump(mode="json")["search"]:
        different.append("search")
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        message = f"{sweep.out} holds another sweep: {different[0]}{more} differ; name another folder"
        raise UserError("out", message)
    return document["runs"]


def _own(run: PlannedRun) -> dict[str, Any]:
    own = {key: getattr(run, key) for key in OWN}
    return json.loads(json.dumps(own))  # tuples as lists


def _entries(runs: list[PlannedRun]) -> list[dict[str, Any]]:
    """The runs with their costs. Each model is sized once."""
    from ...data import model_vocab_size, run_tokenizer
    from ...pipeline.family_settings import with_sizes
    from ...pipeline.flops import model_size

    vocab_sizes: dict[str, int] = {}
    sized: dict[str, dict[str, Any]] = {}
    entries = []
    for run in runs:
        recipe, data = run.recipe, run.recipe.data
        tokenizer = json.dumps([data.corpus, data.tokenizer, data.task])
        if tokenizer not in vocab_sizes:
            vocab_sizes[tokenizer] = model_vocab_size(
                run_tokenizer(data.corpus, data.tokenizer, data.task, data.trust_remote_code)
            )
        key = json.dumps([tokenizer, recipe.batch.chunk, recipe.model.model_dump(mode="json")])
        if key not in sized:
            with_size = with_sizes(recipe, vocab_sizes[tokenizer])
            size = model_size(with_size, vocab_sizes[tokenizer]).to_json()
            sizes = with_size.model.sizes if run.trial is None else {}
            sized[key] = {"sizes": sizes, **size}
        steps, tokens_per_step = recipe.train.steps, recipe.batch.tokens_per_step
        own = (steps - run.branch_step) * tokens_per_step
        entries.append(
            {
                **_own(run),
                "lr_factor": run.lr_factor,
                **sized[key],
                "steps": steps,
                "tokens": steps * tokens_per_step,
                "flops": sized[key]["flops_per_token"] * own,
            }
        )
    return entries
