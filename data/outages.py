"""Outages of remote files: which errors may pass, how long to wait, and what to say.

    error -> Failure (a reason in a few words; whether it may pass; the wait that the server asks for)
      -> Attempts: wait and try again, or raise a RemoteError

Waits double from `data.retry_wait` to at most MAX_WAIT seconds, and each is shortened by a random part, so
that many readers do not return at the same time.
"""

import email.utils
import errno
import random
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import StorageError, one_line_message
from ..common.output import warn

MAX_WAIT = 60.0  # seconds between two tries
MAX_RETRY_AFTER = 900.0  # seconds: a longer wait that a server asks for is not waited for
ANNOUNCE_EVERY = 60.0  # seconds between two announcements of outages of one server
# errors that do not pass, and the HTTP status of the same meaning
STATUS_OF_ERROR: dict[type[BaseException], int | None] = {
    FileNotFoundError: 404,
    PermissionError: 403,
    IsADirectoryError: None,
    NotADirectoryError: None,
    ssl.SSLCertVerificationError: None,
}


class RemoteError(StorageError):
    """A remote file cannot be read. The message says why and what to do.

    It has an errno, so it does not count as damaged content (`files.is_damage_error`).
    """

    def __init__(self, message: str, number: int = errno.EIO):
        super().__init__(number, message)


@dataclass(frozen=True)
class RetryPolicy:
    """How long an outage is waited for. The fields are described in the `data` section of a recipe."""

    retries: int = 10
    timeout: float = 60.0
    first_wait: float = 1.0

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row, before the random part is taken off."""
        return min(self.first_wait * 2.0 ** min(failures - 1, 60), MAX_WAIT)

    @property
    def total_wait(self) -> float:
        """Seconds of all waits together, at most."""
        return sum(self.wait(failures) for failures in range(1, self.retries + 1))


DEFAULT_POLICY = RetryPolicy()


@dataclass(frozen=True)
class Failure:
    """What an error of a read means."""

    reason: str
    may_pass: bool
    status: int | None = None
    """HTTP status of the answer, if there was one."""
    retry_after: float | None = None
    """Seconds that the server asks to wait."""


def _causes(error: BaseException) -> Iterator[Any]:
    """The error and those behind it, each once. Libraries wrap errors in three ways."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        cause = waiting.pop(0)
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += [cause.__cause__, getattr(cause, "reason", None), *cause.args]
        if not cause.__suppress_context__:
            waiting.append(cause.__context__)


def _status_and_headers(error: Any) -> tuple[int | None, Any]:
    """The HTTP status that an error of requests, httpx, aiohttp, botocore or gcsfs carries, and headers."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        metadata = response.get("ResponseMetadata", {})
        return metadata.get("HTTPStatusCode"), metadata.get("HTTPHeaders", {})
    holder = error if response is None else response
    for name in ("status_code", "status", "code"):
        if isinstance(status := getattr(holder, name, None), int) and 400 <= status < 600:
            return status, getattr(holder, "headers", None) or {}
    return None, {}


def _seconds_of(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header, which holds a number or a date."""
    if retry_after is None:
        return None
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def classify(error: BaseException) -> Failure:
    """What an error of a remote read means, whichever library raised it."""
    causes = list(_causes(error))
    for cause in causes:
        status, headers = _status_and_headers(cause)
        if status is not None:
            may_pass = status in (408, 425, 429) or (status >= 500 and status != 501)
            reason = f"the server answers with status {status}"
            return Failure(reason, may_pass, status, _seconds_of(headers.get("Retry-After")))
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            # EAI_NONAME is a wrong name, EAI_AGAIN a name server that cannot be reached
            return Failure(f"its host is not found ({cause.strerror})", cause.errno != socket.EAI_NONAME)
        for kind, status in STATUS_OF_ERROR.items():
            if isinstance(cause, kind):
                return Failure(one_line_message(cause), may_pass=False, status=status)
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in causes):
        return Failure("the server does not answer in time", may_pass=True)
    if any(isinstance(cause, OSError) or _is_network_error(cause) for cause in causes):
        return Failure(f"the connection fails ({_shortest(causes)})", may_pass=True)
    return Failure(one_line_message(error), may_pass=False)


