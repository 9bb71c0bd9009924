"""The base of every section of a recipe (config.py)."""

import ast
import inspect
import os
import textwrap
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A section of a recipe. Unknown keys are errors; docstrings of fields are their descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_nul(cls, value: Any) -> Any:
        """Refuse NUL characters, on which the system's functions for files and servers raise."""
        if isinstance(value, str) and "\0" in value:
            raise PydanticCustomError("nul_character", "input should have no NUL character")
        return value

    def errors(self) -> dict[str, str]:
        """Errors of values that have the right types, by field."""
        return {}


def expand_home(path: str | None) -> str | None:
    """The path with `~` replaced by the home folder, for opening, comparing and config.yaml.

    Corpora and MLflow's database are expanded only where they are opened, because config.yaml has always held
    them as the user wrote them.
    """
    return None if path is None else os.path.expanduser(path)


def docstring_of(cls: type) -> str:
    """A class's docstring without indentation, as Python 3.13 stores it and older versions do not.

    It is read from the source, as pydantic reads those of fields, because PYTHONOPTIMIZE=2 removes
    docstrings.
    """
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    return ast.get_docstring(definition) or ""
