"""The `minrnn` command."""

import argparse
import importlib
import sys
from types import ModuleType

from ..common.errors import UserError, missing_package_error
from ..common.files import user_path
from ..common.names import did_you_mean, nearest_names
from ..common.output import conventional_exit, exit_on_error
from ..pipeline.options import DTYPE_NAMES, add_trust

USAGE = """usage: minrnn COMMAND ...

  train         train a model from a recipe
                    minrnn train --config quickstart [--section.field VALUE ...]
  generate      continue a prompt
                    minrnn generate runs/quickstart/model --prompt "def main"
  plan          estimate memory, FLOPs and traffic of a run before it is started
                    minrnn plan --config fineweb-1b --processes 16
  sweep         train a grid, a search or a ladder of sizes and budgets, with any number of workers
                    minrnn sweep laptop --plan
  ablate        compare variants of a recipe: learning rates tuned, paired over seeds, with intervals
                    minrnn ablate block --plan
  fit           fit a scaling law, with intervals, to a sweep, to runs or to a CSV file
                    minrnn fit runs/laptop
  prepare       write the tokens of a corpus to disk, for runs that start at once
                    minrnn prepare quickstart --out prepared/stdlib
  tokenizer     train a byte-level BPE tokenizer on a corpus
                    minrnn tokenizer train python-stdlib --vocab-size 8192 --out my-tokenizer
  data          print what a run will see; make the examples of a task of Long Range Arena
                    minrnn data show quickstart        minrnn data lra/listops
  export        write a run's checkpoint as a transformers model
                    minrnn export runs/quickstart --out my-model
  push          push a run's model, with a model card, to the Hugging Face hub
                    minrnn push runs/quickstart --repo me/my-model
  eval          run tasks of lm-eval, or score a classifier on its task's test split
                    minrnn eval runs/quickstart --tasks lambada_openai,hellaswag
  long-context  measure the loss by position on one long document, and how far back the model looks
                    minrnn long-context runs/quickstart --tokens 200000
  bench         measure speed and memory of minrnn and its peers
                    minrnn bench train [--peers llama,mamba ...]
  report        put all results on one page, beside published numbers
                    minrnn report [PATH ...] [--out DIR]
  ui            open MLflow's interface on the database that runs wrote
                    minrnn ui [RUN]
  results       combine runs into one results file
                    minrnn results runs/0 runs/1 --as shakespeare
  rolling       score one long document through lm-eval
                    minrnn rolling runs/quickstart
  lm-eval       the command lm_eval with all its options, and with --model minrnn
                    minrnn lm-eval --model minrnn --model_args pretrained=runs/quickstart ...
  figures       make this repository's own figures (in a checkout only)
                    minrnn figures docs

`minrnn COMMAND --help` lists the options of a command. To train with several processes:
accelerate launch -m minrnn.pipeline.train --config RECIPE ...
"""

MODULES = {
    "generate": ".generate",
    "plan": ".plan",
    "prepare": ".prepare",
    "push": ".push",
    "tokenizer": ".train_tokenizer",
    "data": ".show_data",
    "eval": "..evals.harness.command",
    "long-context": "..evals.long_context.command",
    "bench": "..evals.bench.command",
    "report": "..evals.report.command",
    "results": "..evals.report.runs",
    "rolling": "..evals.long_context.rolling",
    "lm-eval": "..evals.harness.model",
    "fit": "..evals.scaling.command",
    "ui": ".ui",
    "sweep": ".sweep.command",
    "ablate": ".ablate.command",
    "figures": "..evals.figures.command",
}


def _export(argv: list[str]) -> None:
    description = "Export a checkpoint of a run: weights, code, tokenizer, model card."
    parser = argparse.ArgumentParser("minrnn export", description=description)
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
        help="write to a folder that holds other files, and replace those with an export's names",
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest valid one)")
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
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
            raise missing_package_error(command, "lm-eval", extra="eval") from None
        if command == "fit" and str(error.name).partition(".")[0] == "scipy":
            raise missing_package_error(command, "scipy", extra="eval") from None
        if command == "figures" and str(error.name).endswith(".figures"):
            message = "exists in a checkout of the repository only, and this is an installed package"
            raise UserError(command, message) from None
        raise


def main(argv: list[str] | None = None) -> None:
    """Run a command. The exit status is 2 after a UserError, 130 after Ctrl-C, 141 after a closed pipe."""
    with conventional_exit():
        _dispatch(sys.argv[1:] if argv is None else argv)


def _dispatch(argv: list[str]) -> None:
    command, arguments = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h"):
        print(USAGE)
        return
    if command == "train":
        from ..pipeline.train import main as train

        train(arguments)
        return
    with exit_on_error(command):
        if command == "export":
            _export(arguments)
        elif command in MODULES:
            _command_module(command).main(arguments)
        else:
            similar = nearest_names(command, ("train", "export", *MODULES))
            hint = did_you_mean(similar, otherwise="minrnn --help lists them")
            raise UserError(command, f"unknown command ({hint})")


if __name__ == "__main__":
    main()
