"""The repository of a push, opened before anything is sent: the token may write to it, and what it holds may
be replaced.

A push writes `training/run.json`, which says of which run the model is. Another push replaces it if it is of
the same run, or has the same weights, or was told to.
"""

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..card import NAME as CARD
from .errors import LOG_IN, error_of, hub_error

T = TypeVar("T")
MARKER = "training/run.json"
NOT_OF_A_MODEL = {".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", CARD}
"""Files that a repository may have before its first model. All but the card stay when another model is
replaced."""
TIMEOUT = 120.0  # seconds without an answer or a byte


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    Attributes:
        repo: USER/NAME, or NAME for the user of the token.
        revision: the branch; None for main.
        private: create a private repository.
        overwrite: replace whatever model is there.
        license: of the weights, by the hub's identifier.
        in_recipe: whether these are settings of a recipe, for the names in messages.
    """

    repo: str
    revision: str | None = None
    private: bool = False
    overwrite: bool = False
    license: str | None = None
    in_recipe: bool = False

    def name(self, option: str) -> str:
        """The name of an option in messages."""
        return f"push.{option}" if self.in_recipe else f"--{option}"


@dataclass(frozen=True)
class Identity:
    """Whose model a push brings."""

    run: str | None
    """The id of its run; None for an export."""
    weights: str | None = None
    """SHA-256 of its weights, if they are known yet."""


@dataclass(frozen=True)
class Target:
    """A branch of a repository as it was when a push began."""

    repo: str
    parent: str
    """Its newest commit, to which the push's commit is added."""
    own: frozenset[str]
    """Its files that the push may remove if it does not write them."""
    keeps_card: bool
    """Its model card was written by hand and stays."""


def name_problem(repo: str) -> str | None:
    """Why the hub would refuse a repository's name, or None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        said = " ".join(str(error).split()).replace(" Use `repo_type` argument if needed.", "")
        return f"{said} Write USER/NAME"
    return None


def open_target(options: PushOptions, identity: Identity) -> Target:
    """Create the repository if it is not there, and check that this push may replace what it holds.

    Raises:
        HubError: no token, no right to write, a refused name, a server that does not answer.
        UserError: the repository holds another model, or is public although a private one is wanted.
    """
    if (problem := name_problem(options.repo)) is not None:
        raise error_of("name", options.name("repo"), problem)
    call = functools.partial(call_hub, options)
    api = hub_api()
    user = call(api.whoami)
    repo = options.repo if "/" in options.repo else f"{user['name']}/{options.repo}"
    _check_namespace(repo, user, options)
    call(api.create_repo, repo, private=True if options.private else None, exist_ok=True)
    call(api.auth_check, repo, write=True)
    if options.revision:
        call(api.create_branch, repo, branch=options.revision, exist_ok=True)
    info = call(api.model_info, repo, revision=options.revision, timeout=TIMEOUT)
    if options.private and not info.private:
        message = f"{repo} is public; make it private in its settings on the hub, or leave this out"
        raise error_of("public", options.name("private"), message)
    files = frozenset(file.rfilename for file in info.siblings or ())
    return _target(repo, options, identity, info.sha, files)


def hub_api() -> Any:
    """The hub's client. It gives up after TIMEOUT, except in methods that have a `timeout` of their own: its
    default is no limit (huggingface_hub 2.4)."""
    import huggingface_hub

    _limit_waits()
    return huggingface_hub.HfApi(library_name="minrnn")


@functools.cache
def _limit_waits() -> None:
    """Set the time-out of the client's sessions. It opens a new one after a connection that failed."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limited_client() -> Any:
        client = default_client_factory()
        client.timeout = TIMEOUT
        return client

    set_client_factory(limited_client)


def call_hub(options: PushOptions, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """The answer to a request.

    Raises:
        HubError: there is none, or it is an error.
    """
    try:
        return function(*arguments, **keywords)
    except Exception as error:  # the client's own, of the network's library, of the file system, ValueError
        raise hub_error(error, options.repo, options.name("repo")) from None


def _check_namespace(repo: str, user: dict[str, Any], options: PushOptions) -> None:
    """Refuse what the token says of itself, in plainer words than the hub's.

    Raises:
        HubError: the token may only read, or the namespace is not the user's.
    """
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        message = f"the token {token.get('displayName', '')!r} may only read; {LOG_IN}"
        raise error_of("forbidden", options.name("repo"), message)
    namespace = repo.split("/")[0]
    known = [user["name"], *(organization["name"] for organization in user.get("orgs") or ())]
    if namespace not in known:
        message = f"{namespace} is neither the user of this token nor one of its organizations"
        advice = f"name {user['name']}/{repo.split('/')[1]}"
        raise error_of("forbidden", options.name("repo"), f"{message} ({', '.join(known)}); {advice}")


def _target(
    repo: str, options: PushOptions, identity: Identity, sha: str | None, files: frozenset[str]
) -> Target:
    assert sha is not None
    marker = _read_json(repo, options, sha) if MARKER in files else None
    written = (marker or {}).get("files") or {}
    is_same = marker is not None and (
        (identity.run is not None and marker.get("run") == identity.run)
        or (identity.weights is not None and marker.get("weights") == identity.weights)
    )
    others = files - NOT_OF_A_MODEL
    if others and not is_same and not options.overwrite:
        holds = f"a model of the run {str(marker.get('name'))!r}" if marker else "other files"
        shown = ", ".join(sorted(others)[:3]) + (", ..." if len(others) > 3 else "")
        message = f"{repo} holds {holds} ({shown}); name another repository, or replace what is there with "
        advice = "push.overwrite: true" if options.in_recipe else "--overwrite"
        raise error_of("other", options.name("repo"), message + advice)
    own = files & written.keys() if is_same else others
    keeps_card = CARD in files and not options.overwrite and _is_edited(repo, options, sha, written.get(CARD))
    return Target(repo, sha, frozenset(own) - {CARD}, keeps_card)


def _download(repo: str, options: PushOptions, sha: str, path: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = call_hub(options, hub_api().hf_hub_download, repo, path, revision=sha, local_dir=folder)
        return Path(file).read_bytes()


def _read_json(repo: str, options: PushOptions, sha: str) -> dict[str, Any] | None:
    """training/run.json; None if it is not as a push writes it."""
    try:
        content = json.loads(_download(repo, options, sha, MARKER))
    except ValueError:
        return None
    is_valid = isinstance(content, dict) and isinstance(content.get("files"), dict)
    return content if is_valid else None


def _is_edited(repo: str, options: PushOptions, sha: str, written: str | None) -> bool:
    """Whether the card is not the one that the last push wrote, by its SHA-256."""
    return hashlib.sha256(_download(repo, options, sha, CARD)).hexdigest() != written
