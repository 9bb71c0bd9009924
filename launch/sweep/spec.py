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
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator

from ...common.errors import UserError
from ...common.files import user_path
from ...common.names import did_you_mean, nearest_names
from ...evals.scaling.points import SAME_DATA
from ...pipeline.families.fields import parse_count
from ...pipeline.recipe import setting_value
from ...pipeline.section import Section, expand_home
from .rules import Rules

Size = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]
Settings = dict[str, Any]
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


class Sweep(Section):
    """A sweep."""

    out: str = Field(min_length=1)
    """The sweep's folder."""
    base: str | None = None
    """A recipe for all runs: a name or a file."""
    settings: Settings = {}
    """Settings of every run, over those of `base`."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    """Every run is made with each."""
    processes: int = Field(default=1, ge=1)
    """Processes of each run."""
    launcher: str | None = None
    """A configuration file for accelerate launch, if a run has several processes."""
    retries: int = Field(default=2, ge=0)
    """How often a run that failed is started again."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] | None = None
    variants: Variants | None = Field(default=None, min_length=1)
    """Runs by name, each with its own settings, where several settings change together."""
    random: Random | None = None
    search: Search | None = None
    ladder: Ladder | None = None
    _expand = field_validator("out", "launcher")(expand_home)

    def errors(self) -> dict[str, str]:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        errors = {}
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
        if len(set(self.seeds)) < len(self.seeds):
            errors["seeds"] = f"names a seed twice: {self.seeds}"
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


def shipped_sweeps() -> dict[str, Path]:
    """Sweeps that come with the package, by name."""
    folder = Path(__file__).resolve().parent.parent / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_sweep(name: str, settings: dict[str, str] | None = None) -> Sweep:
    """The sweep of a file, or of a name of `shipped_sweeps`.

    Args:
        settings: of the command line, as text, in place of those in the file's `settings`.

    Raises:
        UserError: all errors of the file and of the settings' keys.
    """
    path = shipped_sweeps().get(name, user_path(name))
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        shipped = ", ".join(shipped_sweeps())
        raise UserError(
            name, f"cannot be read: {error.strerror}; sweeps that come with minrnn: {shipped}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(name, f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(name, f"must hold out, and one of {', '.join(KINDS)}")
    try:
        sweep = Sweep.model_validate(values)
    except ValidationError as invalid:
        raise UserError.from_list(_error(error) for error in invalid.errors()) from None
    sweep.settings |= {key: setting_value(key, text) for key, text in (settings or {}).items()}
    if errors := sweep.errors():
        raise UserError.from_list(errors.items())
    return sweep


def _error(error: Any) -> tuple[str, str]:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        sections = {
            "ladder": Ladder,
            "rules": Rules,
            "family_rules": Rules,
            "random": Random,
            "search": Search,
        }
        known = next((sections[part] for part in reversed(error["loc"][:-1]) if part in sections), Sweep)
        hint = did_you_mean(nearest_names(str(error["loc"][-1]), known.model_fields), "there is no such key")
        return key, f"unknown key ({hint})"
    return value_error(error)


def value_error(error: Any) -> tuple[str, str]:
    """Key and message of an error of pydantic, other than an unknown key."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return key, "is missing"
    if error["type"] == "too_short" and not error["input"]:
        return key, "is empty"
    return key, f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
