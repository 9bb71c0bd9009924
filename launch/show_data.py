"""`minrnn data`: `show RECIPE` is show_corpus.py; `lra/NAME` makes a task's examples and prints their
statistics beside the published definition."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UserError
from ..common.files import atomic_write, user_path
from ..data import LabelledData, LabelledTask, build_task, cache_folder, is_labelled, open_data
from ..data.lra import LRA_TASKS, GeneratedTask, ListOps, listops
from ..data.lra.examples import SPLITS, Examples
from ..data.lra.tasks import PixelTask
from ..evals.output import out_errors
from ..pipeline.options import new_parser, parse_mapping

DESCRIPTION = """`minrnn data show RECIPE` prints what a run on text will see (minrnn data show --help).
`minrnn data lra/NAME` makes or converts the examples of a task of Long Range Arena, unless the cache has
them, and prints their number, lengths and classes beside the published definition."""
EPILOG = """examples:
  minrnn data show quickstart
  minrnn data lra/listops
  minrnn data lra/image --task '{folder: cifar10}'
  minrnn data lra/pathfinder --task '{train_examples: 1000}' --picture examples.png"""
PICTURE_EXAMPLES = 8


def _lengths(examples: Examples) -> np.ndarray:
    """The number of tokens of each text, all texts of all examples."""
    return np.array([len(text) for number in range(len(examples)) for text in examples.texts(number)])


def split_lines(data: LabelledData, split: str) -> list[str]:
    """Number, lengths and classes of a split."""
    examples, task = data.examples(split), data.task
    lengths = _lengths(examples)
    median = int(np.median(lengths))
    counts = np.bincount(examples.labels[examples.index], minlength=task.num_labels)
    shares = ", ".join(
        f"{label} {count / len(examples):.1%}" for label, count in zip(task.LABELS, counts, strict=True)
    )
    return [
        f"{split:<11} {len(examples):,} examples of {lengths.min():,} to {lengths.max():,} tokens "
        f"(median {median:,})",
        f"            {shares}",
    ]


def count_drawn(tokens: np.ndarray, max_depth: int) -> np.ndarray:
    """Numbers of (operations, digits) among the arguments of a ListOps expression that may be either: those
    above max_depth."""
    is_operation = (tokens >= listops.DIGITS) & (tokens < listops.END)
    is_end = tokens == listops.END
    depths = np.cumsum(is_operation) - np.cumsum(is_end) + ~is_operation
    is_drawn = ~is_end & (depths > 1) & (depths < max_depth)
    return np.array([(is_drawn & is_operation).sum(), (is_drawn & ~is_operation).sum()])


def listops_lines(data: LabelledData) -> list[str]:
    """Depths of the training expressions (innermost operation), their operators and arguments."""
    examples, task = data.examples("train"), data.task
    assert isinstance(task, ListOps)
    depths: Counter[int] = Counter()
    tokens, drawn = np.zeros(len(listops.SYMBOLS), np.int64), np.zeros(2, np.int64)
    for number in range(len(examples)):
        text = examples.texts(number)[0]
        depths[listops.evaluate(text.tobytes())[1]] += 1
        tokens += np.bincount(text, minlength=len(tokens))
        drawn += count_drawn(text, task.max_depth)
    total = sum(depths.values())
    by_depth = ", ".join(f"{depth} {count / total:.1%}" for depth, count in sorted(depths.items()))
    operators = tokens[listops.DIGITS : listops.END]
    arguments = (tokens.sum() - tokens[listops.END] - total) / max(operators.sum(), 1)
    shares = ", ".join(
        f"{name} {count / max(operators.sum(), 1):.1%}"
        for name, count in zip(listops.OPERATORS, operators, strict=True)
    )
    return [
        f"depth       {by_depth}",
        f"operators   {shares}",
        f"arguments   {arguments:.2f} of each operation; {drawn[0] / max(drawn.sum(), 1):.1%} of those above "
        f"depth {task.max_depth} are operations",
    ]


def definition_lines(task: LabelledTask) -> list[str]:
    """What the paper and its code define."""
    lines = []
    if isinstance(task, GeneratedTask):
        train, validation, test = task.SIZES
        lines.append(f"published   {train:,} / {validation:,} / {test:,} examples")
    if isinstance(task, ListOps):
        lines.append(
            "published   more than 500 and fewer than 2,000 tokens; operations at depths 1 to 9; operators "
            "25.0% each; 2 to 10 arguments, 6.00 on average; 25.0% of those above depth 10 are operations"
        )
    return lines


def write_picture(data: LabelledData, path: Path) -> None:
    """The first training examples with their labels, four in a row, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    task = data.task
    assert isinstance(task, PixelTask)
    examples, columns = data.examples("train"), PICTURE_EXAMPLES // 2
    figure = Figure(figsize=(2 * columns, 4.4))
    FigureCanvasAgg(figure)
    for number in range(min(PICTURE_EXAMPLES, len(examples))):
        axes = figure.add_subplot(2, columns, number + 1)
        axes.imshow(examples.texts(number)[0].reshape(task.SIDE, task.SIDE), cmap="gray", vmin=0, vmax=255)
        axes.set_title(task.LABELS[examples.label(number)], fontsize=9)
        axes.axis("off")
    figure.tight_layout()
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=60, format="png")


def _task(corpus: str, options: dict[str, Any], picture: Path | None) -> LabelledTask:
    """The task that a corpus names.

    Raises:
        UserError: it has no labelled examples, options are wrong, or the picture cannot be written.
    """
    if not is_labelled(corpus):
        message = f"{corpus} has no labelled examples; those of lra/{', lra/'.join(LRA_TASKS)} have"
        raise UserError("data.corpus", message)
    task = build_task(corpus, options)
    assert isinstance(task, LabelledTask)
    if picture is not None and not isinstance(task, PixelTask):
        raise UserError("--picture", f"lra/{task.NAME} has no images")
    if errors := out_errors(picture, "--picture", ".png"):
        raise UserError.from_list(errors)
    return task


def main(argv: list[str]) -> None:
    """Make the examples and print their statistics.

    Raises:
        UserError: the task, its options or its files are wrong, or the picture cannot be written.
    """
    if argv[:1] == ["show"]:
        from .show_corpus import main as show

        if not (len(argv) > 1 and is_labelled(argv[1])):
            show(argv[1:])
            return
        argv = argv[1:]
    parser = new_parser("minrnn data", DESCRIPTION, EPILOG)
    parser.add_argument("corpus", metavar="lra/NAME", help=", ".join(LRA_TASKS))
    options = "options, as data.task"
    parser.add_argument("--task", type=parse_mapping, default={}, metavar="YAML", help=options)
    parser.add_argument("--cache", help="folder of the examples, as data.cache")
    parser.add_argument("--picture", type=user_path, metavar="PNG", help="also draw eight examples (images)")
    arguments = parser.parse_args(argv)
    try:
        task = _task(arguments.corpus, arguments.task, arguments.picture)
        data = open_data(task, cache_folder(arguments.cache))
    except UserError as error:
        keys = {"data.corpus": "lra/NAME", "data.task": "--task", "data.cache": "--cache"}
        raise error.with_keys(keys) from None
    lines = [line for split in SPLITS for line in split_lines(data, split)]
    if isinstance(task, ListOps):
        lines += listops_lines(data)
    print("\n".join([*lines, *definition_lines(task), f"files       {data.folder}"]))
    if arguments.picture is not None:
        write_picture(data, arguments.picture)
