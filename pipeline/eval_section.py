"""The section `eval` of a recipe: tasks of lm-eval and samples on the current weights, during training."""

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from ..data import is_task
from .section import Section, expand_home

if TYPE_CHECKING:
    from .config import Recipe


class EvalSection(Section):
    """Tasks of lm-eval and samples on the current weights, while training pauses (docs/tracking.md).
    Validation is train.eval_every."""

    tasks: list[str] = []
    """Tasks, groups, tags or patterns of lm-eval, as `minrnn eval --tasks`. Their data are loaded before the
    first step. Results are lines of kind eval in metrics.jsonl. Needs the extra eval (make setup-eval)."""
    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations of `tasks`; null for a single one after the last step."""
    limit: float | None = Field(default=None, gt=0)
    """Documents of each task, or below 1 a fraction of them; null for all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; null for the task's own number."""
    include_path: str | None = Field(default=None, min_length=1)
    """Folder with tasks of your own (YAML files of lm-eval)."""
    _expand = field_validator("include_path")(expand_home)
    batch_size: int = Field(default=32, ge=1)
    """Rows that are evaluated at once."""
    samples_every: int | None = Field(default=None, ge=1)
    """Steps between samples of train.prompts: lines of kind samples in metrics.jsonl, all in samples.txt.
    null: samples of the finished model only."""

    def errors(self) -> dict[str, str]:
        errors = {}
        if not self.tasks:
            fields = type(self).model_fields
            for name in ("every", "limit", "num_fewshot", "include_path", "batch_size"):
                if getattr(self, name) != fields[name].default:
                    errors[name] = "is for eval.tasks, which names no task; name some, or leave this out"
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            errors["limit"] = f"must be a number of documents, or a fraction below 1, not {self.limit:g}"
        return errors


def eval_errors(recipe: "Recipe") -> dict[str, str]:
    """Settings of the section that do not fit the corpus, by key."""
    corpus, section, errors = recipe.data.corpus, recipe.eval, {}
    if is_task(corpus):
        if section.tasks:
            errors["eval.tasks"] = (
                f"is for language models of text; the scores of {corpus} are those of validation "
                "(train.eval_every), so leave it out"
            )
        if section.samples_every is not None:
            errors["eval.samples_every"] = f"is for samples of text, and {corpus} has none; leave it out"
    elif section.samples_every is not None and not (recipe.train.sample_tokens and recipe.train.prompts):
        message = "train.prompts and train.sample_tokens ask for no samples"
        errors["eval.samples_every"] = f"{message}; set them, or leave this out"
    return errors
