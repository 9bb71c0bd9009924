"""What would stop every run of a sweep, found before the first."""

import json
from collections.abc import Iterator
from pathlib import Path

from ...common.errors import UserError
from ...data import open_source, source_specs
from ...pipeline.corpora import corpus_spec
from ...pipeline.launch_checks import layout_errors
from .expand import PlannedRun
from .spec import Sweep

Errors = Iterator[tuple[str, str]]


def launch_errors(sweep: Sweep, runs: list[PlannedRun]) -> Errors:
    """Errors of the processes of a run: the launcher's file, and readers that they cannot share."""
    if sweep.launcher is not None and not Path(sweep.launcher).is_file():
        yield "launcher", f"there is no file {sweep.launcher}"
    for run in runs:
        yield from layout_errors(run.recipe, sweep.processes)


def check_corpora(runs: list[PlannedRun]) -> None:
    """Open each corpus of the runs. Tasks, whose examples are made, have none.

    Raises:
        UserError: corpora that cannot be opened.
    """
    errors: dict[tuple[str, str], None] = {}
    recipes = {json.dumps(run.recipe.data.model_dump(mode="json")): run.recipe for run in runs}
    for recipe in recipes.values():
        if recipe.task() is not None:
            continue
        for spec in source_specs(corpus_spec(recipe)):
            try:
                open_source(spec)
            except UserError as error:
                errors |= dict.fromkeys(error.errors)
    if errors:
        raise UserError.from_list(errors)
