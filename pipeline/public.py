"""Recipes without credentials, and without paths of this machine.

`without_credentials` is for this machine (config.yaml, messages): it removes user, password and query from a
URI. `public_config` is for publication (model card, MLflow, results files): it also reduces local paths to
their last part.
"""

import re
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")
_URI_IN_TEXT = re.compile(_SCHEME.pattern + r"[^\s\"'<>]+")
_LOCAL_SCHEMES = ("sqlite", "file")
PROSE = ("prompts",)  # settings that hold text, in which a slash does not mean a path


def without_credentials(value: str) -> str:
    """A URI without user, password, query and fragment; any other text unchanged.

    Passwords may contain `/`, `?` and `@` unescaped: the grammar of URIs forbids it, but database clients
    allow it. If it is ambiguous where the password ends, only the scheme remains. A SQLite URI has no
    credentials and stays whole.
    """
    match = _SCHEME.match(value)
    if match is None:
        return value
    scheme, rest = match[0], value[match.end() :]
    if scheme == "sqlite://":
        return value
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if ":" in authority and "@" in rest:
        before, _, rest = rest.rpartition("@")
        if "?" in before or "#" in before:
            return f"{scheme}..."
    elif "@" in authority:
        rest = rest[authority.rindex("@") + 1 :]
    return scheme + re.split(r"[?#]", rest, maxsplit=1)[0]


def secret_parts(uri: str) -> set[str]:
    """The words of a URI that `without_credentials` removes, as written and decoded; none shorter than three
    characters."""
    public, divider = without_credentials(uri), r"[/:@?#&=]"
    words = {word for word in re.split(divider, uri) if len(word) > 2 and word not in public}
    return words | {unquote(word) for word in words}


def text_without_credentials(text: str, *uris: str) -> str:
    """A message whose URIs have no credentials. `uris` are replaced literally."""
    for uri in filter(None, uris):
        text = text.replace(uri, without_credentials(uri))
    return _URI_IN_TEXT.sub(lambda match: without_credentials(match[0]), text)


def public_value(value: str) -> str:
    """A URI without credentials, the last part of a local path, or any other text (a hub id, a relative path)
    unchanged."""
    if match := _SCHEME.match(value):
        uri = without_credentials(value)
        local = match[0].removesuffix("://").split("+")[0] in _LOCAL_SCHEMES
        return f"{match[0]}/{_last_part(uri[match.end() :].partition('?')[0])}" if local else uri
    is_local = (
        Path(value).is_absolute()
        or PureWindowsPath(value).drive
        or value.startswith(("./", "../", "~", "file:"))
    )
    return _last_part(value) if is_local else value


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe, or a part of it, with every text as a `public_value`."""
    return _each_text(config, public_value)


def config_without_credentials(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe with every URI as `without_credentials`."""
    return _each_text(config, without_credentials)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: item if key in PROSE else _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
