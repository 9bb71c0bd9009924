"""The order of a corpus where the recipe leaves it open (`auto`): resolved once, and kept on resume.

It is a function of the recipe and of the text files. If there are fewer of them than lanes, not every lane
can have a document of its own. Then lanes start at positions within the text and read on: `continuous`, or
`passages` for a source of a mixture.
"""

import dataclasses
from typing import Any

from ..data import AnyCorpus, has_fewer_texts, is_task, source_specs
from .config import Recipe
from .source_settings import source_names


def with_order(recipe: Recipe, corpus: AnyCorpus) -> Recipe:
    """The recipe with the order of its corpus, or of each source of its mixture.

    Args:
        corpus: the recipe's.

    Raises:
        UserError: files of text cannot be read.
    """
    data, num_lanes = recipe.data, recipe.batch.readers * recipe.batch.lanes
    if is_task(data.corpus):
        return recipe
    specs = source_specs(corpus)
    if isinstance(data.corpus, str):
        if data.order != "auto":
            return recipe
        order = "continuous" if has_fewer_texts(specs[0], num_lanes) else "documents"
        return dataclasses.replace(recipe, data=data.model_copy(update={"order": order}))
    sources = [
        {**source, "order": "passages" if has_fewer_texts(spec, num_lanes) else "documents"}
        if source["order"] == "auto"
        else source
        for source, spec in zip(data.corpus, specs, strict=True)
    ]
    return dataclasses.replace(recipe, data=data.model_copy(update={"corpus": sources, "order": "documents"}))


def with_saved_order(recipe: Recipe, saved: dict[str, Any]) -> Recipe:
    """The recipe with the orders that a run began with, where it leaves them open.

    Args:
        saved: the resolved recipe of the checkpoint to resume from; empty for a new run.
    """
    data, before = recipe.data, saved.get("data", {})
    changed: dict[str, Any] = {}
    if data.order == "auto" and "order" in before:
        changed["order"] = before["order"]
    sources = before.get("corpus")
    # Lists of other lengths are left as they are, for `check_unchanged` to refuse.
    if isinstance(data.corpus, list) and isinstance(sources, list) and len(sources) == len(data.corpus):
        changed["corpus"] = [
            {**source, "order": saved_source["order"]} if source["order"] == "auto" else source
            for source, saved_source in zip(data.corpus, sources, strict=True)
        ]
    return dataclasses.replace(recipe, data=data.model_copy(update=changed)) if changed else recipe


def order_note(recipe: Recipe) -> str | None:
    """What to say at the start about an order without whole documents; None for the others."""
    data, num_lanes = recipe.data, recipe.batch.readers * recipe.batch.lanes
    if data.order == "continuous":
        return f"data.order is continuous: {num_lanes} lanes read on, each from its own position in the text"
    if isinstance(data.corpus, str):
        return None
    pairs = zip(source_names(data.corpus), data.corpus, strict=True)
    if names := [name for name, source in pairs if source["order"] == "passages"]:
        return f"read in passages, with the end of the text held out: {', '.join(names)}"
    return None
