"""Estimates of a run's memory, FLOPs and traffic, from its recipe. Nothing is allocated.

Memory of a process, in bytes (N parameters, P processes that share the engine's states, w = 4; 8 in fp64):

                 weights   gradients   two moments   own copy   buffers
    DDP          w N       w N         2 w N         -          w N             buckets of gradients to send
    ZeRO-1       w N       w N         2 w N / P     w N / P    w min(N, 5e8)   a bucket of gradients
    ZeRO-2       w N       w N / P     2 w N / P     w N / P    w 5e8
    ZeRO-3       w N / P   w N / P     2 w N / P     w N / P    w 5e8 + w min(N, 1e9)   and gathered weights
    + offload    -         w N / P     -             -          as ZeRO-3       the others are in main memory

w N four times is the 16 bytes per parameter of fp32 training with AdamW. The own copy is the one that
DeepSpeed updates. The sizes of buckets are DeepSpeed's defaults. All engines also need autocast's copies of
the matrices, activations (models/recompute.py), the loss (models/loss.py) and the carried states.

Sent per process and step, with ring algorithms and k readers per process, in units of w N (P - 1) / P: DDP
and ZeRO-1 2, ZeRO-2 k + 1, ZeRO-3 3 k.
"""

from dataclasses import dataclass
from typing import Any

from ..common.errors import UserError
from ..pipeline.config import Recipe
from ..pipeline.launch_checks import layout_errors

BUCKET, MAX_LIVE = 5e8, 1e9  # elements: reduce_bucket_size, stage3_max_live_parameters


@dataclass(frozen=True)
class Model:
    """Sizes of a model."""

    parts: dict[str, int]
    """Number of parameters of each part."""
    matrices: int
    """Number of parameters that autocast copies: the matrices of the blocks."""
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
    """The share of one process in a step."""

    processes: int
    context: int
    """Processes that share a reader's chunk along time."""
    readers: int
    """Readers of a process, so micro batches per step."""
    lanes: int
    tokens: int
    """Tokens of a micro batch in one process."""


def measure(recipe: Recipe, vocab_size: int) -> Model:
    """The sizes of the recipe's model, counted on the meta device."""
    import torch
    from torch import nn

    from ..models import MinRNNConfig, MinRNNForCausalLM

    config = MinRNNConfig(**recipe.resolved_model_fields(), vocab_size=vocab_size)
    with torch.device("meta"):
        model = MinRNNForCausalLM(config)
    in_proj: Any = model.model.layers[0].get_submodule("mixer.in_proj")
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
        projections=len(in_proj.weight) // config.recurrent_size,
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
    """Divide a step's readers and chunks among processes.

    Raises:
        UserError: they do not divide evenly.
    """
    if errors := layout_errors(recipe, processes):
        raise UserError.from_list(errors)
    batch, context = recipe.batch, recipe.parallel.context
    groups = processes // context
    return Workload(
        processes=processes,
        context=context,
        readers=batch.readers // groups,
        lanes=batch.lanes,
        tokens=batch.lanes * batch.chunk // context,
    )


def assumed_precision(recipe: Recipe) -> str:
    """The recipe's precision; for auto, bf16, as on a GPU that supports it."""
    return "bf16" if recipe.train.precision == "auto" else recipe.train.precision


def widths(precision: str) -> tuple[int, int]:
    """Bytes per element of the weights (and the residual stream), and of the operands of matrix products."""
    return {"fp32": (4, 4), "bf16": (4, 2), "fp64": (8, 8)}[precision]


