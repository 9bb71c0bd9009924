"""`minrnn push`: a run's model, or an export, to the Hugging Face hub."""

import argparse
import tempfile
from pathlib import Path

from ..common.errors import UserError
from ..common.files import user_path
from ..common.output import warn
from ..pipeline.options import DTYPE_NAMES, add_trust, new_parser
from ..pipeline.run_id import RUN_ID

DESCRIPTION = """Push a model to the Hugging Face hub: weights, configuration, modeling code, tokenizer, model
card, and of a run its training record (recipe without credentials and local paths, metrics, loss curve). The
push is one commit: if it is cut off, the repository is as it was, and the same command finishes it."""
EPILOG = """examples:
  hf auth login                                             # once: a token with the right to write
  minrnn push runs/quickstart --repo me/my-model            # the newest checkpoint of a run
  minrnn push runs/quickstart --repo me/my-model --private --license apache-2.0
  minrnn push runs/quickstart --repo me/my-model --step 200 --revision step-200
  minrnn push my-export --repo me/my-model                  # a folder that minrnn export wrote
  minrnn train --config quickstart --push.repo me/my-model --push.every 1000   # while it trains

Then, on any machine:
  minrnn generate me/my-model --prompt "def main"

The card lists the run's results of minrnn eval, if they are of the pushed step. A card that was edited by
hand, in RUN/model or on the hub, is kept. A repository that holds another model is refused."""


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("minrnn push", DESCRIPTION, EPILOG)
    parser.add_argument("model", type=user_path, metavar="RUN|MODEL", help="a run's folder, or an export")
    parser.add_argument(
        "--repo",
        required=True,
        metavar="ID",
        help="USER/NAME, or NAME for your own; it is created if it is not there",
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch to push to; it is created from main (default: main)"
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest valid one)")
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="dtype of a checkpoint's weights (default: fp32)"
    )
    parser.add_argument(
        "--license",
        metavar="LICENCE",
        help="licence of the weights, by its identifier on the hub, e.g. apache-2.0 (default: none stated)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace whatever model and card the repository holds; earlier commits keep them",
    )
    add_trust(parser)
    return parser


def main(argv: list[str]) -> None:
    """Run `minrnn push`."""
    arguments = _parser().parse_args(argv)
    run = _run_of(arguments.model)
    errors = [
        (f"--{name}", "must not be empty; leave it out")
        for name in ("revision", "license")
        if getattr(arguments, name) == ""
    ]
    if run is None:
        errors += [
            (f"--{name}", "is for a run; an export has its own, so leave it out")
            for name in ("step", "dtype", "license")
            if getattr(arguments, name) is not None
        ]
        if not arguments.model.is_dir():
            errors.append(("RUN", f"there is no folder {arguments.model}; name a run or an export"))
    if errors:
        raise UserError.from_list(errors)

    import transformers

    from ..pipeline.push.commit import kept_card_message, push_export, push_run, pushed_message
    from ..pipeline.push.target import PushOptions

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = PushOptions(
        arguments.repo, arguments.revision, arguments.private, arguments.overwrite, arguments.license
    )
    if run is None:
        with tempfile.TemporaryDirectory(prefix="minrnn-push-") as staged:
            pushed = push_export(arguments.model, options, Path(staged))
    else:
        trust = arguments.trust_remote_code
        pushed = push_run(run, options, arguments.step, arguments.dtype or "fp32", trust)
    if pushed.kept_card:
        warn(kept_card_message(pushed, options))
    print(pushed_message(pushed))


def _run_of(path: Path) -> Path | None:
    """The run that a path names: its folder, or its model/. None for an export."""
    for folder in (path, path.resolve().parent) if path.resolve().name == "model" else (path,):
        if (folder / "checkpoints").is_dir() or (folder / RUN_ID).is_file():  # a run that has saved nothing
            return folder
    return None
