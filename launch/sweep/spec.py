"""SWEEP.yaml: what a sweep consists of.

    out: runs/laptop                the sweep's folder, which all workers share
    base: quickstart                a recipe: a name or a file
    settings: {train.precision: fp32, data.corpus: books}          for every run
    seeds: [0]
    processes: 1                    of each run; more are started by accelerate launch

and one of

    grid: {model.cell: [mingru, minlstm], optim.lr: [1e-3, 2e-3]}  every combination
    variants: {narrow: {model.hidden_size: 64, optim.lr: 4e-3}, wide: {model.hidden_size: 256}}
    random: {runs: 20, seed: 0, settings: {optim.lr: {low: 1e-4, high: 1e-2, log: true}}}
    search: {runs: 20, sampler: tpe, settings: {optim.lr: {low: 1e-4, high: 1e-2, log: true}}}
    ladder: {sizes: [100k, 1M], budgets: [5, 10, 20], families: {minGRU: {}, Llama: {model.family: llama}}}
"""

import itertools
import math
from collections.abc import Iterable
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from ...common.names import did_you_mean, nearest_names
from ...evals.scaling.points import SAME_DATA
from ...pipeline.families.fields import parse_count
from ...pipeline.section import Section
from .rules import Rules
from .runs_file import RunsFile, Settings

Size = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]
LONGEST_NAME = 80
VariantName = Annotated[str, Field(pattern=r"^[\w.+-]+$", max_length=LONGEST_NAME)]
Variants = dict[VariantName, Annotated[Settings, Field(min_length=1)]]
KINDS = ("grid", "variants", "random", "search", "ladder")
MAX_RUNS = 100_000
# The sweep sets these for each run.
RESERVED = {
    **dict.fromkeys(
        ("run.dir", "run.resume", "run.change", "train.save_at"),
        "is set by the sweep for each run; leave it out",
    ),
    "run.seed": "is set by the sweep for each run; name its values in seeds",
}

FIXED_IN_A_SEARCH = {
    "train.steps": "cannot be drawn: more steps have a lower loss; set it in settings",
    **dict.fromkeys(
        SAME_DATA, "cannot be drawn: losses on different data do not compare; set it in settings"
    ),
}


class Range(Section):
    """A range of a random setting."""

    low: float
    high: float
    log: bool = False
    """Draw the logarithm uniformly."""
    integer: bool = False
    """Round to a whole number."""

    def errors(self) -> dict[str, str]:
        if self.low > self.high:
            return {"high": f"must be at least low, which is {self.low:g}"}
        if self.log and self.low <= 0:
            return {"low": "must be positive for a logarithm"}
        return {}

    def num_values(self) -> float:
        """How many values it has."""
        if self.integer:
            return round(self.high) - round(self.low) + 1
        return math.inf if self.low < self.high else 1


class Random(Section):
    """Runs with settings that are drawn at random."""

    runs: int = Field(ge=1, le=MAX_RUNS)
    seed: int = Field(default=0, ge=0)
    """Run i depends on (seed, i) only, so that more runs may follow later."""
    settings: dict[str, Range | Annotated[list[Any], Field(min_length=1)]] = Field(min_length=1)
    """A range, or a list to choose from, for each."""


