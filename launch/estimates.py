"""Estimates of a run's memory, FLOPs and traffic, from its recipe. Nothing is allocated.

Memory of a process, in bytes (N parameters, P processes that share the engine's states, w = 4; 8 in fp64):

                 weights   gradients   moments    own copy   buffers
    DDP          w N       w N         w S        -          w N             buckets of gradients to send
    ZeRO-1       w N       w N         w S / P    w N / P    w min(N, 5e8)   a bucket of gradients
    ZeRO-2       w N       w N / P     w S / P    w N / P    w 5e8
    ZeRO-3       w N / P   w N / P     w S / P    w N / P    w 5e8 + w min(N, 1e9)   and gathered weights
    + offload    -         w N / P     -          -          as ZeRO-3       the others are in main memory

S is 2 N with AdamW: with weights and gradients, the 16 bytes per parameter of fp32 training. With Muon, which
has one number for each of the M elements of its matrices, S is 2 N - M. What an update itself needs is not
counted, since activations are free then: with Muon, up to 2 M numbers. The own copy is the one that DeepSpeed
updates. The sizes of buckets are DeepSpeed's defaults. All engines also need autocast's copies of the
matrices, activations (activation_memory.py), the loss (models/loss.py) and the carried states.

Sent per process and step, with ring algorithms and k micro batches per process, in units of (P - 1) / P: DDP
and ZeRO-1 2 w N, ZeRO-2 (k + 1) w N, ZeRO-3 3 k w N; with Muon, ZeRO sends M elements more, in the precision
of the run. With K = batch.backprop_chunks, k is K times as large; all but the last chunk are computed forward
twice, for which ZeRO-3 gathers the weights once more; and the states
before K - 1 chunks and the gradient of one are kept.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from ..common.errors import UserError
from ..data import LabelledTask
from ..pipeline.config import Recipe
from ..pipeline.launch_checks import layout_errors
from .activation_memory import TOKENS, block_bytes

BUCKET, MAX_LIVE = 5e8, 1e9  # elements: reduce_bucket_size, stage3_max_live_parameters


Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Model:
    """Sizes of a model."""

    config: Any
    """The MinRNNConfig."""
    parts: dict[str, int]
    """Number of parameters of each part."""
    matrices: int
    """Number of parameters that autocast copies: the matrices of the blocks."""
    muon: Shapes = ()
    """Projections that Muon updates; none with AdamW."""

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
    """Readers of a process."""
    chunks: int
    """Consecutive chunks that a step reads from each reader."""
    lanes: int
    """Of a reader."""
    micro_batches: int
    """Of a process in a step: one for each reader's chunk, or more with train.micro_lanes."""
    tokens: int
    """Tokens of a micro batch in one process."""
    carries_state: bool

    @property
    def micro_lanes(self) -> int:
        """Lanes of a micro batch."""
        return self.readers * self.chunks * self.lanes // self.micro_batches


def batch_shape(recipe: Recipe) -> str:
    """The rows and tokens of a step, e.g. "64 readers x 4 lanes x 4096"."""
    batch = recipe.batch
    chunks = f" x {batch.backprop_chunks} chunks" if batch.backprop_chunks > 1 else ""
    return f"{batch.readers} readers x {batch.lanes} lanes x {batch.chunk}{chunks}"


PARTS = {".mixer.": "mixers", ".mlp.": "MLPs", "norm": "norms", "residual_scales": "norms"}
"""Of the model, by what is in the names of their parameters; all others are embedding and head."""


def measure(recipe: Recipe, vocab_size: int) -> Model:
    """The sizes of the recipe's model, counted on the meta device."""
    import torch
    from torch import nn

    from ..models import MinRNNConfig
    from ..pipeline.classification import classifier_fields, new_model
    from ..pipeline.families.registry import OURS

    head = classifier_fields(recipe.data.corpus, recipe.data.task)
    config = MinRNNConfig(**recipe.resolved_model_fields(), **head, vocab_size=vocab_size)
    with torch.device("meta"):
        model: Any = new_model(OURS, config)
    parts: dict[str, int] = dict.fromkeys(("embedding and head", "mixers", "MLPs", "norms"), 0)
    for name, parameter in model.named_parameters():
        part = next(
            (part for key, part in PARTS.items() if key in name),
            "embedding and head",
        )
        parts[part] += parameter.numel()
    layers = model.model.layers.modules()
    return Model(
        config=config,
        parts={part: count for part, count in parts.items() if count},
        matrices=sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear)),
        muon=muon_shapes(recipe, model),
    )


def muon_shapes(recipe: Recipe, model: Any) -> Shapes:
    """Shapes of the projections that Muon updates, of a model on any device; none with AdamW."""
    from ..pipeline.matrices import block_matrices

    if recipe.optim.name != "muon":
        return ()
    parameters, matrices = dict(model.named_parameters()), block_matrices(model)
    return tuple((rows, parameters[name].shape[1]) for name, widths in matrices.items() for rows in widths)


def num_moments(num_parameters: int, muon: Shapes) -> int:
    """Numbers of the optimizer's state: one for each element of Muon's projections, two for the others."""
    return 2 * num_parameters - sum(rows * columns for rows, columns in muon)


def num_texts(recipe: Recipe) -> int:
    """Texts of a lane: two for pairs (Retrieval), else one. Each has at most `batch.chunk` tokens."""
    task = recipe.task()
    return task.TOWERS if isinstance(task, LabelledTask) else 1


