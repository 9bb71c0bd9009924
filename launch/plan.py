"""`minrnn plan`: parameters, tokens, FLOPs, memory, traffic and time of a run, before it is started."""

import argparse
import math
import re
from collections.abc import Sequence

from ..common.checks import option_minimum_errors
from ..common.errors import UserError
from ..data import is_labelled, is_task
from ..pipeline.config import Recipe
from ..pipeline.options import new_parser
from .estimates import (
    Model,
    Workload,
    activations,
    assumed_precision,
    batch_shape,
    by_micro_lanes,
    bytes_sent,
    engine_memory,
    measure,
    num_texts,
    working_memory,
    workload_of,
)
from .family_plan import FamilySize, family_memory_table, measure_family

ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 + offload")
USABLE = 0.9  # of the device's memory; the rest is for the driver's context, libraries and fragmentation
DESCRIPTION = """Estimate a run before it is started: parameters, tokens, FLOPs, memory per process for each
engine, bytes sent, time. Nothing is allocated. Settings of the recipe may follow, as for minrnn train:
--batch.lanes 8 --train.precision fp32 ..."""


def parse_memory(text: str) -> float:
    """Bytes of a size such as `80GB` or `80GiB`.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", text)
    size = float(match[1]) * {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}[match[2]] if match else 0.0
    if size <= 0:
        raise UserError("--gpu-memory", f"{text!r} is not a size such as 80GB or 141GiB")
    return size


def training_flops(recipe: Recipe, model: Model | FamilySize, vocab_size: int) -> tuple[float, str]:
    """FLOPs of training per token, and how they were counted."""
    from ..pipeline.flops import model_size
    from ..pipeline.machine import training_flops_per_token

    try:
        flops = model_size(recipe, vocab_size).flops.training
    except UserError as error:
        looked_up = model.looked_up if isinstance(model, FamilySize) else 0
        ((_, reason),) = error.errors
        return training_flops_per_token(model.parameters - looked_up), f"6 per parameter: {reason}"
    return flops, f"{flops / model.parameters:.3g} per parameter"


def heading(
    recipe: Recipe, model: Model | FamilySize, flops: float, counted: str, workload: Workload
) -> list[str]:
    """Parameters, tokens, FLOPs (as `training_flops`) and the share of a process, one line each."""
    batch, steps = recipe.batch, recipe.train.steps
    texts = num_texts(recipe)
    tokens_per_step = texts * batch.tokens_per_step
    tokens = tokens_per_step * steps
    parts = ", ".join(f"{part} {count:,}" for part, count in model.parts.items())
    shape = batch_shape(recipe)
    if is_labelled(recipe.data.corpus):
        shape = f"at most: {shape}" + (f" x {texts} texts" if texts > 1 else "")
    sharing = f", {workload.context} to a chunk" if workload.context > 1 else ""
    micro_lanes = recipe.train.micro_lanes
    micro_lanes = "" if micro_lanes is None else f" ({micro_lanes} of {batch.lanes} lanes: train.micro_lanes)"
    note = " (train.precision auto, on a GPU)" if recipe.train.precision == "auto" else ""
    return [
        f"parameters  {model.parameters:,}: {parts}",
        f"tokens      {tokens_per_step:,} a step ({shape}), {steps:,} steps: "
        f"{tokens / 1e9:.3g}B, {tokens / model.parameters:.1f} per parameter",
        f"FLOPs       {flops:.3g} a token ({counted}), {flops * tokens:.3g} in all",
        f"a process   {workload.micro_batches} micro batches of {workload.tokens:,} tokens a step"
        f"{micro_lanes}; {workload.processes} processes{sharing}; {assumed_precision(recipe)}{note}",
    ]


def memory_line(recipe: Recipe, longest: float) -> str:
    """The channels' memory lengths before training, and how many are longer than gradients reach."""
    span = recipe.batch.chunk * recipe.batch.backprop_chunks
    beyond = 0.0 if longest <= 2 else min(max(math.log(longest / span) / math.log(longest / 2), 0.0), 1.0)
    return (
        f"memory      before training, channels remember 2 to {longest:,.0f} tokens (model.memory_length), "
        f"{beyond:.0%} of them more than the {span:,} that gradients reach"
    )


def muon_line(model: Model | FamilySize, flops: float, recipe: Recipe, workload: Workload) -> str:
    """What Muon updates, and the FLOPs of its products beside those of a process's share of a step.

    Args:
        flops: of training per token.
    """
    from ..pipeline.muon import flops_per_step

    elements = sum(rows * columns for rows, columns in model.muon)
    own, tokens = flops_per_step(model.muon), num_texts(recipe) * recipe.batch.tokens_per_step
    share = own / (flops * tokens / workload.processes)
    return (
        f"muon        {len(model.muon)} projections of {elements:,} parameters; {own:.3g} FLOPs a step "
        f"in every process (ZeRO-1 and 2: its share), {share:.2%} of its other FLOPs"
    )