class Search(Random):
    """Runs whose settings Optuna draws one after the other, from the results of the runs before them."""

    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: Bayesian, a tree-structured Parzen estimator. random: independent of results."""
    startup: int = Field(default=10, ge=1)
    """Results that tpe needs; before that, it draws at random."""

    def errors(self) -> dict[str, str]:
        return {
            f"settings.{key}": FIXED_IN_A_SEARCH[key] for key in self.settings if key in FIXED_IN_A_SEARCH
        }

    def num_drawings(self) -> float:
        """How many different settings can be drawn; infinite with a continuous range."""
        counts = [
            each.num_values() if isinstance(each, Range) else len(each) for each in self.settings.values()
        ]
        return math.prod(counts)


class Ladder(Section):
    """Sizes times budgets, for each family."""

    sizes: list[Size] = Field(min_length=1)
    """Parameters, e.g. [100k, 1M]."""
    budgets: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Tokens per parameter."""
    families: dict[str, Settings] = Field(default={"minGRU": {}}, min_length=1)
    """Settings of each family of the comparison, by name."""
    lr_factors: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0], min_length=1)
    """Of the rule's learning rate, to check it."""
    rules: Rules = Rules()
    family_rules: dict[str, Rules] = {}
    """Numbers of `rules` that differ for a family, by its name: {Llama: {lr: 2.8e-4}}."""
    branch: bool = True
    """Train each size once, to the largest budget, and branch the decays of the others off it: equal to
    direct runs to the bit, in less time."""
    _sorted = field_validator("budgets")(sorted)

    def rules_of(self, family: str) -> Rules:
        """The rules of a family."""
        own = self.family_rules.get(family, Rules())
        return self.rules.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})

    def errors(self) -> dict[str, str]:
        errors = {}
        for name in ("sizes", "budgets", "lr_factors"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                errors[name] = f"names a value twice: {values}"
        for family in self.family_rules.keys() - self.families.keys():
            hint = did_you_mean(
                nearest_names(family, self.families), f"families are {', '.join(self.families)}"
            )
            errors[f"family_rules.{family}"] = f"names no family ({hint})"
        return errors


class Sweep(RunsFile):
    """A sweep."""

    FOLDER = "sweeps"
    CONTENT = f"out, and one of {', '.join(KINDS)}"
    SECTIONS = MappingProxyType(
        {"ladder": Ladder, "rules": Rules, "family_rules": Rules, "random": Random, "search": Search}
    )

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = None
    variants: Variants | None = Field(default=None, min_length=1)
    """Runs by name, each with its own settings, where several settings change together."""
    random: Random | None = None
    search: Search | None = None
    ladder: Ladder | None = None

    def errors(self) -> dict[str, str]:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        errors = super().errors()
        if len(kinds) != 1:
            errors["sweep"] = f"must have one of {', '.join(KINDS)}, not {' and '.join(kinds) or 'none'}"
        errors |= {key: RESERVED[key] for key in self._keys() if key in RESERVED}
        for kind, varied in self._varied().items():
            errors |= {
                key: f"is in settings and in {kind}; name it once" for key in varied if key in self.settings
            }
        if self.grid == {}:
            errors["grid"] = "names no setting"
        elif self.grid is not None and (runs := math.prod(map(len, self.grid.values()))) > MAX_RUNS:
            errors["grid"] = f"has {runs:,} combinations, more than {MAX_RUNS:,}; use random for some of them"
        for kind, varied in self._varied().items():
            for key, drawn in varied.items():
                if isinstance(drawn, Range):
                    errors |= {f"{kind}.settings.{key}.{name}": m for name, m in drawn.errors().items()}
        if self.search is not None:
            errors |= {f"search.{key}": message for key, message in self.search.errors().items()}
            if (drawings := self.search.num_drawings()) < self.search.runs:
                message = f"has {drawings} combinations for {self.search.runs} runs; use grid for all of them"
                errors["search.runs"] = message
            if len(self.seeds) > 1:
                errors["seeds"] = "must be one for a search, which trains each drawing once"
        if self.ladder is not None:
            errors |= {f"ladder.{key}": message for key, message in self.ladder.errors().items()}
        return errors

    def _keys(self) -> Iterable[str]:
        """All settings that the file names."""
        families = self.ladder.families.values() if self.ladder is not None else ()
        variants = (self.variants or {}).values()
        return itertools.chain(self.settings, *self._varied().values(), *families, *variants)

    def _varied(self) -> dict[str, dict[str, Any]]:
        """What a grid, a random search and a search vary, by their names."""
        drawn = {kind: getattr(getattr(self, kind), "settings", {}) for kind in ("random", "search")}
        return {"grid": self.grid or {}, **drawn}
