"""`minrnn bench KIND`: arguments in, a bench's module run, its record written.

A kind is a module of this package with DESCRIPTION, EXAMPLES, PEERS, add_arguments, resolve, run and draw. What the user got wrong is collected
in `Settings` and told at once, a line each.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from ...common.checks import minimum_errors
from ...common.errors import UserError
from ...common.files import user_path
from ...common.names import did_you_mean, nearest_names
from ...pipeline.options import add_device

KINDS = {
    "scan": "the recurrence alone, and whole layers",
    "train": "a training step: ours, Llama, Mamba, Mamba-2, xLSTM, minGRU-pytorch, GRU, LSTM, at equal parameters",
    "generate": "reading a context and decoding after it, from 1,024 to 1,048,576 tokens",
    "data": "the data path, against what a training step consumes",
}
USAGE = """usage: minrnn bench KIND [options]

Measure ours and the peers in one run, in rotation, against the machine's own copy, torch.add and matrix product. Prints tables;
writes evals/results/bench-KIND-DEVICE.json and .png. Peers come with: make setup-bench, or pip install 'minrnn[bench]'

{kinds}

`minrnn bench KIND --help` says more."""


class Settings:
    """Collects what is wrong with the arguments."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, str]] = []

    def at_least(self, key: str, value: float, least: float) -> None:
        """`value` is a number of things, or of seconds."""
        self.errors += minimum_errors(key, value, least)

    def choices(self, key: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
        """Names separated by commas; `all` and `none` for all and none of those allowed."""
        if text in ("all", "none"):
            return tuple(allowed) if text == "all" else ()
        chosen = tuple(word.strip() for word in text.split(",") if word.strip())
        for word in chosen:
            if word not in allowed:
                known = f"there are {', '.join(allowed)}, all, none"
                hint = did_you_mean(nearest_names(word, allowed), otherwise=known)
                self.errors.append((key, f"there is no {word!r} ({hint})"))
        return chosen

    def check(self) -> None:
        """Raise all that was found."""
        if self.errors:
            raise UserError.from_list(self.errors)


def parse_counts(settings: Settings, key: str, text: str) -> list[int]:
    """Positive whole numbers separated by commas (1e6 and 65_536 are numbers too), or none."""
    return [number for word in _words(text) if (number := _count(settings, key, word))]


def parse_shapes(settings: Settings, key: str, text: str) -> list[tuple[int, ...]]:
    """BATCHxTIMExWIDTH separated by commas, or none."""
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
    """The number, or 0 after noting what is wrong with it."""
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
    parser = argparse.ArgumentParser(
        f"minrnn bench {kind}",
        description=module.DESCRIPTION,
        epilog=f"examples:\n{module.EXAMPLES.rstrip()}\n\npeers: {', '.join(module.PEERS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument(
        "--peers",
        default="all",
        help="contenders beside ours, separated by commas; all or none (default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: as many as torch takes)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--min-seconds",
        type=float,
        default=0.2,
        help="work is repeated until a turn lasts so long (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=120,
        help="seconds after which a contender takes no further turn (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    parser.add_argument(
        "--out", type=user_path, help=f"JSON file to write (default: evals/results/bench-{kind}-DEVICE.json)"
    )
    return parser


def parse(kind: str, argv: Sequence[str]) -> argparse.Namespace:
    """Checked arguments of one bench.

    Raises:
        UserError: everything that is wrong with them.
    """
    import torch

    from ...pipeline.machine import resolve_device

    module = importlib.import_module(f".{kind}", __package__)
    arguments = _parser(kind).parse_args(argv)
    settings = Settings()
    arguments.peers = settings.choices("--peers", arguments.peers, module.PEERS)
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
    """Run one bench: tables to standard output, the record to its file.

    Raises:
        UserError: wrong arguments.
    """
    import torch

    from ...pipeline.machine import keep_freed_memory
    from .measure import settle_dtype
    from .record import Record

    arguments = parse(kind, argv)
    module = importlib.import_module(f".{kind}", __package__)
    keep_freed_memory()  # as training does: otherwise every new tensor's pages are faulted in anew, which takes longer than the arithmetic
    torch.set_num_threads(arguments.threads)
    if "dtype" in arguments:
        settle_dtype(arguments)
    record = Record(kind, argv, vars(arguments), torch.device(arguments.device), arguments.out)
    module.run(arguments, record)
    record.finish(module.draw)


def main(argv: Sequence[str]) -> None:
    """`minrnn bench ...`"""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE.format(kinds="\n".join(f"  {kind:<10} {what}" for kind, what in KINDS.items())))
        return
    kind, *rest = argv
    if kind not in KINDS:
        hint = did_you_mean(nearest_names(kind, KINDS), otherwise=f"there are {', '.join(KINDS)}")
        raise UserError(f"bench {kind}", f"unknown bench ({hint})")
    run_bench(kind, rest)
