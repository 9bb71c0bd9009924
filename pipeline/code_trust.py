"""Code that a model brings along is run only if a person says so, by an option or at the terminal."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.errors import UserError


def brings_code(values: dict[str, Any], own_types: Iterable[str]) -> bool:
    """Whether a config.json is that of a language model which only its own code can run.

    Models of this package and of transformers may bring code along, too, but run that which is installed.

    Args:
        own_types: model types of this package.
    """
    from transformers import CONFIG_MAPPING

    is_known = str(values.get("model_type")) in (*own_types, *CONFIG_MAPPING)
    return not is_known and "AutoModelForCausalLM" in (values.get("auto_map") or {})


def require_code_trust(name: str, what: str, classes: Iterable[object], is_trusted: bool) -> None:
    """Return if the code of a model may be run.

    Args:
        name: of the model: a folder or a hub id.
        what: model or tokenizer.
        classes: those that its code defines, as in an auto_map, for the message.
        is_trusted: whether --trust-remote-code was given. Otherwise a person at the terminal is asked.

    Raises:
        UserError: the code is not trusted.
    """
    if is_trusted:
        return
    paths = [path for path in classes if isinstance(path, str)]  # tokenizers in an auto_map are lists
    files = sorted({f"{path.rpartition('--')[2].partition('.')[0]}.py" for path in paths})
    where = name if Path(name).exists() else f"https://huggingface.co/{name}/tree/main"
    message = f"the {what} of {name} brings code of its own{' (' + ', '.join(files) + ')' if files else ''}"
    if sys.stdin.isatty() and sys.stderr.isatty():
        print(f"{message}; read it in {where}", file=sys.stderr)
        print("It can do anything that you can. Run it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise UserError(
        "MODEL", f"{message}, which is not run; read it in {where}, and add --trust-remote-code to run it"
    )
