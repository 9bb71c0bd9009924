"""Settings of a recipe that do not fit its task, or need one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..data import LabelledTask, is_labelled, prepared_corpora, prepared_tokenizer
from ..models import MinRNNConfig
from .config import Recipe, TrainSection
from .families.registry import OURS

SAMPLES = {"prompts": [], "sample_tokens": 0}
"""Settings of `train` for samples of text, with the value that asks for none."""


def with_family_error(errors: dict[str, str], sections: Mapping[str, Any]) -> dict[str, str]:
    """The errors of sections. If a classifier is asked of another family, this is the model's only error: its
    fields are not to be corrected one by one."""
    model, data = sections.get("model"), sections.get("data")
    if model is None or data is None or model.family == OURS or not is_labelled(data.corpus):
        return errors
    message = f"{data.corpus} is for minrnn's classifier, not for {model.family}; leave it out"
    others = {key: error for key, error in errors.items() if not key.startswith("model.")}
    return {"model.family": message, **others}


def with_whole_examples(recipe: Recipe) -> Recipe:
    """The recipe with a batch.chunk that holds every example of its labelled task, unless it sets one."""
    task = recipe.task()
    if not isinstance(task, LabelledTask) or "chunk" in recipe.batch.model_fields_set:
        return recipe
    return dataclasses.replace(recipe, batch=recipe.batch.model_copy(update={"chunk": task.length}))


def with_prepared_tokenizer(recipe: Recipe) -> Recipe:
    """The recipe with the tokenizer of its (first) prepared corpus, unless it sets one."""
    data = recipe.data
    prepared = prepared_corpora(data.corpus)
    if not prepared or "tokenizer" in data.model_fields_set:
        return recipe
    tokenizer = prepared_tokenizer(prepared[0])
    return dataclasses.replace(recipe, data=data.model_copy(update={"tokenizer": tokenizer}))


def task_errors(recipe: Recipe) -> dict[str, str]:
    """The errors, by key."""
    task, corpus, model = recipe.task(), recipe.data.corpus, recipe.model
    errors = {}
    if not is_labelled(corpus):
        advice = f"is for classifiers (data.corpus lra/NAME), not for {recipe.data.name}; leave it out"
        fields = {"bidirectional": model.bidirectional, "pooling": model.pooling != "last"}
        errors = {f"model.{name}": advice for name, is_set in fields.items() if is_set}
        if recipe.data.cache is not None:
            errors["data.cache"] = f"is for tasks of Long Range Arena (lra/NAME), not for {recipe.data.name}"
    if task is None:
        return errors
    longest = task.length if isinstance(task, LabelledTask) else task.max_train_length
    is_stream = not isinstance(task, LabelledTask) and task.is_stream
    if recipe.batch.chunk < longest and not is_stream:
        message = f"{recipe.batch.chunk} does not hold the longest sequence of {corpus}"
        errors["batch.chunk"] = f"{message}: set it to {longest} or more"
    for name, none in SAMPLES.items():
        if getattr(recipe.train, name) not in (none, TrainSection.model_fields[name].default):
            errors[f"train.{name}"] = f"is for samples of text, and {corpus} has none; leave it out"
    if isinstance(task, LabelledTask):
        errors |= _labelled_errors(recipe, task)
    return errors


def _labelled_errors(recipe: Recipe, task: LabelledTask) -> dict[str, str]:
    errors, corpus, model = {}, recipe.data.corpus, recipe.model
    if recipe.parallel.context > 1:
        errors["parallel.context"] = f"cannot divide the examples of {corpus} among processes; use 1"
    if model.tie_word_embeddings != MinRNNConfig.tie_word_embeddings:
        errors["model.tie_word_embeddings"] = "is for the head of a language model; leave it out"
    if model.logit_softcap is not None:
        errors["model.logit_softcap"] = "is for the head of a language model; leave it out"
    if recipe.optim.z_loss:
        errors["optim.z_loss"] = "is for language models; leave it out"
    if recipe.batch.carry_state and "carry_state" in recipe.batch.model_fields_set:
        errors["batch.carry_state"] = f"{corpus} has whole examples and no state to carry; use false"
    if task.train_examples is not None and task.train_examples < recipe.batch.readers:
        message = f"{recipe.batch.readers} readers cannot share {task.train_examples} training examples"
        errors["batch.readers"] = f"{message}; use fewer"
    return errors