def activation_bytes(model: Model, precision: str, recompute: str) -> int:
    """Bytes per token that a block keeps for its backward pass: models/recompute.py, for any block and
    precision."""
    from ..models.cell_spec import FUSED_CELLS

    w, c = widths(precision)
    has_mlp, has_conv, gate = model.intermediate > 0, model.kernel > 1, int(model.gated_mlp)
    H, R, intermediate = model.hidden, model.recurrent, model.intermediate
    fused = model.cell in FUSED_CELLS and precision != "fp64"
    # Results of the projections and of the scan: h, and y if there is an output gate. The composed cell
    # computes y again.
    scanned = c * (model.projections + 1 + (model.output_gate and fused)) * R
    if recompute == "full":
        return w * H
    if recompute == "selective":
        return w * H + scanned + c * (H * (1 + has_mlp) + (1 + gate) * intermediate)
    if not fused:
        scanned = composed_cell_bytes(model, precision) * R
    kept = w * H * (1 + has_mlp) + scanned + c * (H * (1 + has_conv + has_mlp) + (2 + gate) * intermediate)
    # There are no fp64 kernels: a norm also keeps its normalized input, a convolution its padded input, a
    # gate its activation.
    return kept + (c * (H * (1 + has_conv + has_mlp) + gate * intermediate) if precision == "fp64" else 0)


def composed_cell_bytes(model: Model, precision: str) -> int:
    """Bytes per token and channel that a composed cell (models/cell_scan.py) keeps, its output included."""
    (state, c), is_lstm = widths(precision), model.cell.startswith("minlstm")
    is_wide = c == state  # projections are not converted to fp32, so views of them are kept
    # a, 1 - a; the inputs of two softplus; a stretched to (-1, 1)
    gates = state * (2 + 2 * is_lstm + model.cell.endswith("_signed"))
    widened = 0 if is_wide else state
    candidate = {"none": widened, "tanh": state, "silu": state + widened, "g": 1 + 2 * state}[
        model.activation
    ]
    keeps_projections = model.output_gate or (is_wide and model.activation in ("none", "silu"))
    return gates + candidate + c * (model.projections * keeps_projections + 1 + 2 * model.output_gate)


def working_memory(model: Model, workload: Workload, precision: str) -> dict[str, float]:
    """Bytes that do not depend on the engine, by purpose."""
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
    """Bytes kept by all blocks, plus those of one block that is computed again."""
    kept = activation_bytes(model, precision, recompute)
    again = activation_bytes(model, precision, "none") - kept
    return workload.tokens * (model.layers * kept + again)


def engine_memory(num_parameters: int, processes: int, precision: str, engine: str) -> dict[str, float]:
    """Bytes of a process for weights, gradients, moments, DeepSpeed's own copy and buffers (the table
    above)."""
    element = widths(precision)[0]
    full = element * num_parameters
    shard = full / processes
    stage3 = element * (BUCKET + min(num_parameters, MAX_LIVE))
    weights, gradients, moments, own, buffers = {
        "DDP": (full, full, 2 * full, 0, full if processes > 1 else 0),
        "ZeRO-1": (full, full, 2 * shard, shard, element * min(num_parameters, BUCKET)),
        "ZeRO-2": (full, shard, 2 * shard, shard, element * BUCKET),
        "ZeRO-3": (shard, shard, 2 * shard, shard, stage3),
        "ZeRO-3 + offload": (0, shard, 0, 0, stage3),
    }[engine]
    return {
        "weights": weights,
        "gradients": gradients,
        "moments": moments,
        "own copy": own,
        "buffers": buffers,
    }


def bytes_sent(num_parameters: int, workload: Workload, precision: str, engine: str) -> float:
    """Bytes that a process sends per step. The states passed between the pieces of a chunk are negligible."""
    ring = widths(precision)[0] * num_parameters * (workload.processes - 1) / workload.processes
    return ring * {"DDP": 2, "ZeRO-1": 2, "ZeRO-2": workload.readers + 1}.get(engine, 3 * workload.readers)


def flops_per_token(model: Model) -> int:
    """Training FLOPs per token. An embedding that is not tied costs none, as it is only a lookup."""
    from ..pipeline.machine import training_flops_per_token

    return training_flops_per_token(model.parameters - (0 if model.tied else model.vocab * model.hidden))
