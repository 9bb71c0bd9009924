"""The errors that end a command with a message instead of a traceback."""


class UserError(ValueError):
    """Something the user wrote or pointed at is wrong. Printed as `error: KEY: what is wrong`, a line for each problem, without a traceback.

    Args:
        errors: (key, message) pairs; the key is the setting to change ("data.corpus"), the message says what is wrong and what to do.
    """

    def __init__(self, *errors: tuple[str, str]):
        self.errors = list(errors)
        super().__init__(self.errors)

    def __reduce__(self):  # crosses process borders
        return type(self), tuple(self.errors)

    def __str__(self) -> str:
        return "\n".join(f"error: {key}: {message}" for key, message in self.errors)


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number any more."""


class StorageError(OSError):
    """A disk that does not take or give what it should. Another try later may succeed, and what is stored may be in order."""

    def __str__(self) -> str:
        return str(self.args[-1])
