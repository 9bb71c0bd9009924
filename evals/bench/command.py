"""`minrnn bench KIND`: parses arguments, runs the module of a benchmark, and writes its record.

A kind is a module of this package with DESCRIPTION, EXAMPLES, PEERS, add_arguments, resolve, run and draw.
`Settings` collects errors in the arguments, so that all are reported at once.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from ...common.checks import minimum_errors
from ...common.errors import UserError
from ...common.files import user_path
from ...common.names import did_you_mean, nearest_names
from ...pipeline.options import add_device, new_parser

KINDS = {
    "scan": "the recurrence alone, and whole layers",
    "train": "a training step: ours and seven peers, at equal numbers of parameters",
    "chunks": "gradients through 1 to 1,024 chunks of a text: rate and memory",
    "generate": "reading a context and decoding after it, from 1,024 to 1,048,576 tokens",
    "data": "the data path, compared with the consumption of a training step",
}
USAGE = """usage: minrnn bench KIND [options]

Measure ours and the peers in one run, in rotation, relative to the machine's own copy, torch.add and matrix
product. Prints tables; writes evals/results/bench-KIND-DEVICE.json and .png.
Install the peers with: make setup-bench, or pip install 'minrnn[bench]'

{kinds}

`minrnn bench KIND --help` lists its options."""


class Settings:
    """Collects errors in the arguments."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, str]] = []

    def at_least(self, key: str, value: float, least: float) -> None:
        """Check the minimum of a number."""
        self.errors += minimum_errors(key, value, least)

    def choices(
        self, key: str, text: str, usual: Sequence[str], others: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Parse names separated by commas; `all` stands for the usual ones, `none` for none."""
        allowed = (*usual, *others)
        if text in ("all", "none"):
            return tuple(usual) if text == "all" else ()
        chosen = tuple(word.strip() for word in text.split(",") if word.strip())
        for word in chosen:
            if word not in allowed:
                known = f"there are {', '.join(allowed)}, all, none"
                hint = did_you_mean(nearest_names(word, allowed), otherwise=known)
                self.errors.append((key, f"there is no {word!r} ({hint})"))
        return chosen

    def check(self) -> None:
        """Raise UserError if there are errors."""
        if self.errors:
            raise UserError.from_list(self.errors)


def parse_counts(settings: Settings, key: str, text: str) -> list[int]:
    """Parse positive integers separated by commas (also written 1e6 or 65_536), or none."""
    return [number for word in _words(text) if (number := _count(settings, key, word))]


def parse_shapes(settings: Settings, key: str, text: str) -> list[tuple[int, ...]]:
    """Parse BATCHxTIMExWIDTH separated by commas, or none."""
    shapes = []
    for word in _words(text):
        sizes = word.lower().split("x")
        if len(sizes) != 3:
            settings.errors.append((key, f"{word!r} is not BATCHxTIMExWIDTH, such as 8x1024x512"))
            continue
        shapes.append(tuple(_count(settings, key, size) for size in sizes))
    return shapes


def _words(text: str) -> list[str]:
    return [] if text == "none" else [word.strip() for word in text.split(",") if word.strip()]


def _count(settings: Settings, key: str, word: str) -> int:
    """Parse a positive integer; 0 if it is invalid, which is recorded as an error."""
    try:
        number = float(word)
    except ValueError:
        number = 0.5
    if number < 1 or number != int(number):
        settings.errors.append((key, f"{word!r} is not a whole number of at least 1"))
        return 0
    return int(number)


def _parser(kind: str) -> argparse.ArgumentParser:
    module = importlib.import_module(f".{kind}", __package__)
    epilog = f"examples:\n{module.EXAMPLES.rstrip()}\n\npeers: {', '.join(module.PEERS)}"
    if others := getattr(module, "OTHER_PEERS", ()):
        epilog += f"; by name only: {', '.join(others)}"
    parser = new_parser(f"minrnn bench {kind}", module.DESCRIPTION, epilog)
    module.add_arguments(parser)
    parser.add_argument(
        "--peers",
        default="all",
        help="peers to measure beside ours, separated by commas; all or none (default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument(
        "--threads", type=int, help="threads of torch on the CPU (default: torch's own choice)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--min-seconds",
        type=float,
        default=0.2,
        help="work is repeated until a turn takes this long (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=120,
        help="seconds after which a contender gets no further turn, and that each turn may take (default: "
        "%(default)s); models that loop over time in Python need more",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and inputs (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=user_path, help=f"JSON file to write (default: evals/results/bench-{kind}-DEVICE.json)"
    )
    return parser


def parse(kind: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check the arguments of a benchmark.

    Raises:
        UserError: all errors in them.
    """
    import torch

    from ...pipeline.machine import resolve_device

    module = importlib.import_module(f".{kind}", __package__)
    arguments = _parser(kind).parse_args(argv)
    settings = Settings()
    arguments.peers = settings.choices(
        "--peers", arguments.peers, module.PEERS, getattr(module, "OTHER_PEERS", ())
    )
    for name, least in (("rounds", 1), ("min_seconds", 0), ("limit", 0)):
        settings.at_least(f"--{name.replace('_', '-')}", getattr(arguments, name), least)
    if arguments.threads is None:
        arguments.threads = torch.get_num_threads()
    settings.at_least("--threads", arguments.threads, 1)
    try:
        arguments.device = str(resolve_device(arguments.device))
    except UserError as error:
        settings.errors += error.errors
    if arguments.out is not None and arguments.out.suffix != ".json":
        settings.errors.append(
            ("--out", f"{arguments.out} must end in .json; the plot goes beside it as .png")
        )
    module.resolve(arguments, settings)
    settings.check()
    arguments.out = arguments.out or Path(
        "evals", "results", f"bench-{kind}-{arguments.device.partition(':')[0]}.json"
    )
    return arguments


def run_bench(kind: str, argv: Sequence[str]) -> None:
    """Run a benchmark: prints tables and writes the record.

    Raises:
        UserError: errors in the arguments.
    """
    import torch

    from ...pipeline.machine import keep_freed_memory
    from .measure import resolve_dtype
    from .record import Record

    arguments = parse(kind, argv)
    module = importlib.import_module(f".{kind}", __package__)
    # as training does: page faults of newly allocated tensors would take longer than the arithmetic
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    if "dtype" in arguments:
        resolve_dtype(arguments)
    record = Record(kind, argv, vars(arguments), torch.device(arguments.device), arguments.out)
    module.run(arguments, record)
    record.finish(module.draw)


def main(argv: Sequence[str]) -> None:
    """Run `minrnn bench`."""
    if not argv or argv[0] in ("--help", "-h"):
        kinds = "\n".join(f"  {kind:<10} {description}" for kind, description in KINDS.items())
        print(USAGE.format(kinds=kinds))
        return
    kind, *rest = argv
    if kind not in KINDS:
        hint = did_you_mean(nearest_names(kind, KINDS), otherwise=f"there are {', '.join(KINDS)}")
        raise UserError(f"bench {kind}", f"unknown bench ({hint})")
    run_bench(kind, rest)
