"""The errors that end a command with a message instead of a traceback."""

from collections.abc import Iterable, Mapping
from typing import Self


class UserError(ValueError):
    """A wrong setting, argument or file of the user. Printed as `error: KEY: MESSAGE`, without a traceback.

    Args:
        key: the setting to change ("data.corpus").
        message: what is wrong with it, and what to do.
    """

    def __init__(self, key: str, message: str):
        super().__init__(key, message)
        self.errors = [(key, message)]

    @classmethod
    def from_list(cls, errors: Iterable[tuple[str, str]]) -> Self:
        """One exception for one or more (key, message) pairs, printed one per line."""
        first, *others = errors
        error = cls(*first)
        error.errors += others
        return error

    def with_keys(self, names: Mapping[str, str]) -> Self:
        """The same errors, with other names of some keys: of options in place of settings."""
        return self.from_list((names.get(key, key), message) for key, message in self.errors)

    def __reduce__(self):  # sent from data workers and between ranks
        return type(self).from_list, (self.errors,)

    def __str__(self) -> str:
        return "\n".join(f"error: {key}: {message}" for key, message in self.errors)


def missing_package_error(key: str, package: str, extra: str) -> UserError:
    """The error for a package of an extra (`eval`, `bench`, ...) that is not installed."""
    return UserError(key, f"{package} is not installed: make setup-{extra}, or pip install 'minrnn[{extra}]'")


def one_line_message(error: BaseException) -> str:
    """The message of an error on one line, with the error's type unless it is an OSError."""
    text = " ".join(str(error).split())[:300]
    return (
        text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
    )


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite."""


class StorageError(OSError):
    """Reading or writing failed. A later retry may succeed, and the stored data may be intact."""

    def __str__(self) -> str:
        return str(self.args[-1])
