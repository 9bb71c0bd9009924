"""The options of lm-eval's own command that `minrnn eval` passes on to lm-eval's evaluator.

They are taken from lm-eval's parser (0.4.13), so they read and mean the same: `--log_samples` or
`--log-samples`. Options of lm-eval that are not listed here are those of `minrnn lm-eval`.
"""

import argparse
import json
from typing import Any

PASSED = (
    "apply_chat_template",
    "system_instruction",
    "fewshot_as_multiturn",
    "gen_kwargs",
    "log_samples",
    "predict_only",
    "samples",
    "seed",
    "use_cache",
    "cache_requests",
    "confirm_run_unsafe_code",
    "metadata",
)
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
Errors = list[tuple[str, str]]


def add_lm_eval_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, with lm-eval's help; none if lm-eval is not installed, which lra/NAME does not need.

    An option that is not given is None, or False for one without a value.
    """
    try:
        from lm_eval._cli.run import Run
    except ModuleNotFoundError:
        return
    group = parser.add_argument_group("options of lm-eval, passed on to its evaluator")
    theirs = Run(argparse.ArgumentParser().add_subparsers())._parser
    for action in theirs._actions:
        if action.dest not in PASSED:
            continue
        names = [name for name in action.option_strings if name.startswith("--")]
        action.option_strings = list(dict.fromkeys([*names, *(name.replace("_", "-") for name in names)]))
        if action.default is argparse.SUPPRESS:
            action.default = False if action.nargs == 0 else None
        group._add_action(action)


def lm_eval_option_errors(arguments: argparse.Namespace) -> Errors:
    """Combinations of options that the evaluator does not take."""
    errors: Errors = []
    if isinstance(name := _value(arguments, "apply_chat_template"), str):
        message = f"{name} names one of several templates; only the tokenizer's default is applied"
        errors.append(("--apply_chat_template", f"{message}, so leave the name out"))
    if _value(arguments, "fewshot_as_multiturn") and not _value(arguments, "apply_chat_template"):
        errors.append(("--fewshot_as_multiturn", "needs --apply_chat_template"))
    if _value(arguments, "samples") is not None:
        if not isinstance(arguments.samples, dict):
            errors.append(("--samples", "must be JSON: task names with lists of document numbers"))
        elif arguments.limit is not None:
            errors.append(("--samples", "chooses the documents that --limit would choose; leave one out"))
    return errors


def evaluator_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as keyword arguments of lm-eval's `simple_evaluate`."""
    given = {name: _value(arguments, name) for name in PASSED}
    given = {
        name: value for name, value in given.items() if value not in (None, False) and name != "metadata"
    }
    seeds = given.pop("seed", None)
    given |= dict(zip(SEEDS, seeds, strict=True)) if seeds is not None else {}
    given |= given.pop("cache_requests", {})
    # As in lm-eval's command: with a template the examples are turns, unless the option says false.
    multiturn = _value(arguments, "fewshot_as_multiturn")
    given["fewshot_as_multiturn"] = bool(given.get("apply_chat_template")) if multiturn is None else multiturn
    return given


def metadata_text(arguments: argparse.Namespace) -> str:
    """`--metadata` as JSON, a key of `tasks.task_manager`; empty if it is not given."""
    metadata = _value(arguments, "metadata")
    return json.dumps(metadata, sort_keys=True) if metadata else ""


def _value(arguments: argparse.Namespace, name: str) -> Any:
    return getattr(arguments, name, None)