def memory_table(model: Model, workload: Workload, precision: str, memory: float) -> list[str]:
    """Memory per process for each engine and each train.recompute; totals that fit are marked."""
    from ..models.recompute import RECOMPUTE

    common = working_memory(model, workload, precision)
    kept = {recompute: activations(model, workload, precision, recompute) for recompute in RECOMPUTE}
    shared = [f"{name} {size / 1e9:.2f}" for name, size in common.items()]
    by_recompute = ", ".join(f"{size / 1e9:.2f} ({recompute})" for recompute, size in kept.items())
    sizes = by_micro_lanes(model, workload, precision, kept["none"])
    by_lanes = ", ".join(f"{size / 1e9:.2f} ({lanes})" for lanes, size in sizes.items())
    columns, width = ("weights", "gradients", "moments", "own copy", "buffers"), max(map(len, ENGINES))
    header = [f"{name:>11}" for name in columns] + [f"{name:>12}" for name in RECOMPUTE] + [f"{'sent':>10}"]
    lines = [
        f"GB per process, with any engine: {'; '.join([*shared, f'activations {by_recompute}'])}",
        f"GB of activations (none) and loss, by train.micro_lanes: {by_lanes}",
        "",
        "GB".ljust(width) + "".join(header),
    ]
    for engine in ENGINES:
        states = engine_memory(model.parameters, workload.processes, precision, engine, model.muon)
        cells = [f"{states[name] / 1e9:>11.2f}" for name in columns]
        for recompute in RECOMPUTE:
            size = sum(states.values()) + sum(common.values()) + kept[recompute]
            cells.append(f"{size / 1e9:>9.1f} {'*' if size <= USABLE * memory else ' '} ")
        sent = bytes_sent(model.parameters, workload, precision, engine, model.muon) / 1e9
        lines.append(engine.ljust(width) + "".join(cells) + f"{sent:>10.2f}")
    lines.append(
        "none, selective, full: in all, by train.recompute. "
        f"* fits in {USABLE:.0%} of {memory / 1e9:.0f} GB. sent: per step."
    )
    return lines


def time_line(recipe: Recipe, flops: float, workload: Workload, tflops: float, fraction: float) -> str:
    """Seconds per step and days in all, at a given rate and number of FLOPs per token."""
    # A forward pass is a third of these FLOPs. train.recompute and batch.backprop_chunks add to them.
    extra = (recipe.train.recompute == "full") + recipe.batch.forward_passes - 1
    seconds = flops * (1 + extra / 3) * num_texts(recipe) * recipe.batch.tokens_per_step
    seconds /= workload.processes * tflops * 1e12 * fraction
    days = seconds * recipe.train.steps / 86400
    rate = f"{fraction:.0%} of {tflops:g} TFLOP/s in each process (an assumption)"
    return f"time        {seconds:.3g} s a step, {days:.3g} days in all, at {rate}"


def _parser() -> argparse.ArgumentParser:
    epilog = "example:\n  minrnn plan --config fineweb-1b --processes 16 --gpu-memory 80GB --tflops 989"
    parser = new_parser("minrnn plan", DESCRIPTION, epilog)
    parser.add_argument(
        "--config", metavar="RECIPE", help="a YAML file, or the name of a recipe that comes with minrnn"
    )
    parser.add_argument(
        "--processes", type=int, default=8, help="GPUs of all machines together (default: %(default)s)"
    )
    parser.add_argument(
        "--context",
        metavar="N",
        help="processes that share a chunk along time; same as --parallel.context N",
    )
    parser.add_argument("--gpu-memory", default="80GB", help="memory of one device (default: %(default)s)")
    parser.add_argument(
        "--tflops",
        type=float,
        help="rate of a device's matrix products in TFLOP/s; without it, no time is estimated",
    )
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.4,
        help="fraction of --tflops that training reaches (default: %(default)s)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="rows of the embedding (default: of data.tokenizer, which may be downloaded)",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    errors = option_minimum_errors(arguments, processes=1, vocab_size=1)
    for name, most in (("tflops", math.inf), ("fraction", 1.0)):
        value = getattr(arguments, name)
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            errors.append(
                (f"--{name}", f"must be positive{' and at most 1' if most == 1.0 else ''}, not {value:g}")
            )
    try:
        parse_memory(arguments.gpu_memory)
    except UserError as error:
        errors += error.errors
    if errors:
        raise UserError.from_list(errors)


def main(argv: Sequence[str]) -> None:
    """Print the plan of a recipe.

    Raises:
        UserError: all errors of the options or the recipe.
    """
    from ..data import model_vocab_size, run_tokenizer
    from ..pipeline.families.registry import OURS
    from ..pipeline.family_settings import with_sizes
    from ..pipeline.recipe import read_recipe

    arguments, overrides = _parser().parse_known_args(argv)
    for option, value in (("--config", arguments.config), ("--parallel.context", arguments.context)):
        if value is not None:
            overrides += [option, value]
    recipe = read_recipe(overrides)
    _check(arguments)
    workload = workload_of(recipe, arguments.processes)
    precision, data = assumed_precision(recipe), recipe.data
    vocab_size = arguments.vocab_size or model_vocab_size(
        run_tokenizer(data.corpus, data.tokenizer, data.task, data.trust_remote_code)
    )
    recipe = with_sizes(recipe, vocab_size)
    if recipe.model.family == OURS:
        model = measure(recipe, vocab_size)
        table = memory_table(model, workload, precision, parse_memory(arguments.gpu_memory))
    else:
        model = measure_family(recipe, vocab_size)
        table = family_memory_table(model, workload, precision, ENGINES)
    flops, counted = training_flops(recipe, model, vocab_size)
    lines = heading(recipe, model, flops, counted, workload)
    if model.muon:
        lines.append(muon_line(model, flops, recipe, workload))
    if arguments.tflops is not None:
        lines.append(time_line(recipe, flops, workload, arguments.tflops, arguments.fraction))
    if isinstance(model, Model) and not is_task(data.corpus) and model.config.cell != "linear_attention":
        lines.append(memory_line(recipe, model.config.memory_length))
    print("\n".join([*lines, "", *table]))
