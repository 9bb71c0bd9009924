"""What ends a training that is not the user's mistake."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number any more."""
