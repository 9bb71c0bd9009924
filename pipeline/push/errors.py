"""Errors of the hub and its client, as messages that say what to do."""

from typing import Any

from ...common.errors import UserError, one_line_message
from ...data.outages import classify
from ..public import text_without_credentials

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with the right to write"


class HubError(UserError):
    """An error of the hub. `kind` groups errors of one cause: a run warns once of each."""

    kind = "hub"


def error_of(kind: str, key: str, message: str) -> HubError:
    """An error of a kind."""
    error = HubError(key, message)
    error.kind = kind
    return error


def hub_error(error: Exception, repo: str, key: str) -> HubError:
    """The message for an error that huggingface_hub raised about a repository.

    Args:
        key: the option or setting that names the repository.
    """
    from huggingface_hub.errors import (
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalTokenNotFoundError):
        return error_of("token", key, f"there is no token of the hub; {LOG_IN}")
    if isinstance(error, OfflineModeIsEnabled):
        return error_of("offline", key, "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    failure, said = classify(error), _server_message(error)
    if isinstance(error, RepositoryNotFoundError):
        return error_of("missing", key, f"{repo} is not there, or this token may not read it; {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return error_of("missing", key, f"{repo} has no such branch; name one, or leave it out{said}")
    if failure.status == 401:
        return error_of("token", key, f"the hub does not accept this token{said}; {LOG_IN}")
    if failure.status == 403:
        return error_of("forbidden", key, f"this token may not write to {repo}{said}; {LOG_IN}")
    if failure.status in (409, 412):
        message = f"{repo} was changed by someone else during the push{said}; nothing was changed, push again"
        return error_of("changed", key, message)
    if failure.may_pass:
        message = f"{failure.reason}{said}; {repo} is as it was, and the same command goes on"
        return error_of("outage", key, f"the hub cannot be reached: {message}")
    if failure.status is not None:
        return error_of(
            f"status {failure.status}", key, f"the hub refuses {repo}{said or f' ({failure.reason})'}"
        )
    message = text_without_credentials(one_line_message(error))
    return error_of(type(error).__name__, key, f"{repo}: {message}")


def _server_message(error: Any) -> str:
    """What the hub says of the error, in parentheses; empty if it says nothing."""
    response = getattr(error, "response", None)
    said = getattr(error, "server_message", None)
    if not said and response is not None:
        said = response.headers.get("X-Error-Message")
    said = " ".join((said or "").split())[:200]
    return f" ({text_without_credentials(said)})" if said else ""
