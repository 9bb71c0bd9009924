"""After the last step: the exported model and what it writes."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..common.errors import StorageError
from ..common.output import warn
from ..data import is_task
from . import processes
from .checkpoint import checkpoint_name
from .evaluation import validation_summary
from .export import export_model, kept_card_warning, load_checkpoint, masks_padding, sample
from .mixture_progress import progress_note, text_progress
from .run import Run
from .samples import write_samples


def finish(run: Run) -> None:
    """Export the model from the last checkpoint and write samples.txt, in the main process.

    Raises:
        UserError, StorageError: in every process, if a line of metrics.jsonl or the export could not be
            written. The same command tries again.
    """
    run.watchdog.enter("exporting")
    if note := progress_note(text_progress(run)):
        run.report(note)
    processes.run_on_main(run.accelerator, lambda: _export(run))


def _export(run: Run) -> None:
    folder, recipe = run.output.folder, run.recipe
    model, tokenizer, config = load_checkpoint(
        folder.path / "checkpoints" / checkpoint_name(run.step),
        run.engine.module.config.vocab_size,
        dtype="fp64" if recipe.train.precision == "fp64" else "fp32",
        trust_remote_code=recipe.data.trust_remote_code,
        mask=masks_padding(run.engine.module.config),
    )
    _sync_metrics(run)
    validations = [
        entry for entry in folder.metrics.history.update().validations if entry["step"] == run.step
    ]
    score = f", {validation_summary(validations[-1])} on held-out data" if validations else ""
    out = folder.path / "model"
    if not export_model(model, tokenizer, out.resolve(), config, run.progress.tokens, score):
        warn(kept_card_warning(out))
    _write_samples(run, model, tokenizer)
    written = "model" if is_task(recipe.data.corpus) else "model, samples.txt"
    run.report(f"finished: {written} and loss.png are in {folder.path}")


def _sync_metrics(run: Run) -> None:
    metrics = run.output.folder.metrics
    try:
        metrics.sync()
    except OSError as error:
        message = (
            f"the last lines of {metrics.path} could not be written ({error.strerror}); the same command "
            "tries again"
        )
        raise StorageError(error.errno, message) from None


def _write_samples(run: Run, model: PreTrainedModel, tokenizer: Any) -> None:
    """Continue each of train.prompts. A failure is a warning: the model is exported already."""
    recipe, prompts = run.recipe, run.recipe.train.prompts
    if not (recipe.train.sample_tokens and prompts) or is_task(recipe.data.corpus):
        return
    try:
        if not run.engine.in_lockstep:  # a sharded model may not fit on one device
            nn.Module.to(model, run.accelerator.device)
        texts = sample(model, tokenizer, prompts, recipe.train.sample_tokens, recipe.run.seed)
        write_samples(run.output.folder, list(zip(prompts, texts, strict=True)))
    except Exception as error:
        warn(f"samples.txt could not be written: {type(error).__name__}: {error}")
