"""What a run may say of itself to others: no credentials, no paths of this machine.

`without_credentials` is for this machine (config.yaml, messages): a URI loses user, password and query, and
keeps its place. `public_config` is for what is published (model card, MLflow, results files): a local path is
its last part, too.
"""

import re
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")
_URI_IN_TEXT = re.compile(_SCHEME.pattern + r"[^\s\"'<>]+")
_LOCAL_SCHEMES = ("sqlite", "file")
PROSE = ("prompts",)  # settings that hold text for the model: a slash in them is no path


def without_credentials(value: str) -> str:
    """A URI without user, password, query and fragment; any other text as it is.

    Passwords may hold `/`, `?` and `@` as they are, which the grammar of URIs does not allow and databases'
    clients do: where it is not clear what is password and what is not, nothing but the scheme remains. The
    query of a SQLite database holds options of this machine and stays.
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


def text_without_credentials(text: str, *uris: str) -> str:
    """A message in which every URI is without credentials; `uris` are replaced as they stand, whatever
    characters they hold."""
    for uri in filter(None, uris):
        text = text.replace(uri, without_credentials(uri))
    return _URI_IN_TEXT.sub(lambda match: without_credentials(match[0]), text)


def public_value(value: str) -> str:
    """A URI without credentials, a local path by its last part, any other text (a hub id, a relative path) as
    it is."""
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
    """A resolved recipe, or a part of it, whose every text is a `public_value`."""
    return _each_text(config, public_value)


def config_without_credentials(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe whose every URI is `without_credentials`."""
    return _each_text(config, without_credentials)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: item if key in PROSE else _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
