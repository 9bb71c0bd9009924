"""What SWEEP.yaml and ABLATION.yaml have in common: settings of all runs, and how the file is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import Field, ValidationError, field_validator

from ...common.errors import UserError
from ...common.files import user_path
from ...common.names import did_you_mean, nearest_names
from ...pipeline.recipe import setting_value
from ...pipeline.section import Section, expand_home

Settings = dict[str, Any]


class RunsFile(Section):
    """A file that names runs."""

    FOLDER: ClassVar[str]
    """In launch/, with the files that come with minrnn."""
    CONTENT: ClassVar[str]
    """What a file must hold, in words."""
    SECTIONS: ClassVar[Mapping[str, type[Section]]]
    """The sections in it, by key."""

    out: str = Field(min_length=1)
    """The folder of the runs."""
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
    _expand = field_validator("out", "launcher")(expand_home)

    def errors(self) -> dict[str, str]:
        if len(set(self.seeds)) < len(self.seeds):
            return {"seeds": f"names a seed twice: {self.seeds}"}
        return {}

    @classmethod
    def shipped(cls) -> dict[str, Path]:
        """The files of this kind that come with the package, by name."""
        folder = Path(__file__).resolve().parent.parent / cls.FOLDER
        return {path.stem: path for path in sorted(folder.glob("*.yaml"))}

    @classmethod
    def read(cls, name: str, settings: Mapping[str, str] | None = None) -> Self:
        """The content of a file, or of a name of `shipped`.

        Args:
            settings: of the command line, as text, in place of those in the file's `settings`.

        Raises:
            UserError: all errors of the file and of the settings' keys.
        """
        path = cls.shipped().get(name, user_path(name))
        try:
            values = yaml.safe_load(path.read_text())
        except OSError as error:
            message = f"cannot be read: {error.strerror}; {cls.FOLDER} that come with minrnn"
            raise UserError(name, f"{message}: {', '.join(cls.shipped())}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(name, f"is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UserError(name, f"must hold {cls.CONTENT}")
        try:
            content = cls.model_validate(values)
        except ValidationError as invalid:
            raise UserError.from_list(_error(cls, error) for error in invalid.errors()) from None
        content.settings |= {key: setting_value(key, text) for key, text in (settings or {}).items()}
        if errors := content.errors():
            raise UserError.from_list(errors.items())
        return content


def _error(kind: type[RunsFile], error: Any) -> tuple[str, str]:
    """Key and message of an error of pydantic."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        parts = (kind.SECTIONS[part] for part in reversed(error["loc"][:-1]) if part in kind.SECTIONS)
        known = next(parts, kind).model_fields
        hint = did_you_mean(nearest_names(str(error["loc"][-1]), known), "there is no such key")
        return key, f"unknown key ({hint})"
    if error["type"] == "missing":
        return key, "is missing"
    if error["type"] == "too_short" and not error["input"]:
        return key, "is empty"
    return key, f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
