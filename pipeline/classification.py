"""Classifiers: the model, the splits and the scores of tasks with one label for each example (lra/NAME)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..common.errors import UserError
from ..data import LabelledData, LabelledSet, LabelledTask, build_task, cache_folder, is_labelled, open_data
from ..models import MinRNNConfig, MinRNNForSequenceClassification
from .config import Recipe
from .families.build import build_causal_lm
from .loading import move_model, read_weights, weights_dtype
from .machine import resolve_device
from .processes import all_reduce_sum, to_device


def classifier_fields(corpus: object, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of the model's configuration that the corpus decides; empty for a language model's."""
    if not is_labelled(corpus):
        return {}
    task = build_task(corpus, options)
    assert isinstance(task, LabelledTask)
    return {
        "num_labels": task.num_labels,
        "id2label": dict(enumerate(task.LABELS)),
        "label2id": {label: number for number, label in enumerate(task.LABELS)},
        "problem_type": "single_label_classification",
        "num_towers": task.TOWERS,
    }


def new_model(family: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with new weights: a classifier for a configuration with `classifier_fields`, else a language
    model.

    Raises:
        UserError: as `build_causal_lm`.
    """
    if getattr(config, "problem_type", None) is None:
        return build_causal_lm(family, config)
    assert isinstance(config, MinRNNConfig)
    return MinRNNForSequenceClassification(config)


def open_labelled(recipe: Recipe, on_progress: Callable[[], object] = lambda: None) -> LabelledData | None:
    """The examples of the recipe's task, made now if need be; None for a language model.

    Args:
        on_progress: called now and then while they are made.

    Raises:
        UserError: as `open_data`; or there are fewer training examples than readers.
    """
    task = recipe.task()
    if not isinstance(task, LabelledTask):
        return None
    data = open_data(task, cache_folder(recipe.data.cache), on_progress)
    if (count := len(data.examples("train"))) < recipe.batch.readers:
        message = f"{recipe.batch.readers} readers cannot share {count} training examples; use fewer"
        raise UserError("batch.readers", message)
    return data


def test_sets(recipe: Recipe, readers: range) -> list[LabelledSet]:
    """These readers' shares of the task's test split, which is scored once, after the last step."""
    data = open_labelled(recipe)
    return [] if data is None else data.sets("test", readers, recipe.batch.readers, recipe.batch.lanes)


@torch.no_grad()
def score_labels(
    model: nn.Module,
    sets: Sequence[LabelledSet],
    accelerator: Accelerator,
    after_chunk: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Mean loss in nats and accuracy, over the sets of all processes.

    All processes have the same number of batches, so forward passes that are collective match.
    """
    was_training = model.training
    model.eval()
    nats = correct = scored = 0.0
    for part in sets:
        for batch in part.chunks():
            inputs = {name: to_device(array, accelerator) for name, array in batch.model_inputs().items()}
            output = model(**inputs, use_cache=False, num_items_in_batch=1)
            nats += float(output.loss)
            correct += float((output.logits.argmax(-1) == inputs["labels"]).sum())
            scored += batch.num_scored
            after_chunk()
    model.train(was_training)
    nats, correct, scored = all_reduce_sum(accelerator, [nats, correct, scored])
    chance = 1 / sets[0].num_labels
    accuracy = correct / scored
    return {
        "loss": nats / scored,
        "accuracy": accuracy,
        "accuracy_scaled": (accuracy - chance) / (1 - chance),
        "chance": chance,
        "examples": int(scored),
    }


def load_classifier(name: str, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load the classifier (in eval mode) of an export, a hub id or a run.

    Args:
        dtype, device: as in `loading.load`.

    Raises:
        UserError: as `loading.read_weights`, or the device does not support it.
    """
    target = resolve_device(device)
    model = read_weights(name, wants_classifier=True)
    move_model(model, weights_dtype(model.dtype, dtype, target), target)
    return model.eval()
