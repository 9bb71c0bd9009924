"""`minrnn plan`: what a run takes - parameters, tokens, FLOPs, memory, traffic, time - before anything is started or allocated.

Memory of a process, in bytes (N parameters, P processes that share the engine's states, w = 4; 8 in fp64):

                 weights   gradients   two moments   own copy   buffers
    DDP          w N       w N         2 w N         -          w N             buckets that gradients are sent from
    ZeRO-1       w N       w N         2 w N / P     w N / P    w min(N, 5e8)   a bucket of gradients
    ZeRO-2       w N       w N / P     2 w N / P     w N / P    w 5e8
    ZeRO-3       w N / P   w N / P     2 w N / P     w N / P    w 5e8 + w min(N, 1e9)   and weights that are gathered
    + offload    -         w N / P     -             -          as ZeRO-3       the rest is in the machine's memory

w N four times is the 16 bytes a parameter of fp32 training with AdamW; the own copy is the one that DeepSpeed steps on, and the buckets are its
defaults. To these come, whatever the engine: autocast's copies of the matrices; activations (models/recompute.py); the loss (models/loss.py);
the carried states. Sent per process and step, with ring algorithms and k readers a process, in units of w N (P - 1) / P: DDP and ZeRO-1 2,
ZeRO-2 k + 1, ZeRO-3 3 k.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.checks import option_minimum_errors
from ..common.errors import UserError
from ..pipeline.config import Recipe

ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 + offload")
BUCKET, MAX_LIVE = 5e8, 1e9  # elements: reduce_bucket_size, stage3_max_live_parameters
USABLE = 0.9  # of the device; the rest is the driver's context, libraries and fragmentation
DESCRIPTION = """What a run takes, before it is started: parameters, tokens, FLOPs, memory per process for each engine, bytes sent, time.
Nothing is allocated. Settings of the recipe may follow, as for minrnn train: --batch.lanes 8 --train.precision fp32 ..."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model."""

    parts: dict[str, int]
    """Parameters by part."""
    matrices: int
    """Parameters that autocast copies: matrices of the blocks."""
    hidden: int
    recurrent: int
    projections: int
    intermediate: int
    cell: str
    activation: str
    layers: int
    vocab: int
    kernel: int
    output_gate: bool
    gated_mlp: bool
    tied: bool

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Workload:
    """How a step is shared out."""

    processes: int
    context: int
    """Processes that share a reader's chunk along time."""
    readers: int
    """Readers of a process: micro batches of a step."""
    lanes: int
    tokens: int
    """Of a micro batch, in one process."""


def measure(recipe: Recipe, vocab_size: int) -> Model:
    """The sizes of the recipe's model, counted on the meta device."""
    import torch
    from torch import nn

    from ..models import MinRNNConfig, MinRNNForCausalLM
    from ..models.cells import CELLS

    config = MinRNNConfig(**recipe.model_fields_resolved(), vocab_size=vocab_size)
    with torch.device("meta"):
        model = MinRNNForCausalLM(config)
    parts: dict[str, int] = dict.fromkeys(("embedding and head", "mixers", "MLPs", "norms"), 0)
    for name, parameter in model.named_parameters():
        part = next(
            (
                part
                for key, part in ((".mixer.", "mixers"), (".mlp.", "MLPs"), ("norm", "norms"))
                if key in name
            ),
            "embedding and head",
        )
        parts[part] += parameter.numel()
    return Model(
        parts={part: count for part, count in parts.items() if count},
        matrices=sum(
            module.weight.numel() for module in model.model.layers.modules() if isinstance(module, nn.Linear)
        ),
        hidden=config.hidden_size,
        recurrent=config.recurrent_size,
        projections=CELLS[config.cell].num_gates + 1 + int(config.output_gate),
        intermediate=config.intermediate_size,
        cell=config.cell,
        activation=config.candidate_activation,
        layers=config.num_hidden_layers,
        vocab=vocab_size,
        kernel=max(config.conv_kernel, 1),
        output_gate=config.output_gate,
        gated_mlp=config.gated_mlp,
        tied=config.tie_word_embeddings,
    )


