"""The settings of a run that is pushed to the Hugging Face hub."""

from typing import Any

from pydantic import Field

from ..section import Section


class PushSection(Section):
    """Push the model to the Hugging Face hub, when the run ends and before. The token (hf auth login, or
    HF_TOKEN) and its right to write are checked before the first step. Training never waits for a push or
    stops because of one."""

    repo: str | None = Field(default=None, min_length=1)
    """Repository of the model, USER/NAME; null for none. It is created if it is not there. A repository that
    holds another model is refused."""
    every: int | None = Field(default=None, ge=1)
    """Steps between pushes of checkpoints; null for the last one only. The first checkpoint at or after each
    multiple is pushed, by a process of its own. If a push takes longer, the next begins after it."""
    private: bool = False
    """Create the repository as a private one. A public one of that name is refused."""
    license: str | None = Field(default=None, min_length=1)
    """Licence of the weights for the model card, by its identifier on the hub, e.g. apache-2.0; null if you
    state none."""
    overwrite: bool = False
    """Replace the model that the repository holds, whatever it is. Earlier commits keep it."""

    def errors(self) -> dict[str, str]:
        if self.repo is None:
            return {
                name: "is for push.repo, which is null; set that, or leave this out"
                for name in ("every", "private", "license", "overwrite")
                if getattr(self, name)
            }
        from .target import name_problem  # imports the hub's client

        problem = name_problem(self.repo)
        return {} if problem is None else {"repo": problem}


def push_errors(recipe: Any) -> dict[str, str]:
    """Errors of settings that do not go together, by key.

    Args:
        recipe: a `config.Recipe`, which holds this section.
    """
    train = recipe.train
    if recipe.push.every is None or train.save_every or train.save_minutes or train.save_at:
        return {}
    message = "pushes checkpoints, but none is written before the end"
    return {"push.every": f"{message}; set train.save_every or train.save_minutes, or leave this out"}
