"""What ends a training that is not the user's mistake."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number any more."""


class StorageError(OSError):
    """A disk that does not take or give what it should. Another try later may succeed, and what is stored may be in order."""

    def __str__(self) -> str:
        return str(self.args[-1])
