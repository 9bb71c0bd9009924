"""ListOps: nested operations on lists of digits; the label is the value of the whole expression.

    [MAX 2 9 [MIN 4 7 ] 0 ]   has the value 9

As in Long Range Arena (Tay et al., arXiv 2011.04006; listops.py of google-research/long-range-arena): an
expression is a digit with probability 0.75, else an operation with 2 to max_args arguments, each of them an
expression again; at depth max_depth every expression is a digit. Kept are expressions with more than
min_length and fewer than max_length tokens. MED is the median, rounded down; SM is the sum mod 10. Tokens are
those of S4's pipeline: parentheses are dropped, and the closing bracket is kept.
"""

import random
from collections.abc import Sequence

from ...common.errors import UserError

DIGITS = 10
OPERATORS = ("MIN", "MAX", "MED", "SM")
END = DIGITS + len(OPERATORS)  # the id of the closing bracket
SYMBOLS = (*map(str, range(DIGITS)), *(f"[{name}" for name in OPERATORS), "]")
OPERATION_PROBABILITY = 0.25
MAX_TRIALS = 100_000  # expressions that are drawn for one that is kept; the published sizes need 20


def apply_operator(operator: int, values: Sequence[int]) -> int:
    """The value of an operation. `operator` is an index of OPERATORS."""
    if operator == 0:
        return min(values)
    if operator == 1:
        return max(values)
    if operator == 3:
        return sum(values) % 10
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


class ExpressionSource:
    """Draws expressions from a seeded generator.

    Args:
        seed: any number of integers.
        min_length, max_length: bounds of the number of tokens, both exclusive.
        max_depth: depth of the digits that end every branch; operations are at smaller depths.
        max_args: largest number of arguments.
    """

    def __init__(self, seed: Sequence[int], min_length: int, max_length: int, max_depth: int, max_args: int):
        self.min_length, self.max_length = min_length, max_length
        self.max_depth, self.max_args = max_depth, max_args
        self._random = random.Random("/".join(map(str, seed)))
        self._tokens = bytearray()

    def draw(self) -> tuple[bytes, int]:
        """The tokens of an expression (ids of SYMBOLS) and its value.

        The outermost expression is an operation: a single digit is too short to be kept.
        """
        for _ in range(MAX_TRIALS):
            self._tokens.clear()
            value = self._operation(1)
            if self.min_length < len(self._tokens) < self.max_length:
                return bytes(self._tokens), value
        raise UserError(
            "data.task",
            f"of {MAX_TRIALS:,} expressions none has more than {self.min_length} and fewer than "
            f"{self.max_length} tokens: change min_length, max_length, max_depth or max_args",
        )

    def _operation(self, depth: int) -> int:
        draw, tokens = self._random, self._tokens
        operator = draw.randrange(len(OPERATORS))
        tokens.append(DIGITS + operator)
        values = []
        for _ in range(draw.randint(2, self.max_args)):
            if len(tokens) >= self.max_length:  # too long to be kept, so its value does not matter
                return 0
            if depth + 1 < self.max_depth and draw.random() <= OPERATION_PROBABILITY:
                values.append(self._operation(depth + 1))
            else:
                values.append(draw.randrange(DIGITS))
                tokens.append(values[-1])
        tokens.append(END)
        return apply_operator(operator, values)


def parse(text: str) -> bytes:
    """The tokens of an expression as Long Range Arena's files write it. Parentheses are dropped.

    Raises:
        ValueError: an unknown symbol.
    """
    ids = {symbol: number for number, symbol in enumerate(SYMBOLS)}
    words = text.replace("(", " ").replace(")", " ").split()
    if unknown := next((word for word in words if word not in ids), None):
        raise ValueError(f"{unknown!r} is no symbol of ListOps")
    return bytes(ids[word] for word in words)


def evaluate(tokens: bytes) -> tuple[int, int]:
    """The value of an expression, and the depth of its innermost operation (0 for a digit).

    Raises:
        ValueError: the tokens are no expression; the message says which token is wrong.
    """
    stack: list[tuple[int, list[int]]] = []
    depth, result = 0, None
    for position, token in enumerate(tokens):
        if result is not None:
            raise ValueError(f"token {position}, {SYMBOLS[token]!r}, follows the end of the expression")
        if DIGITS <= token < END:
            stack.append((token - DIGITS, []))
            depth = max(depth, len(stack))
            continue
        value = token
        if token == END:
            if not stack or not stack[-1][1]:
                raise ValueError(f"token {position}, ']', closes {'an empty list' if stack else 'nothing'}")
            value = apply_operator(*stack.pop())
        if stack:
            stack[-1][1].append(value)
        else:
            result = value
    if result is None:
        raise ValueError(f"it ends with {len(stack)} open lists" if stack else "it is empty")
    return result, depth
