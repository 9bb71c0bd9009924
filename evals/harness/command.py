"""`minrnn eval`: evaluates tasks of lm-eval one after another; finished results are on disk before the next
task begins. Tasks of Long Range Arena are in labelled.py.

names -> tasks with their data -> for each: simple_evaluate -> merged into one file in lm-eval's format -> the
run's MLflow
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ...common.checks import option_minimum_errors
from ...common.errors import UserError, missing_package_error
from ...common.files import user_path, write_text
from ...pipeline.options import add_device, add_dtype, add_model, add_trust, new_parser, parse_mapping
from ...pipeline.processes import run_on_all_ranks
from ...pipeline.public import public_config, public_value
from ..output import default_out, out_errors, run_folder
from .labelled import evaluate_labelled, labelled_names
from .lm_eval_options import (
    PASSED,
    add_lm_eval_options,
    evaluator_arguments,
    lm_eval_option_errors,
    metadata_text,
)
from .results import Results, merge, rename_windowed, track, write_samples
from .tasks import evaluation_units, load_tasks, task_manager, task_names

DESCRIPTION = """Evaluate a language model on tasks of lm-eval, or a classifier on the test splits of Long
Range Arena (lra/NAME). A model with a state reads texts of any length, and a prefix that requests share once;
a model of transformers reads each request whole, up to its positions. Several processes share the requests:
accelerate launch -m minrnn.launch.cli eval MODEL --tasks ..."""
EXAMPLES = """examples:
  minrnn eval runs/quickstart --tasks lambada_openai,hellaswag
  minrnn eval my-model --tasks my_task --include-path my-tasks --limit 100 --out results.json
  minrnn eval runs/lra-listops --tasks lra/listops
  minrnn eval my-model --tasks gsm8k --log_samples --gen_kwargs temperature=0.7,do_sample=True --seed 1
  minrnn eval runs/quickstart --tasks wikitext --rolling-window 2048
      with the state carried through each document, and with the state reset every 2048 tokens"""

LM_EVAL_OPTIONS = (
    *("include_path", "num_fewshot", "rolling_window", "trust_remote_code", "bootstrap_iters"),
    *PASSED,
)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn eval", DESCRIPTION, EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        help="names of tasks, groups or tags, or patterns (blimp_*), or lra/NAME, separated by commas",
    )
    parser.add_argument("--include-path", type=user_path, help="folder with tasks of your own (YAML)")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    parser.add_argument(
        "--limit", type=float, help="documents of each task, or below 1 a fraction of them (default: all)"
    )
    parser.add_argument(
        "--rolling-window",
        type=int,
        help="also measure perplexities with the state reset every so many tokens, as NAME_window_SIZE",
    )
    parser.add_argument(
        "--task-options",
        type=parse_mapping,
        default={},
        metavar="YAML",
        help="options of tasks of Long Range Arena, as data.task: '{folder: DIR}' (default: the run's own)",
    )
    size = "rows at once (default: %(default)s); auto is 32"
    parser.add_argument("--batch-size", type=_batch_size, default=32, metavar="N", help=size)
    add_device(parser)
    add_trust(parser)
    add_dtype(parser)
    parser.add_argument(
        "--bootstrap-iters",
        type=int,
        default=100_000,
        help="bootstrap iterations for standard errors; 0: no standard errors (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=user_path,
        help="JSON file to write (default: RUN/evals/lm-eval-TIME.json, evals/results/ without a run)",
    )
    add_lm_eval_options(parser)
    return parser


def _batch_size(text: str) -> int | str:
    """Parse a number, or lm-eval's auto and auto:N, which `MinRNNLM` accepts."""
    return text if text.partition(":")[0] == "auto" else int(text)


def _unused_option_errors(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, is_labelled: bool
) -> list[tuple[str, str]]:
    """The errors of options that tasks of this kind do not read."""
    options, kind = (
        (LM_EVAL_OPTIONS, "tasks of lm-eval")
        if is_labelled
        else (("task_options",), "tasks of Long Range Arena (lra/NAME)")
    )
    return [
        (f"--{name.replace('_', '-')}", f"is for {kind}; leave it out")
        for name in options
        if getattr(arguments, name, None) != parser.get_default(name)
    ]


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace, is_labelled: bool) -> None:
    """Check the arguments, without the model and the tasks.

    Raises:
        UserError: all errors in them.
    """
    errors = _unused_option_errors(parser, arguments, is_labelled)
    errors += option_minimum_errors(arguments, num_fewshot=0, rolling_window=1, bootstrap_iters=0)
    if isinstance(arguments.batch_size, int):
        errors += option_minimum_errors(arguments, batch_size=1)
    if arguments.limit is not None and (
        arguments.limit <= 0 or (arguments.limit > 1 and arguments.limit != int(arguments.limit))
    ):
        errors.append(
            ("--limit", f"must be a number of documents, or a fraction below 1, not {arguments.limit:g}")
        )
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        errors.append(("--include-path", f"{arguments.include_path} is no folder"))
    errors += lm_eval_option_errors(arguments) + out_errors(arguments.out)
    if errors:
        raise UserError.from_list(errors)


