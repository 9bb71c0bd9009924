"""Lines of metrics.jsonl, and their forms in the log, MLflow and other trackers."""

from typing import Any

from . import processes
from .forecast import seconds_left
from .machine import peak_memory, training_flops_per_token
from .mixture_progress import text_progress
from .run import Run
from .run_log import StepLine
from .throughput import Rates


def log_step(run: Run, entry: dict[str, Any], rates: Rates) -> None:
    """Write the line of a step to metrics.jsonl and show it. Collective."""
    recipe = run.recipe
    tokens_per_second = rates.tokens_per_second
    # All processes wait for the one that waits the longest.
    data_seconds = processes.all_reduce_max(run.accelerator, round(1e6 * rates.data_seconds)) / 1e6
    flops_per_second = tokens_per_second * training_flops_per_token(run.engine.num_parameters)
    matmul_fraction = flops_per_second / (run.matmul_rate * run.accelerator.num_processes)
    entry = {"kind": "train", "step": run.step, "tokens": run.progress.tokens, **entry}
    entry |= {"tokens_per_second": round(tokens_per_second, 1), "matmul_fraction": round(matmul_fraction, 4)}
    entry |= text_progress(run)
    entry["data_seconds"] = data_seconds
    if recipe.data.skip_broken and recipe.data.order in ("documents", "continuous"):
        entry["documents_skipped"] = _sum_over_readers(run, "num_skipped")
    if recipe.data.has_filter and recipe.data.order == "documents":
        entry["documents_filtered"] = _sum_over_readers(run, "num_filtered")
    record(run, entry)
    memory = processes.all_reduce_max(run.accelerator, peak_memory(run.accelerator.device))
    if run.output.log is not None:
        run.output.log.show(
            StepLine(
                step=run.step,
                num_steps=recipe.train.steps,
                loss=entry["loss"],
                tokens_per_second=tokens_per_second,
                matmul_fraction=matmul_fraction,
                waiting=data_seconds / rates.step_seconds,
                peak_memory=memory,
                seconds_left=seconds_left(run, rates.usual_step_seconds),
            )
        )


def _sum_over_readers(run: Run, count: str) -> int:
    """The sum of a count in the positions of all readers. Collective."""
    own = sum(reader.position[count] for reader in run.data.readers.values() if reader.position)
    (total,) = processes.all_reduce_sum(run.accelerator, [own / run.layout.context])
    return int(total)


def record(run: Run, entry: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl and tell the trackers, in the main process only."""
    if run.is_main:
        run.output.folder.restore()
        run.output.folder.metrics.append(entry)
        if run.output.tracker is not None:
            run.output.tracker.notify()
        if run.output.others is not None:
            run.output.others.log(entry)
