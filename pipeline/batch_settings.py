"""The section `batch` of a recipe, and what the other sections must be for it."""

from typing import TYPE_CHECKING

from pydantic import Field

from ..data import is_task
from .families.registry import CARRYING
from .section import Section

if TYPE_CHECKING:
    from .config import Recipe


class BatchSection(Section):
    """The global batch: readers x lanes x chunk x backprop_chunks tokens, for any number of processes."""

    readers: int = Field(default=1, ge=1)
    """Cursors into the corpus. Processes share them evenly and accumulate gradients over their own.
    readers x parallel.context is the largest possible number of processes."""
    lanes: int = Field(default=16, ge=1)
    """Rows of a reader's chunk. Each lane is a stream of documents."""
    chunk: int = Field(default=256, ge=1)
    """Tokens of a lane that are computed at once. Gradients reach no further back than backprop_chunks of
    them. For lra/NAME the default is the length of the longest example that data.task allows."""
    backprop_chunks: int = Field(default=1, ge=1)
    """Consecutive chunks of each lane in one step. Gradients flow back through all of them, exactly, while
    the activations of one chunk are in memory; all but the last are computed forward twice. Needs
    carry_state, a data.order other than windows, and a family that carries its state
    (docs/long-context.md)."""
    carry_state: bool = True
    """Carry the state from one chunk to the next. It is reset at document starts."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.readers * self.lanes * self.chunk * self.backprop_chunks

    @property
    def forward_passes(self) -> float:
        """Forward passes over each token in a step."""
        return 2 - 1 / self.backprop_chunks


def batch_errors(recipe: "Recipe") -> dict[str, str]:
    """Settings that `batch.backprop_chunks` does not go with, by key."""
    batch, data, family = recipe.batch, recipe.data, recipe.model.family
    if batch.backprop_chunks == 1:
        return {}
    task = recipe.synthetic_task()
    if is_task(data.corpus) and not (task and task.is_stream):
        reason = f"{data.corpus} has whole examples, none longer than a chunk"
    elif family not in CARRYING:
        reason = f"{family} has no state to carry from chunk to chunk"
    elif data.order == "windows":
        reason = "the crops of data.order windows are not consecutive; use order documents"
    elif not batch.carry_state:
        reason = "batch.carry_state false cuts the gradients at each chunk; set it to true"
    else:
        return {}
    advice = "; use 1" if ";" not in reason else ", or 1 here"
    return {"batch.backprop_chunks": f"{batch.backprop_chunks} chunks cannot be joined: {reason}{advice}"}
