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
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from ...pipeline.section import Section
from ..sweep.runs_file import RunsFile, Settings
from ..sweep.spec import LONGEST_NAME, RESERVED, Sweep, VariantName

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


class Ablation(RunsFile):
    """An ablation."""

    FOLDER = "ablations"
    CONTENT = "out, tuning and variants"
    SECTIONS = MappingProxyType({"tuning": Tuning})

    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    """Every variant is trained with each."""
    tuning: Tuning
    variants: dict[VariantName, Settings] = Field(min_length=1)
    """Settings by name; the first is the one that the others are compared with."""

    @property
    def reference(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        rates = self.tuning.learning_rates
        if len({f"{rate:g}" for rate in rates}) < len(rates):
            errors["tuning.learning_rates"] = f"names a rate twice: {rates}"
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
        shared = self.model_dump(include=set(RunsFile.model_fields))
        own = {"out": str(Path(self.out) / folder), "settings": settings, "seeds": seeds}
        return Sweep(**{**shared, **own}, variants=variants)
