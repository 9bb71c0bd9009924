"""The `minrnn` command."""

import argparse
import importlib
import sys
from types import ModuleType

from ..common.errors import UserError
from ..common.files import user_path
from ..common.names import did_you_mean, nearest_names
from ..common.output import conventional_exit, exit_on_error
from ..pipeline.options import add_trust

USAGE = """usage: minrnn COMMAND ...

  train          pretrain a model from a recipe    minrnn train --config quickstart [--section.field VALUE ...]
  generate       continue a prompt                 minrnn generate runs/quickstart/model --prompt "def main"
  plan           memory, FLOPs and traffic of a    minrnn plan --config fineweb-1b --processes 16
                 run before it is started
  export         a run's checkpoint as a           minrnn export runs/quickstart --out my-model
                 transformers model
  eval           tasks of lm-eval                  minrnn eval runs/quickstart --tasks lambada_openai,hellaswag
  long-context   loss by position on one long      minrnn long-context runs/quickstart --tokens 200000
                 document, and how far back the
                 model looks
  bench          speed and memory beside the       minrnn bench train [--peers llama,mamba ...]
                 peers'
  report         all results on one page, beside   minrnn report [PATH ...] [--out DIR]
                 published numbers
  results        runs into one results file        minrnn results runs/0 runs/1 --as shakespeare
  rolling        one long document through lm-eval minrnn rolling runs/quickstart
  lm-eval        every option of the command       minrnn lm-eval --model minrnn --model_args pretrained=runs/quickstart ...
                 lm_eval, with --model minrnn
  figures        this repository's own figures, in minrnn figures speed
                 a checkout

`minrnn COMMAND --help` says more. Several processes: accelerate launch -m minrnn.pipeline.train --config RECIPE ...
"""

MODULES = {
    "generate": ".generate",
    "plan": ".plan",
    "eval": "..evals.harness.command",
    "long-context": "..evals.long_context.command",
    "bench": "..evals.bench.command",
    "report": "..evals.report.command",
    "results": "..evals.report.runs",
    "rolling": "..evals.long_context.rolling",
    "lm-eval": "..evals.harness.model",
    "figures": "..evals.figures.command",
}


def _export(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "minrnn export", description="Export a checkpoint of a run: weights, code, tokenizer, model card."
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="folder of the run, e.g. runs/quickstart")
    parser.add_argument(
        "--out",
        type=user_path,
        required=True,
        help="folder to write; an export there is replaced, other files stay",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write into a folder that holds other files, and replace those of an export's names",
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest valid one)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp64"),
        default="fp32",
        help="dtype of the weights (default: %(default)s)",
    )
    add_trust(parser)
    arguments = parser.parse_args(argv)
    from ..pipeline.export import export_run

    checkpoint = export_run(
        arguments.run,
        arguments.out,
        arguments.step,
        arguments.dtype,
        arguments.force,
        arguments.trust_remote_code,
    )
    print(f"{checkpoint} exported to {arguments.out}")


def _command_module(command: str) -> ModuleType:
    try:
        return importlib.import_module(MODULES[command], __package__)
    except ModuleNotFoundError as error:
        if command == "lm-eval" and error.name == "lm_eval":
            message = "lm-eval is not installed: make setup-eval, or pip install 'minrnn[eval]'"
        elif command == "figures" and str(error.name).endswith(".figures"):
            message = "exists in a checkout of the repository only, and this is an installed package"
        else:
            raise
        raise UserError(command, message) from None


def main(argv: list[str] | None = None) -> None:
    """Run a command. The exit status is 2 after a UserError, 130 after Ctrl-C, 141 after a closed pipe."""
    with conventional_exit():
        _dispatch(sys.argv[1:] if argv is None else argv)


def _dispatch(argv: list[str]) -> None:
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h"):
        print(USAGE)
        return
    if command == "train":
        from ..pipeline.train import main as train

        train(rest)
        return
    with exit_on_error(command):
        if command == "export":
            _export(rest)
        elif command in MODULES:
            _command_module(command).main(rest)
        else:
            near = nearest_names(command, ("train", "export", *MODULES))
            hint = did_you_mean(near, otherwise="minrnn --help lists them")
            raise UserError(command, f"unknown command ({hint})")


if __name__ == "__main__":
    main()
