"""ABLATION.yaml: a base, and variants of it.

    out: runs/ablation
    base: quickstart                          a recipe: a name or a file
    settings: {train.precision: fp32}         of every run
    seeds: [0, 1, 2]
    tuning: {learning_rates: [2.0e-3, 4.0e-3, 8.0e-3], settings: {train.steps: 200}}
    variants:                                 the first is the one that all are compared with
      default: {}
      muon: {optim.name: muon}

It becomes two sweeps of variants: OUT/tuning, each variant with each learning rate, and OUT/runs, each
variant at its best learning rate with each seed.
"""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator

from ...common.errors import UserError
from ...common.files import user_path
from ...common.names import did_you_mean, nearest_names
from ...pipeline.recipe import setting_value
from ...pipeline.section import Section, expand_home
from ..sweep.spec import LONGEST_NAME, RESERVED, Settings, Sweep, VariantName, value_error

LR = "optim.lr"
TUNING, COMPARISON = "tuning", "runs"  # folders


class Tuning(Section):
    """How each variant's learning rate is chosen: by the lowest held-out loss of one run at each rate."""

    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """The grid; with one rate, nothing is tuned."""
    settings: Settings = {}
    """Of the runs of the tuning, over the others: fewer steps, as a rule."""
    seed: Annotated[int, Field(ge=0)] = 100
    """Their seed; none of `seeds`, so that the rate is not chosen on the compared runs."""


class Ablation(Section):
    """An ablation."""

    out: str = Field(min_length=1)
    """Its folder."""
    base: str | None = None
    """A recipe for all runs: a name or a file."""
    settings: Settings = {}
    """Settings of every run, over those of `base`."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    """Every variant is trained with each."""
    tuning: Tuning
    variants: dict[VariantName, Settings] = Field(min_length=1)
    """Settings by name; the first is the one that the others are compared with."""
    processes: int = Field(default=1, ge=1)
    """Processes of each run."""
    launcher: str | None = None
    """A configuration file for accelerate launch, if a run has several processes."""
    retries: int = Field(default=2, ge=0)
    """How often a run that failed is started again."""
    _expand = field_validator("out", "launcher")(expand_home)

    @property
    def reference(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    def errors(self) -> dict[str, str]:
        errors = {}
        rates = self.tuning.learning_rates
        if len({f"{rate:g}" for rate in rates}) < len(rates):
            errors["tuning.learning_rates"] = f"names a rate twice: {rates}"
        if len(set(self.seeds)) < len(self.seeds):
            errors["seeds"] = f"names a seed twice: {self.seeds}"
        if self.tuning.seed in self.seeds:
            message = f"is one of seeds: {self.tuning.seed}; the rate would be chosen on a compared run"
            errors["tuning.seed"] = message
        places = {"settings": self.settings, "tuning.settings": self.tuning.settings}
        places |= {f"variants.{name}": own for name, own in self.variants.items()}
        for place, settings in places.items():
            if LR in settings:
                errors[place] = f"sets {LR}, which is tuned; name its values in tuning.learning_rates"
            errors |= {f"{place}.{key}": RESERVED[key] for key in settings if key in RESERVED}
        longest = max(len(self.tuning_name(name, rate)) for name in self.variants for rate in rates)
        if longest > LONGEST_NAME:
            message = (
                f"names with their learning rates have up to {longest} characters, and {LONGEST_NAME} fit"
            )
            errors["variants"] = message
        return errors

    def tuning_sweep(self) -> Sweep | None:
        """Each variant with each learning rate; None for a single one."""
        rates = self.tuning.learning_rates
        if len(rates) == 1:
            return None
        variants = {
            self.tuning_name(name, rate): {**own, LR: rate}
            for name, own in self.variants.items()
            for rate in rates
        }
        settings = {**self.settings, **self.tuning.settings}
        return self._sweep(TUNING, settings, [self.tuning.seed], variants)

    @staticmethod
    def tuning_name(variant: str, rate: float) -> str:
        """The name of the tuning's run of a variant with a learning rate."""
        return f"{variant}-lr{rate:g}"

    def sweep(self, rates: dict[str, float]) -> Sweep:
        """Each variant with each seed.

        Args:
            rates: learning rate of each variant that is trained.
        """
        variants = {name: {**self.variants[name], LR: rate} for name, rate in rates.items()}
        return self._sweep(COMPARISON, self.settings, self.seeds, variants)

    def _sweep(self, folder: str, settings: Settings, seeds: list[int], variants: dict[str, Any]) -> Sweep:
        return Sweep(
            out=str(Path(self.out) / folder),
            base=self.base,
            settings=settings,
            seeds=seeds,
            processes=self.processes,
            launcher=self.launcher,
            retries=self.retries,
            variants=variants,
        )


def shipped_ablations() -> dict[str, Path]:
    """Ablations that come with the package, by name."""
    folder = Path(__file__).resolve().parent.parent / "ablations"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_ablation(name: str, settings: dict[str, str] | None = None) -> Ablation:
    """The ablation of a file, or of a name of `shipped_ablations`.

    Args:
        settings: of the command line, as text, in place of those in the file's `settings`.

    Raises:
        UserError: all errors of the file and of the settings' keys.
    """
    path = shipped_ablations().get(name, user_path(name))
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        shipped = ", ".join(shipped_ablations()) or "none"
        message = f"cannot be read: {error.strerror}; ablations that come with minrnn: {shipped}"
        raise UserError(name, message) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(name, f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(name, "must hold out, tuning and variants")
    try:
        ablation = Ablation.model_validate(values)
    except ValidationError as invalid:
        raise UserError.from_list(_error(error) for error in invalid.errors()) from None
    ablation.settings |= {key: setting_value(key, text) for key, text in (settings or {}).items()}
    if errors := ablation.errors():
        raise UserError.from_list(errors.items())
    return ablation


def _error(error: Any) -> tuple[str, str]:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = Tuning if error["loc"][0] == "tuning" else Ablation
        hint = did_you_mean(nearest_names(str(error["loc"][-1]), known.model_fields), "there is no such key")
        return key, f"unknown key ({hint})"
    return value_error(error)