def workload_of(recipe: Recipe, processes: int) -> Workload:
    """Share a step's readers and chunks among processes.

    Raises:
        UserError: they do not divide.
    """
    errors, batch, context = [], recipe.batch, recipe.parallel.context
    if processes % context:
        errors.append(("parallel.context", f"groups of {context} do not divide {processes} processes"))
    reach = recipe.model_fields_resolved()["conv_kernel"] - 1
    if context > 1 and (batch.chunk % context or batch.chunk // context < reach):
        errors.append(
            (
                "batch.chunk",
                f"{batch.chunk} tokens cannot be cut into {context} equal pieces (parallel.context) of at least {reach}",
            )
        )
    groups = max(processes // context, 1)
    if batch.readers % groups:
        fitting = [n for n in range(1, batch.readers + 1) if batch.readers % n == 0]
        errors.append(
            (
                "batch.readers",
                f"{batch.readers} readers cannot be shared evenly by {groups}; use one of {fitting}, or more readers",
            )
        )
    if errors:
        raise UserError.from_list(errors)
    return Workload(
        processes, context, batch.readers // groups, batch.lanes, batch.lanes * batch.chunk // context
    )


def assumed_precision(recipe: Recipe) -> str:
    """The recipe's, or what auto takes on a GPU with bf16 units."""
    return "bf16" if recipe.train.precision == "auto" else recipe.train.precision


def widths(precision: str) -> tuple[int, int]:
    """Bytes of a weight (and of the residual stream), and of what matrix products take and give."""
    return {"fp32": (4, 4), "bf16": (4, 2), "fp64": (8, 8)}[precision]


def activation_bytes(model: Model, precision: str, recompute: str) -> int:
    """What a block keeps of a token for its backward pass: models/recompute.py, for any block and precision."""
    from ..models.cell_spec import FUSED_CELLS

    w, c = widths(precision)
    has_mlp, has_conv, gate = model.intermediate > 0, model.kernel > 1, int(model.gated_mlp)
    H, R, intermediate = model.hidden, model.recurrent, model.intermediate
    fused = model.cell in FUSED_CELLS and precision != "fp64"
    # Results of the projections, and of the scan: h, and y, unless h is what goes on; composed, y is computed again.
    scanned = c * (model.projections + 1 + (model.output_gate and fused)) * R
    if recompute == "full":
        return w * H
    if recompute == "selective":
        return w * H + scanned + c * (H * (1 + has_mlp) + (1 + gate) * intermediate)
    if not fused:
        scanned = composed_cell_bytes(model, precision) * R
    kept = w * H * (1 + has_mlp) + scanned + c * (H * (1 + has_conv + has_mlp) + (2 + gate) * intermediate)
    # No fp64 kernels: a norm also keeps what its gain multiplies, a convolution its padded input, a gate its activation.
    return kept + (c * (H * (1 + has_conv + has_mlp) + gate * intermediate) if precision == "fp64" else 0)


def composed_cell_bytes(model: Model, precision: str) -> int:
    """What a cell that is composed of its parts (models/cell_scan.py) keeps of a token and channel, its output included."""
    (state, c), is_lstm = widths(precision), model.cell.startswith("minlstm")
    is_wide = c == state  # projections are not widened, so what is kept of them is a view of all of them
    gates = state * (
        2 + 2 * is_lstm + model.cell.endswith("_signed")
    )  # a, 1 - a; inputs of two softplus; a stretched to (-1, 1)
    widened = 0 if is_wide else state
    candidate = {"none": widened, "tanh": state, "silu": state + widened, "g": 1 + 2 * state}[
        model.activation
    ]
    keeps_projections = model.output_gate or (is_wide and model.activation in ("none", "silu"))
    return gates + candidate + c * (model.projections * keeps_projections + 1 + 2 * model.output_gate)


def working_memory(model: Model, workload: Workload, precision: str) -> dict[str, float]:
    """Bytes that do not depend on the engine, by what they are for."""
    from ..models.loss import BLOCK_ELEMENTS

    w, c = widths(precision)
    block = min(BLOCK_ELEMENTS // model.vocab * model.vocab, workload.tokens * model.vocab)
    head = model.vocab * model.hidden
    state = model.recurrent * w + (model.kernel - 1) * model.hidden * c
    return {
        "bf16 copies": c * model.matrices if c < w else 0,
        "loss": (w + c) * block
        + (w + c + (c if c < w else 0)) * head
        + (w + 2 * c) * workload.tokens * model.hidden,
        "carried states": workload.readers * workload.lanes * model.layers * state,
    }


def activations(model: Model, workload: Workload, precision: str, recompute: str) -> int:
    """Bytes kept by all blocks, and by one that is being computed again."""
    kept = activation_bytes(model, precision, recompute)
    again = activation_bytes(model, precision, "none") - kept
    return workload.tokens * (model.layers * kept + again)


def engine_memory(num_parameters: int, processes: int, precision: str, engine: str) -> dict[str, float]:
    """Bytes of a process for weights, gradients, moments, DeepSpeed's own copy and buffers (the table above)."""
    whole = widths(precision)[0] * num_parameters
    share = whole / processes
    element = widths(precision)[0]
    stage3 = element * (BUCKET + min(num_parameters, MAX_LIVE))
    weights, gradients, moments, own, buffers = {
        "DDP": (whole, whole, 2 * whole, 0, whole if processes > 1 else 0),
        "ZeRO-1": (whole, whole, 2 * share, share, element * min(num_parameters, BUCKET)),
        "ZeRO-2": (whole, share, 2 * share, share, element * BUCKET),
        "ZeRO-3": (share, share, 2 * share, share, stage3),
        "ZeRO-3 + offload": (0, share, 0, 0, stage3),
    }[engine]
    return {
        "weights": weights,
        "gradients": gradients,
        "moments": moments,
        "own copy": own,
        "buffers": buffers,
    }


def bytes_sent(num_parameters: int, workload: Workload, precision: str, engine: str) -> float:
    """Bytes that a process sends in a step; the states that pass between the pieces of a chunk are not worth counting."""
    ring = widths(precision)[0] * num_parameters * (workload.processes - 1) / workload.processes
    return ring * {"DDP": 2, "ZeRO-1": 2, "ZeRO-2": workload.readers + 1}.get(engine, 3 * workload.readers)


def parse_memory(text: str) -> float:
    """`80GB` or `80GiB` in bytes.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", text)
    size = float(match[1]) * {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}[match[2]] if match else 0.0
    if size <= 0:
        raise UserError("--gpu-memory", f"{text!r} is not a size such as 80GB or 141GiB")
    return size


def heading(recipe: Recipe, model: Model, workload: Workload) -> list[str]:
    """Parameters, tokens and FLOPs, a line each."""
    batch, steps = recipe.batch, recipe.train.steps
    per_step = batch.readers * batch.lanes * batch.chunk
    tokens, flops = per_step * steps, flops_per_token(model)
    shared = f", {workload.context} to a chunk" if workload.context > 1 else ""
    return [
        f"parameters  {model.parameters:,}: "
        + ", ".join(f"{part} {count:,}" for part, count in model.parts.items()),
        f"tokens      {per_step:,} a step ({batch.readers} readers x {batch.lanes} lanes x {batch.chunk}), {steps:,} steps: "
        f"{tokens / 1e9:.3g}B, {tokens / model.parameters:.1f} per parameter",
        f"FLOPs       {flops:.3g} a token (6 per parameter), {flops * tokens:.3g} in all",
        f"a process   {workload.readers} micro batches of {workload.tokens:,} tokens a step; {workload.processes} processes{shared}; "
        f"{assumed_precision(recipe)}{' (train.precision auto, on a GPU)' if recipe.train.precision == 'auto' else ''}",
    ]


def flops_per_token(model: Model) -> int:
    """Training FLOPs of a token; a table that is only looked up costs none."""
    from ..pipeline.machine import training_flops_per_token

    return training_flops_per_token(model.parameters - (0 if model.tied else model.vocab * model.hidden))


def memory_table(model: Model, workload: Workload, precision: str, memory: float) -> list[str]:
    """Memory per process for each engine and recomputation; what fits is marked."""
    from ..models.recompute import RECOMPUTE

    common = working_memory(model, workload, precision)
    kept = {recompute: activations(model, workload, precision, recompute) for recompute in RECOMPUTE}
    columns = ("weights", "gradients", "moments", "own copy", "buffers")
    said = [f"{name} {size / 1e9:.2f}" for name, size in common.items()]
    said.append(
        "activations " + ", ".join(f"{size / 1e9:.2f} ({recompute})" for recompute, size in kept.items())
    )
    width = max(map(len, ENGINES))
    lines = [
        f"GB per process, with any engine: {'; '.join(said)}",
        "",
        "GB".ljust(width)
        + "".join(f"{name:>11}" for name in columns)
        + "".join(f"{name:>12}" for name in RECOMPUTE)
        + f"{'sent':>10}",
    ]
    for engine in ENGINES:
        states = engine_memory(model.parameters, workload.processes, precision, engine)
        totals = [sum(states.values()) + sum(common.values()) + kept[recompute] for recompute in RECOMPUTE]
        cells = [f"{size / 1e9:>9.1f} {'*' if size <= USABLE * memory else ' '} " for size in totals]
        sent = bytes_sent(model.parameters, workload, precision, engine) / 1e9
        lines.append(
            engine.ljust(width)
            + "".join(f"{states[name] / 1e9:>11.2f}" for name in columns)
            + "".join(cells)
            + f"{sent:>10.2f}"
        )
    lines.append(
        f"none, selective, full: in all, by train.recompute. * fits in {USABLE:.0%} of {memory / 1e9:.0f} GB. sent: per step."
    )
    return lines


def time_line(recipe: Recipe, model: Model, workload: Workload, tflops: float, fraction: float) -> str:
    """Seconds per step and days in all, at a given rate."""
    batch = recipe.batch
    again = 4 / 3 if recipe.train.recompute == "full" else 1.0  # the forward products twice
    work = flops_per_token(model) * again * batch.readers * batch.lanes * batch.chunk
    seconds = work / (workload.processes * tflops * 1e12 * fraction)
    rate = f"{fraction:.0%} of {tflops:g} TFLOP/s in each process (an assumption)"
    return f"time        {seconds:.3g} s a step, {seconds * recipe.train.steps / 86400:.3g} days in all, at {rate}"


def _parser() -> argparse.ArgumentParser:
    epilog = "example:\n  minrnn plan --config fineweb-1b --processes 16 --gpu-memory 80GB --tflops 989"
    parser = argparse.ArgumentParser(
        "minrnn plan",
        description=DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="RECIPE", help="a YAML file, or the name of a recipe that comes with minrnn"
    )
    parser.add_argument(
        "--processes", type=int, default=8, help="GPUs of all machines together (default: %(default)s)"
    )
    parser.add_argument(
        "--context",
        metavar="N",
        help="processes that share a chunk along time: short for --parallel.context N",
    )
    parser.add_argument("--gpu-memory", default="80GB", help="of one device (default: %(default)s)")
    parser.add_argument(
        "--tflops",
        type=float,
        help="a device's matrix-product rate in TFLOP/s; the time is told only if this is given",
    )
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.4,
        help="share of --tflops that training reaches (default: %(default)s)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="rows of the embedding (default: as data.tokenizer says, which may be fetched)",
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
        UserError: everything that is wrong with the options or the recipe.
    """
    from ..data import model_vocab_size, run_tokenizer
    from ..pipeline.recipe import read_recipe

    arguments, overrides = _parser().parse_known_args(argv)
    named = {"--config": arguments.config, "--parallel.context": arguments.context}
    recipe = read_recipe(
        [
            *overrides,
            *(word for option, value in named.items() if value is not None for word in (option, value)),
        ]
    )
    _check(arguments)
    workload = workload_of(recipe, arguments.processes)
    precision, data = assumed_precision(recipe), recipe.data
    vocab_size = arguments.vocab_size or model_vocab_size(
        run_tokenizer(data.corpus, data.tokenizer, data.task, data.trust_remote_code)
    )
    model = measure(recipe, vocab_size)
    lines = heading(recipe, model, workload)
    if arguments.tflops is not None:
        lines.append(time_line(recipe, model, workload, arguments.tflops, arguments.fraction))
    print(
        "\n".join([*lines, "", *memory_table(model, workload, precision, parse_memory(arguments.gpu_memory))])
    )
