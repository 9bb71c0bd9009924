"""How far a run is in its text: tokens and epochs of each source, for metrics.jsonl and the last lines."""

from typing import Any

from .checkpoint import ReaderState
from .config import Recipe
from .processes import all_reduce_sum
from .run import Run
from .source_settings import source_names


def text_progress(run: Run) -> dict[str, Any]:
    """`epochs` of a continuous text, or `tokens` and `epochs` of each source of a mixture; empty for others.

    The epochs of a source are its complete passes, as a mean over the readers. All processes must call this.
    """
    recipe, readers = run.recipe, run.data.readers.values()
    counts = [sum(column) for column in zip(*(_counts(recipe, reader) for reader in readers), strict=True)]
    if not counts:
        return {}
    sums = all_reduce_sum(run.accelerator, [count / run.layout.context for count in counts])
    if recipe.data.order == "continuous":
        return {"epochs": round(sums[0], 4)}
    num_readers, names = recipe.batch.readers, source_names(recipe.data.corpus)
    return {
        "sources": {
            name: {"tokens": round(tokens), "epochs": round(epochs / num_readers, 2)}
            for name, tokens, epochs in zip(names, sums[::2], sums[1::2], strict=True)
        }
    }


def _counts(recipe: Recipe, reader: ReaderState) -> list[float]:
    """What is summed over all readers."""
    position = reader.position
    if recipe.data.order == "continuous":
        return [0.0 if position is None else position["epochs"]]
    if isinstance(recipe.data.corpus, str):
        return []
    if position is None:
        return [0.0] * (2 * len(recipe.data.corpus))
    pairs = zip(position["tokens"], position["sources"], strict=True)
    return [count for tokens, source in pairs for count in (tokens, source["window"]["epoch"])]


def progress_note(progress: dict[str, Any]) -> str | None:
    """The last line about the text that was read, from `text_progress`."""
    if "epochs" in progress:
        return f"read {progress['epochs']:.2f} epochs of the text"
    if "sources" not in progress:
        return None
    total = max(sum(source["tokens"] for source in progress["sources"].values()), 1)
    parts = [
        f"{name} {source['tokens'] / total:.1%} of the tokens ({source['epochs']:g} epochs)"
        for name, source in progress["sources"].items()
    ]
    return "read " + ", ".join(parts)
