"""`minrnn plan` for other families: parameters, FLOPs, and the memory of the engines' states.

Their activations and losses are not known here, so no engine is said to fit.
"""

from dataclasses import dataclass

from ..pipeline.config import Recipe
from .estimates import Shapes, Workload, bytes_sent, engine_memory, muon_shapes

NOT_KNOWN = "not known for this family: memory of activations, loss and autocast"


@dataclass(frozen=True)
class FamilySize:
    """Parameters of a family's model."""

    parts: dict[str, int]
    """Number of parameters of each part."""
    looked_up: int
    """Parameters of an embedding that is not the head, too: they cost no FLOPs."""
    muon: Shapes = ()
    """As in `estimates.Model`."""

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())


def measure_family(recipe: Recipe, vocab_size: int) -> FamilySize:
    """The size of the recipe's model, counted on the meta device.

    Raises:
        UserError: the model cannot be built.
    """
    import torch
    from torch import nn

    from ..pipeline.families.build import NO_SPECIAL_TOKENS, build_causal_lm, faults_named, num_parameters
    from ..pipeline.families.registry import config_of

    name, fields = recipe.model.family, {**recipe.resolved_model_fields(), "vocab_size": vocab_size}
    config = config_of(name, {**fields, **NO_SPECIAL_TOKENS})
    given, setting_of = recipe.given_model_fields(), recipe.model.setting_of
    with torch.device("meta"), faults_named(name, fields, given, setting_of):
        model = build_causal_lm(name, config)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    outer = {*embeddings, *(head.parameters() if isinstance(head, nn.Module) else ())}
    number = sum(parameter.numel() for parameter in outer)
    looked_up = sum(weight.numel() for weight in embeddings if head is None or weight is not head.weight)
    parts = {"embeddings and head": number, "layers": num_parameters(model) - number}
    return FamilySize(parts, looked_up, muon_shapes(recipe, model))


def family_memory_table(
    size: FamilySize, workload: Workload, precision: str, engines: tuple[str, ...]
) -> list[str]:
    """Memory of the states per process for each engine, and what it sends."""
    columns, width = ("weights", "gradients", "moments", "own copy", "buffers"), max(map(len, engines))
    lines = [
        NOT_KNOWN,
        "",
        "GB".ljust(width) + "".join(f"{name:>11}" for name in (*columns, "in all", "sent")),
    ]
    for engine in engines:
        states = engine_memory(size.parameters, workload.processes, precision, engine, size.muon)
        sent = bytes_sent(size.parameters, workload, precision, engine, size.muon)
        values = [*(states[name] for name in columns), sum(states.values()), sent]
        lines.append(engine.ljust(width) + "".join(f"{value / 1e9:>11.2f}" for value in values))
    return lines
