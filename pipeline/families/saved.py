"""The configuration of a family's model in a checkpoint, with the defaults of the transformers that made it.

config.yaml holds the fields that a recipe sets; all others have the defaults of transformers, which another
version may change. So a checkpoint holds the whole configuration: an export is built from it, and a run does
not resume with another.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from ...common.errors import UserError
from ...common.files import read_with_retries
from ..checkpoint import MODEL_CONFIG
from .registry import FAMILIES, OURS, config_fields


def saved_config(family: str, config: PreTrainedConfig) -> str | None:
    """Content of model.json; None for minrnn, whose config.yaml has all fields."""
    return None if family == OURS else json.dumps(config.to_dict())


def saved_defaults(family: str, checkpoint: Path) -> dict[str, Any]:
    """The fields that a recipe may set, with their values in a checkpoint; empty if it does not hold them."""
    path = checkpoint / MODEL_CONFIG
    if family == OURS or not path.exists():
        return {}
    training = FAMILIES[family].training_fields() if family in FAMILIES else {}
    names = config_fields(family) - training.keys()
    values = json.loads(read_with_retries(path, Path.read_text))
    return {name: value for name, value in values.items() if name in names}


def check_defaults(family: str, checkpoint: Path, config: PreTrainedConfig) -> None:
    """Check that a run resumes with the configuration that it was started with.

    Raises:
        UserError: each field that this version of transformers gives another value.
    """
    saved = saved_defaults(family, checkpoint)
    new = json.loads(json.dumps(config.to_dict()))
    errors = [
        f"{name} is {new[name]!r} in transformers {transformers.__version__}, but was {saved[name]!r} when "
        "the run was started; use the version that its manifest.json names"
        for name in sorted(saved.keys() & new.keys())
        if saved[name] != new[name]
    ]
    if errors:
        raise UserError.from_list([("model.family", error) for error in errors])
