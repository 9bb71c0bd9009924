"""The runs of a sweep, each with all its settings."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...common.errors import UserError
from ...pipeline.config import SECTIONS, Recipe
from ...pipeline.recipe import build_recipe, recipe_values, unknown_key_error
from .rules import decay_start
from .spec import LONGEST_NAME, Ladder, Random, Range, Search, Sweep

ANY_RUN = {"run.seed": 0, "train.steps": 1}
# A ladder sets these for each run.
OF_THE_LADDER = ("train.steps", "model.num_parameters", "optim.schedule_steps")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    name: str
    settings: dict[str, Any]
    """By key (`optim.lr`), over those of the base recipe."""
    recipe: Recipe = field(compare=False, repr=False)
    family: str = ""
    """Its name in a fit; "" if the sweep does not name families."""
    trunk: str | None = None
    """The longer run that it branches off, if it does."""
    branch_step: int = 0
    """The step at which it does."""
    save_at: tuple[int, ...] = ()
    """Steps whose checkpoints are kept for branches."""
    trial: int | None = None
    """Number of a run of a search. `settings` lack those that are drawn; `recipe` has the middle of each."""
    lr_factor: float = 1.0
    """Of the rule's learning rate, in a ladder."""


def expand(sweep: Sweep) -> list[PlannedRun]:
    """All runs, in the order of the file.

    Raises:
        UserError: all errors of all runs, two runs of the same settings, or a budget that is too small.
    """
    builder = Builder(base_values(sweep))
    errors: dict[tuple[str, str], None] = {}
    runs: list[PlannedRun] = []
    middle = {} if sweep.search is None else _middle(sweep.search)
    for name, parts in _parts(sweep, builder):
        settings = {**sweep.settings, **parts.pop("settings")}
        try:
            recipe = builder.build({**settings, **middle})
        except UserError as error:
            errors |= dict.fromkeys(error.errors)
            continue
        runs.append(PlannedRun(name, settings, recipe, **parts))
    if len(errors) == 0:
        errors |= dict.fromkeys(_errors_together(runs))
    if len(errors) == 0 and sweep.search is not None:
        errors |= dict.fromkeys(_errors_of_ends(sweep.search, {**runs[0].settings, **middle}, builder))
    if errors:
        raise UserError.from_list(errors)
    return runs


def base_values(sweep: Sweep) -> dict[str, Any]:
    """The values of a sweep's base recipe, section -> field -> value.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return recipe_values(sweep.base) if sweep.base else {}
    except UserError as error:
        raise error.with_keys({"--config": "base"}) from None


def _errors_together(runs: list[PlannedRun]) -> Iterator[tuple[str, str]]:
    """Errors of runs that are valid alone."""
    by_settings: dict[str, str] = {}
    for run in runs:
        # The recipe's values: 1 and 1.0 are equal, and a default equals its value.
        text = json.dumps([getattr(run.recipe, section).model_dump(mode="json") for section in SECTIONS])
        if text in by_settings and run.trial is None:
            yield "sweep", f"{by_settings[text]} and {run.name} have the same settings"
        by_settings.setdefault(text, run.name)
        if run.recipe.train.precision == "auto":
            message = "auto is measured by each run, on its own machine; set fp32 or bf16 for the sweep"
            yield "train.precision", message


class Builder:
    """Builds the recipes of runs. Runs that differ in their steps or seed only are checked once.

    Args:
        base: values of the base recipe, section -> field -> value.
    """

    def __init__(self, base: dict[str, Any]):
        self.base = base
        self._built: dict[str, Recipe] = {}

    def build(self, settings: dict[str, Any]) -> Recipe:
        """The recipe of these settings over the base.

        Raises:
            UserError: all errors.
        """
        seed, steps = settings.get("run.seed"), settings.get("train.steps")
        is_checked = isinstance(seed, int) and seed >= 0 and isinstance(steps, int) and steps >= 1
        if not is_checked:
            return build_recipe(recipe_with(self.base, settings))
        others = {key: value for key, value in settings.items() if key not in ("run.seed", "train.steps")}
        key = json.dumps(others, sort_keys=True, default=str)
        if key not in self._built:
            self._built[key] = build_recipe(recipe_with(self.base, others))
        recipe = self._built[key]
        return dataclasses.replace(
            recipe,
            run=recipe.run.model_copy(update={"seed": seed}),
            train=recipe.train.model_copy(update={"steps": steps}),
        )


def recipe_with(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe: those of the base, with these settings on top.

    Raises:
        UserError: keys that are no settings.
    """
    values: dict[str, Any] = {section: dict(fields or {}) for section, fields in base.items()}
    errors = []
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        if not dot or section not in SECTIONS:
            errors.append(unknown_key_error(key))
            continue
        values.setdefault(section, {})[name] = value
    if errors:
        raise UserError.from_list(errors)
    return values


Named = tuple[str, dict[str, Any]]
"""A run's name, and the arguments of PlannedRun for it."""


def _parts(sweep: Sweep, builder: Builder) -> Iterator[Named]:
    """Name and own settings of each run."""
    if sweep.ladder is not None:
        named = _ladder(sweep.ladder, sweep, builder)
    elif sweep.variants is not None:
        named = ((name, {"settings": own, "family": name}) for name, own in sweep.variants.items())
    elif sweep.random is not None:
        named = _random(sweep.random)
    elif sweep.search is not None:
        named = ((f"search-{i:04d}", {"settings": {}, "trial": i}) for i in range(sweep.search.runs))
    else:
        named = _grid(sweep.grid or {})
    for name, parts in named:
        for seed in sweep.seeds:
            suffix = f"-seed{seed}" if len(sweep.seeds) > 1 else ""
            own = {**parts, "settings": {**parts["settings"], "run.seed": seed}}
            if own.get("trunk"):
                own["trunk"] += suffix
            yield name + suffix, own