def workload_of(recipe: Recipe, processes: int) -> Workload:
    """Divide a step's readers and chunks among processes.

    Raises:
        UserError: they do not divide evenly.
    """
    if errors := layout_errors(recipe, processes):
        raise UserError.from_list(errors)
    batch, context = recipe.batch, recipe.parallel.context
    groups = processes // context
    micro_lanes = recipe.train.micro_lanes or batch.lanes
    return Workload(
        processes=processes,
        context=context,
        readers=batch.readers // groups,
        chunks=batch.backprop_chunks,
        lanes=batch.lanes,
        micro_batches=batch.readers // groups * batch.backprop_chunks * (batch.lanes // micro_lanes),
        tokens=micro_lanes * num_texts(recipe) * batch.chunk // context,
        carries_state=batch.carry_state,
    )


def assumed_precision(recipe: Recipe) -> str:
    """The recipe's precision; for auto, bf16, as on a GPU that supports it."""
    return "bf16" if recipe.train.precision == "auto" else recipe.train.precision


def widths(precision: str) -> tuple[int, int]:
    """Bytes per element of the weights (and the residual stream), and of the operands of matrix products."""
    return {"fp32": (4, 4), "bf16": (4, 2), "fp64": (8, 8)}[precision]


def working_memory(model: Model, workload: Workload, precision: str) -> dict[str, float]:
    """Bytes that do not depend on the engine, by purpose."""
    w, c = widths(precision)
    shapes = model.config.state_shapes(batch=1)
    state = sum(w * math.prod(recurrent or (0,)) + c * math.prod(tail or (0,)) for recurrent, tail in shapes)
    of_chunks = workload.chunks if workload.chunks > 1 else 0
    num_lanes = workload.readers * workload.lanes + of_chunks * workload.micro_lanes
    return {
        "bf16 copies": c * model.matrices if c < w else 0,
        "loss": _loss_memory(model, workload, precision),
        "carried states": num_lanes * state if workload.carries_state else 0,
    }


def _loss_memory(model: Model, workload: Workload, precision: str) -> float:
    from ..models.loss import BLOCK_ELEMENTS

    (w, c), config = widths(precision), model.config
    vocab, hidden = config.vocab_size, config.hidden_size
    if is_classifier(model):  # the hidden states that are pooled, and their gradient; logits are few
        return 2 * w * workload.tokens * hidden
    block = min(BLOCK_ELEMENTS // vocab * vocab, workload.tokens * vocab)
    head = vocab * hidden
    return (w + c) * block + (w + c + (c if c < w else 0)) * head + (w + 2 * c) * workload.tokens * hidden


def by_micro_lanes(model: Model, workload: Workload, precision: str, kept: float) -> dict[int, float]:
    """Bytes of activations and loss by `train.micro_lanes`: all lanes of a reader, a half of them, and so on.

    Args:
        kept: bytes of the activations of the workload's micro batch.
    """
    per_lane = workload.tokens // workload.micro_lanes
    sizes, lanes = {}, workload.lanes
    while True:
        part = replace(workload, tokens=per_lane * lanes)
        sizes[lanes] = kept * part.tokens / workload.tokens + _loss_memory(model, part, precision)
        if lanes % 2:
            return sizes
        lanes //= 2


def activations(model: Model, workload: Workload, precision: str, recompute: str) -> float:
    """Bytes kept by all blocks, plus those of one block that is computed again."""
    from ..models.attention import WindowAttention
    from ..models.registry import mixer_classes

    mixers = mixer_classes(model.config)
    length = workload.tokens // workload.micro_lanes
    by_mixer = {}
    for mixer in set(mixers):
        tokens = length if mixer is WindowAttention else TOKENS
        by_mixer[mixer] = block_bytes(model.config, precision, mixers.index(mixer), tokens)
    blocks = [by_mixer[mixer] for mixer in mixers]
    # What the block that is computed again keeps meanwhile.
    largest = max(sizes["none"] - sizes[recompute] for sizes in blocks)
    return workload.tokens * (sum(sizes[recompute] for sizes in blocks) + largest)


def engine_memory(
    num_parameters: int, processes: int, precision: str, engine: str, muon: Shapes = ()
) -> dict[str, float]:
    """Bytes of a process for weights, gradients, moments, DeepSpeed's own copy and buffers (the table
    above)."""
    element = widths(precision)[0]
    full, state = element * num_parameters, element * num_moments(num_parameters, muon)
    shard, state_shard = full / processes, state / processes
    stage3 = element * (BUCKET + min(num_parameters, MAX_LIVE))
    weights, gradients, moments, own, buffers = {
        "DDP": (full, full, state, 0, full if processes > 1 else 0),
        "ZeRO-1": (full, full, state_shard, shard, element * min(num_parameters, BUCKET)),
        "ZeRO-2": (full, shard, state_shard, shard, element * BUCKET),
        "ZeRO-3": (shard, shard, state_shard, shard, stage3),
        "ZeRO-3 + offload": (0, shard, 0, 0, stage3),
    }[engine]
    return {
        "weights": weights,
        "gradients": gradients,
        "moments": moments,
        "own copy": own,
        "buffers": buffers,
    }


def bytes_sent(
    num_parameters: int, workload: Workload, precision: str, engine: str, muon: Shapes = ()
) -> float:
    """Bytes that a process sends per step. The states passed between the pieces of a chunk are negligible."""
    (w, c), share = widths(precision), (workload.processes - 1) / workload.processes
    batches = workload.micro_batches
    repeated = batches - batches // workload.chunks  # forward passes without gradients
    times = {"DDP": 2, "ZeRO-1": 2, "ZeRO-2": batches + 1}.get(engine, 3 * batches + repeated)
    gathered = 0 if engine == "DDP" else c * sum(rows * columns for rows, columns in muon)
    return share * (w * num_parameters * times + gathered)


def is_classifier(model: Model) -> bool:
    """Whether the model gives each row a label, and so has no logits over the vocabulary."""
    return model.config.problem_type is not None
