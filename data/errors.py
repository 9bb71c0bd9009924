"""A user's mistake, told in one line for each."""


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
