"""Settings of a recipe that depend on the model's family: what it does not support, and its sizes."""

import dataclasses

from ..data import is_labelled
from .config import Recipe
from .families import registry
from .families.fields import checked_config
from .families.registry import CARRYING, OURS


def family_errors(recipe: Recipe) -> dict[str, str]:
    """Settings that the model's family does not support, by key."""
    name, batch, train = recipe.model.family, recipe.batch, recipe.train
    if name == OURS:
        return {}
    errors = {}
    if name not in CARRYING and batch.carry_state and "carry_state" in batch.model_fields_set:
        errors["batch.carry_state"] = f"{name} has no state to carry from chunk to chunk; use false"
    if recipe.parallel.context > 1:
        message = f"only minrnn can divide a sequence among processes, not {name}; use 1"
        errors["parallel.context"] = message
    if train.recompute != "none":
        errors["train.recompute"] = f"is for minrnn's blocks, not for {name}; use none"
    if train.compile:
        errors["train.compile"] = f"is for minrnn's blocks, not for {name}; use false"
    config = checked_config(name, recipe.resolved_model_fields(), recipe.model.num_parameters is not None)
    limit = registry.max_positions(config)
    if name not in CARRYING and limit is not None and batch.chunk > limit:
        errors["batch.chunk"] = (
            f"{name} has {limit} positions, and a chunk {batch.chunk} tokens; lower it, or raise "
            "model.max_position_embeddings"
        )
    return errors


def with_sizes(recipe: Recipe, vocab_size: int) -> Recipe:
    """The recipe with the sizes of model.num_parameters, if it names a number.

    Sizes that the recipe has, as config.yaml of a run does, are kept if they still make this number: another
    number, or another number of layers, may have been set since.

    Raises:
        UserError: no size has this number of parameters.
    """
    model = recipe.model
    if model.num_parameters is None:
        return recipe
    # Imported here, because these import torch.
    from .classification import classifier_fields, new_model
    from .families.build import has_size, search_sizes

    fields = {**recipe.given_model_fields(), **classifier_fields(recipe.data.corpus, recipe.data.task)}

    target = model.num_parameters
    if model.sizes and has_size(model.family, target, {**fields, **model.sizes}, vocab_size, new_model):
        return recipe
    sizes = search_sizes(model.family, target, fields, vocab_size, new_model, model.setting_of)
    return dataclasses.replace(recipe, model=model.model_copy(update={"sizes": sizes}))


def without_carried_state(recipe: Recipe) -> Recipe:
    """The recipe with batch.carry_state false, if its family or its task has no state to carry."""
    if recipe.model.family in CARRYING and not is_labelled(recipe.data.corpus):
        return recipe
    return dataclasses.replace(recipe, batch=recipe.batch.model_copy(update={"carry_state": False}))