def _is_network_error(error: BaseException) -> bool:
    """Whether the error is of a library for networks. Most of their errors are no OSErrors."""
    modules = ("requests", "urllib3", "http.client", "aiohttp", "httpx", "httpcore")
    return type(error).__module__.startswith(modules) and "InvalidURL" not in type(error).__name__


def _shortest(causes: list[BaseException]) -> str:
    """The message of the innermost error that has one; outer ones repeat it with addresses of objects."""
    texts = [getattr(cause, "strerror", None) or str(cause) for cause in causes]
    texts = [" ".join(text.split()) for text in texts if text]
    return min(texts, key=len)[:200] if texts else type(causes[0]).__name__


@dataclass
class Announcements:
    """Announces outages of one server: one line at the beginning of each, and not more than one a minute."""

    _last: float = field(default=-ANNOUNCE_EVERY, init=False)

    def outage(self, name: str, reason: str, policy: RetryPolicy) -> None:
        """Print that a file cannot be read, and how long it is waited for."""
        now = time.monotonic()
        if now - self._last >= ANNOUNCE_EVERY:
            self._last = now
            waits = f"{policy.retries} retries over up to {policy.total_wait:,.0f} seconds"
            warn(f"data.corpus: waiting for {name}: {reason}; {waits} (data.retries, data.retry_wait)")


class Attempts:
    """The tries of one read, which begin anew whenever something has been read.

    Args:
        name: of the file, for messages.
        policy: how long an outage is waited for.
        announcements: of the file's server.
    """

    def __init__(self, name: str, policy: RetryPolicy, announcements: Announcements):
        self._name, self._policy, self._announcements = name, policy, announcements
        self.succeeded()

    def succeeded(self) -> None:
        """Something was read: the outage is over."""
        self._failures, self._began = 0, 0.0

    def failed(self, error: BaseException) -> None:
        """Wait before the next try.

        Raises:
            RemoteError: the error cannot pass, or was the last one that is waited for.
        """
        if isinstance(error, RemoteError):  # says all there is to say
            raise error
        failure = classify(error)
        if not failure.may_pass:
            raise RemoteError(permanent_message(self._name, failure)) from error
        self._failures += 1
        self._began = self._began or time.monotonic()
        asked = failure.retry_after or 0.0
        if self._failures > self._policy.retries or asked > MAX_RETRY_AFTER:
            raise RemoteError(self._last_message(failure, asked)) from error
        if self._failures == 1:
            self._announcements.outage(self._name, failure.reason, self._policy)
        wait = self._policy.wait(self._failures) * random.uniform(0.5, 1.0)
        time.sleep(max(wait, asked))

    def _last_message(self, failure: Failure, asked: float) -> str:
        advice = "start the same command again when it can be reached"
        if asked > MAX_RETRY_AFTER:
            return f"{self._name}: {failure.reason} and asks to wait {asked:,.0f} seconds; {advice}"
        seconds = time.monotonic() - self._began
        tried = f"{self._policy.retries} retries over {seconds:,.0f} seconds"
        advice += ", or raise data.retries to wait longer"
        return f"{self._name} cannot be read: {failure.reason} ({tried}); {advice}"


def permanent_message(name: str, failure: Failure) -> str:
    """The message for an error that no retry fixes."""
    if failure.status in (401, 403, 407):
        return f"{name} needs credentials ({failure.reason}); {credentials_advice(name)}"
    if failure.status in (404, 410):
        return f"there is no file {name} ({failure.reason})"
    return f"{name} cannot be read ({failure.reason})"


def credentials_advice(url: str) -> str:
    """How credentials are given for the protocol of a URL."""
    advice = {
        "http": "add a line to ~/.netrc: machine HOST login NAME password PASSWORD",
        "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket set "
        "FSSPEC_S3_ANON=true",
        "gs": "run gcloud auth application-default login; for a public bucket set FSSPEC_GS_TOKEN=anon",
        "hf": "accept the dataset's conditions on its page, and run hf auth login or set HF_TOKEN",
        "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    }
    protocol = url.partition("://")[0]
    aliases = {"https": "http", "s3a": "s3", "gcs": "gs", "abfs": "az"}
    other = f"see the documentation of fsspec for {protocol}://"
    return advice.get(aliases.get(protocol, protocol), other)
