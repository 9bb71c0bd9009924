"""`minrnn figures quickstart`: records the result of the quickstart run, after `make train`.

Writes evals/results/quickstart.json: speed and validation from metrics.jsonl, and a validation on every
held-out module (the run itself scores a subset). Copies the loss curve to docs/quickstart.png. The README's
numbers come from there.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from ...common.files import user_path, write_json
from ...data import Encoder, load_tokenizer
from ...models import MinRNNForCausalLM
from ...pipeline.corpora import corpus_spec
from ...pipeline.evaluation import make_held_out, validate, validation_sets
from ...pipeline.recipe import build_recipe
from ..output import RESULTS
from ..record import commit, machine, versions
from ..report.runs import training_seconds

REPOSITORY = RESULTS.parents[1]


def measure(run: Path) -> dict:
    """The results of a finished run."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train, validations = (
        [line for line in lines if line["kind"] == kind] for kind in ("train", "validation")
    )
    seconds = training_seconds(train, validations)
    assert seconds is not None, "every line of a run has its speed"
    model = MinRNNForCausalLM.from_pretrained(run / "model", trust_remote_code=False)
    values["data"]["validation_tokens"] = None
    recipe = build_recipe(values)
    encoder = Encoder.from_tokenizer(load_tokenizer(recipe.data.tokenizer), recipe.data.tokenizer)
    held_out = make_held_out(recipe, corpus_spec(recipe), encoder)
    sets = validation_sets(recipe, held_out, range(recipe.batch.readers))
    return {
        "command": "make train && .venv/bin/minrnn figures quickstart",
        "commit": commit(),
        "parameters": model.num_parameters(),
        "tokens": train[-1]["tokens"],
        "steps": train[-1]["step"],
        "seed": recipe.run.seed,
        "training_seconds": round(seconds),
        "tokens_per_second_median": statistics.median(line["tokens_per_second"] for line in train),
        "validation_subset": validations[-1],
        "validation_all_held_out_modules": validate(
            model, sets, Accelerator(cpu=True), recipe.batch.carry_state
        ),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }


def main(argv: list[str]) -> None:
    """Write the results file and copy the picture."""
    parser = argparse.ArgumentParser(
        "minrnn figures quickstart", description="Record the result of the quickstart run."
    )
    parser.add_argument(
        "--run",
        type=user_path,
        default=Path("runs/quickstart"),
        help="folder of the run (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    out = RESULTS / "quickstart.json"
    write_json(out, measure(arguments.run))
    shutil.copyfile(arguments.run / "loss.png", REPOSITORY / "docs" / "quickstart.png")
    print(out.read_text())