def evaluate(
    lm: Any, objects: list[Any], window: int | None, manager: Any, arguments: argparse.Namespace
) -> Results | None:
    """Evaluate tasks or a group; None except on the main process."""
    from lm_eval import evaluator

    simple_evaluate: Any = evaluator.simple_evaluate  # its decorator hides its parameters from type checkers
    lm.rolling_window = window
    passed = {"log_samples": False, **evaluator_arguments(arguments)}
    if window is not None and "use_cache" in passed:  # which finds an answer by its request, the same here
        passed["use_cache"] += f"_window_{window}"
    results = simple_evaluate(
        lm,
        tasks=objects,
        num_fewshot=arguments.num_fewshot,
        batch_size=lm.batch_size,
        device=str(lm.device),
        limit=arguments.limit if arguments.limit is None or arguments.limit < 1 else int(arguments.limit),
        bootstrap_iters=arguments.bootstrap_iters,
        task_manager=manager,
        **passed,
    )
    if results is None:
        return None
    for config in results["configs"].values():
        config |= public_config(
            {key: config[key] for key in ("dataset_path", "dataset_kwargs", "metadata") if key in config}
        )
        if config.get("output_type") == "loglikelihood_rolling":
            config["metadata"] = {**(config.get("metadata") or {}), "rolling": lm.rolling}
    results["config"].pop("rolling")
    name = public_value(str(run_folder(arguments.model) or arguments.model))
    results["config"] |= {"model": name, "model_args": {"pretrained": name, "dtype": arguments.dtype}}
    return results if window is None else rename_windowed(results, window)


def evaluate_all(
    units: Iterable[str],
    evaluate_unit: Callable[[str], Results | None],
    save: Callable[[Results, Results], None],
    is_alone: bool,
) -> list[str]:
    """Evaluate each unit; a failure does not stop the others.

    Args:
        evaluate_unit: returns the unit's results; None except on the main process.
        save: gets all results so far and those of the new unit. If it raises, the unit counts as failed.
        is_alone: whether this is the only process. Otherwise a failure ends the evaluation, since the other
            processes would wait for this one.

    Returns:
        One line per failed unit.
    """
    results: Results = {}
    failures = []
    for name in units:
        try:
            new = evaluate_unit(name)
            if new is not None:
                results = merge(results, new)
                save(results, new)
        except Exception as error:  # tasks run foreign code
            logging.getLogger(__name__).debug("%s failed", name, exc_info=True)
            failures.append(
                f"error: {name}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            )
            if not is_alone:
                break
    return failures


def _evaluate(arguments: argparse.Namespace) -> list[str]:
    """Evaluate, print the table, write the file; returns one line per failed task."""
    import transformers
    from lm_eval import utils

    from .model import MinRNNLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    manager = task_manager(arguments.include_path, metadata_text(arguments))
    names, run = task_names(manager, arguments.tasks), run_folder(arguments.model)
    lm = MinRNNLM(
        arguments.model,
        batch_size=arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    if lm.accelerator is None:
        tasks = load_tasks(manager, names)
    else:
        tasks = run_on_all_ranks(lm.accelerator, lambda: load_tasks(manager, names))
    out = arguments.out or default_out(arguments.model, "lm-eval")
    finished: Results = {}

    def save(results: Results, new: Results) -> None:
        finished.update(results)
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, default=utils.handle_non_serializable, ensure_ascii=False)
        write_text(out, text)
        write_samples(out, new)
        if run is not None:
            track(run, new)

    units = evaluation_units(tasks, manager, arguments.rolling_window)
    failures = evaluate_all(
        units,
        lambda unit: evaluate(lm, *units[unit], manager, arguments),
        save,
        is_alone=lm.world_size == 1,
    )
    if finished:
        make_table: Any = utils.make_table
        tables = [make_table(finished), *([make_table(finished, "groups")] if finished.get("groups") else [])]
        print(*tables, f"results: {out}", sep="\n")
    return failures


def main(argv: list[str]) -> None:
    """Run `minrnn eval`.

    Raises:
        UserError: arguments, model or tasks are unusable.
        SystemExit: 1 if a task failed. 2 in all processes of a machine but the first where that one raises
            UserError: their message would be the same, unless it is about their own device.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        names = labelled_names(arguments.tasks)
        _check(parser, arguments, is_labelled=bool(names))
        if names:
            evaluate_labelled(arguments, names, argv)
            return
        failures = _evaluate(arguments)
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise missing_package_error("eval", "lm-eval", extra="eval") from None
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and all(key != "--device" for key, _ in error.errors):
            raise SystemExit(2) from None
        raise
    if failures:
        print("\n".join(failures), file=sys.stderr)
        raise SystemExit(1)
