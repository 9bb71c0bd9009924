"""Checks of command-line options, as (key, message) pairs for `UserError.from_list`."""

import argparse
import math

Error = tuple[str, str]


def minimum_errors(key: str, value: float | None, minimum: float) -> list[Error]:
    """The error of a value below its minimum, infinite or NaN; empty if there is none, or no value."""
    if value is None or minimum <= value < math.inf:
        return []
    kind = "" if math.isfinite(value) else "a number of "
    return [(key, f"must be {kind}at least {minimum}, not {value}")]


def option_minimum_errors(arguments: argparse.Namespace, **minimums: float) -> list[Error]:
    """The errors of options below their minimum: `option_minimum_errors(arguments, max_new_tokens=1)`."""
    return [
        error
        for name, minimum in minimums.items()
        for error in minimum_errors(f"--{name.replace('_', '-')}", getattr(arguments, name), minimum)
    ]