def _grid(grid: dict[str, list[Any]]) -> Iterator[Named]:
    """Every combination of the values."""
    names = set()
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
        name = re.sub(r"[^\w.=+-]+", "_", name)
        if len(name) > LONGEST_NAME or name in names:
            name = f"{name[:LONGEST_NAME]}-{_digest(settings)}"
        names.add(name)
        yield name, {"settings": settings}


def _random(random: Random) -> Iterator[Named]:
    """Drawn settings. Run i depends on (seed, i) and the settings' names only."""
    for number in range(random.runs):
        settings = {}
        for key, drawn in random.settings.items():
            digest = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
            settings[key] = _draw(drawn, np.random.default_rng([random.seed, number, digest]))
        yield f"random-{number:04d}", {"settings": settings}


def _draw(drawn: Range | list[Any], generator: np.random.Generator) -> Any:
    if isinstance(drawn, list):
        return drawn[int(generator.integers(len(drawn)))]
    low, high = (np.log(drawn.low), np.log(drawn.high)) if drawn.log else (drawn.low, drawn.high)
    value = generator.uniform(low, high)
    value = float(np.exp(value) if drawn.log else value)
    return round(value) if drawn.integer else float(f"{value:.6g}")


def _middle(search: Search) -> dict[str, Any]:
    """A value of each drawn setting: the middle of a range, the first of a list."""
    middle = {}
    for key, drawn in search.settings.items():
        if isinstance(drawn, list):
            middle[key] = drawn[0]
        else:
            value = math.sqrt(drawn.low * drawn.high) if drawn.log else (drawn.low + drawn.high) / 2
            middle[key] = round(value) if drawn.integer else value
    return middle


def _errors_of_ends(search: Search, settings: dict[str, Any], builder: Builder) -> Iterator[tuple[str, str]]:
    """Errors at the ends of each range and at each value of a list, with the middle of all others."""
    for key, drawn in search.settings.items():
        ends = drawn if isinstance(drawn, list) else [drawn.low, drawn.high]
        if isinstance(drawn, Range) and drawn.integer:
            ends = [round(end) for end in ends]
        for end in ends:
            try:
                builder.build({**settings, key: end})
            except UserError as error:
                yield from error.errors


def _ladder(ladder: Ladder, sweep: Sweep, builder: Builder) -> Iterator[Named]:
    """Sizes times budgets of each family. The largest budget of a size is the trunk of the others."""
    for (family, own), size, factor in itertools.product(
        ladder.families.items(), ladder.sizes, ladder.lr_factors
    ):
        common = {**sweep.settings, **own}
        recipe = builder.build({**common, **ANY_RUN})
        batch = recipe.batch
        rule = ladder.rules_of(family).settings(size, batch.readers, batch.chunk * batch.backprop_chunks)
        rule["optim.lr"] *= factor
        settings = {**rule, **common}
        built = builder.build({**settings, **ANY_RUN})
        _check_ladder(ladder, common, built)
        steps = [round(budget * size / built.batch.tokens_per_step) for budget in ladder.budgets]
        is_wsd = built.optim.schedule == "wsd"
        starts = [decay_start(number, built.optim.decay_fraction) if is_wsd else number for number in steps]
        prefix = re.sub(r"[^\w.+-]+", "_", family) + f"-{_short(size)}"
        prefix += f"-lr{factor:g}x" if len(ladder.lr_factors) > 1 else ""
        names = [f"{prefix}-{budget:g}x" for budget in ladder.budgets]
        for i, (name, number, start) in enumerate(zip(names, steps, starts, strict=True)):
            if start <= built.optim.warmup_steps:
                raise UserError("ladder.budgets", _too_small(name, number, built))
            is_last = i == len(steps) - 1
            parts: dict[str, Any] = {"settings": {**settings, "train.steps": number}, "family": family}
            parts["lr_factor"] = factor
            if ladder.branch and is_last:
                parts["save_at"] = tuple(dict.fromkeys(starts[:-1]))
            elif ladder.branch:
                parts |= {"trunk": names[-1], "branch_step": start}
            yield name, parts


def _check_ladder(ladder: Ladder, common: dict[str, Any], recipe: Recipe) -> None:
    """Refuse settings that contradict the ladder.

    Args:
        common: settings of the sweep and of the family.
        recipe: with them.
    """
    errors = [(key, "follows from the ladder; leave it out") for key in OF_THE_LADDER if key in common]
    if "optim.lr" in common and ladder.lr_factors != [1.0]:
        errors.append(("ladder.lr_factors", "multiply the rule's learning rate, but optim.lr is set"))
    if ladder.branch and recipe.optim.schedule != "wsd":
        message = f"is for optim.schedule wsd, not {recipe.optim.schedule}; set ladder.branch to false"
        errors.append(("ladder.branch", message))
    if errors:
        raise UserError.from_list(errors)


def _too_small(name: str, steps: int, recipe: Recipe) -> str:
    tokens, warmup = recipe.batch.tokens_per_step, recipe.optim.warmup_steps
    return (
        f"{name} would have {steps} steps of {tokens:,} tokens, and {warmup} steps of warmup before the "
        "decay; use a larger budget, or lower ladder.rules.warmup or ladder.rules.batch_tokens"
    )


def _short(size: int) -> str:
    """1500000 -> 1.5M"""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if size >= factor:
            return f"{size / factor:g}{unit}"
    return str(size)


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:8]
