"""The model card of an export, README.md: what a model is, how to load it, its data, scores and limits."""

from .earlier import is_earlier_card
from .evaluations import lm_eval_results, validation_results
from .sources import data_sources
from .text import NAME, Generation, ModelFacts, Publication, TrainingFacts, model_card

__all__ = [
    "NAME",
    "Generation",
    "ModelFacts",
    "Publication",
    "TrainingFacts",
    "data_sources",
    "is_earlier_card",
    "lm_eval_results",
    "model_card",
    "validation_results",
]
