"""The matrices behind the flat shards of ZeRO.

ZeRO 1 and 2 lay the parameters of a group end to end and cut the result into one shard for each process, so a
matrix lies in one shard or in several neighbours. ZeRO 3 cuts each parameter into one piece for each process.
An optimizer that needs whole matrices gathers the shards of all processes, computes the matrices of which
this process holds a piece, and keeps its pieces.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .matrices import Widths
from .processes import all_gather_objects


class Piece(NamedTuple):
    """Consecutive elements of a matrix in a shard."""

    start: int
    """In the flattened matrix."""
    offset: int
    """In the shard."""
    size: int


@dataclass(frozen=True)
class Shard:
    """What a flat shard of this process, and its neighbours, consist of."""

    rank: int
    pieces: list[dict[str, Piece]]
    """For each process, the pieces in its shard by the names of the matrices."""
    shapes: dict[str, torch.Size]
    widths: dict[str, Widths]
    device: torch.device
    """Where matrices are gathered: a shard may lie in main memory."""

    def gather(self, local: Tensor) -> dict[str, Tensor]:
        """The matrices that this shard holds a piece of, from a tensor over the elements of each process's
        shard. Collective."""
        local = local.to(self.device)
        gathered = local.new_empty(len(self.pieces) * len(local))
        torch.distributed.all_gather_into_tensor(gathered, local)
        shards = gathered.view(len(self.pieces), -1)
        matrices = {}
        for name in self.pieces[self.rank]:
            matrix = local.new_empty(self.shapes[name].numel())
            for shard, pieces in zip(shards, self.pieces, strict=True):
                if name in pieces:
                    start, offset, size = pieces[name]
                    matrix[start : start + size] = shard[offset : offset + size]
            matrices[name] = matrix.view(self.shapes[name])
        return matrices

    def flatten(self, matrices: dict[str, Tensor], like: Tensor) -> Tensor:
        """This process's pieces of the matrices in the places of its shard; zeros elsewhere (padding)."""
        flat = torch.zeros_like(like)
        for name, (start, offset, size) in self.pieces[self.rank].items():
            flat[offset : offset + size] = matrices[name].reshape(-1)[start : start + size]
        return flat


def zero_shards(
    optimizer: Any,
    stage: int,
    parameters: dict[str, nn.Parameter],
    widths: dict[str, Widths],
    accelerator: Accelerator,
) -> dict[Tensor, Shard]:
    """The shards that hold matrices. Collective.

    Args:
        optimizer: DeepSpeed's, of ZeRO 1 to 3.
        parameters: all of the model's.
        widths: of the matrices.
    """
    matrices, rank = {name: parameters[name] for name in widths}, accelerator.process_index
    local = _local_pieces_3(optimizer, matrices, rank) if stage == 3 else _local_pieces(matrices)
    of_processes = all_gather_objects(accelerator, [local])
    flat = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    shards = {}
    for group in sorted({group for groups in of_processes for group in groups}):
        of_group = [groups.get(group, {}) for groups in of_processes]
        names = {name for pieces in of_group for name in pieces}
        shapes = {name: getattr(parameters[name], "ds_shape", parameters[name].shape) for name in names}
        shards[flat[group]] = Shard(
            rank,
            of_group,
            shapes,
            {name: widths[name] for name in names},
            accelerator.device,
        )
    return shards


Groups = dict[int, dict[str, Piece]]  # by the index of the flat shard


def _local_pieces(parameters: dict[str, Any]) -> Groups:
    """The pieces of ZeRO 1 and 2 (DeepSpeed 0.19: tensor_fragment.py)."""
    groups: Groups = {}
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is not None:
            part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            pieces = groups.setdefault(mapping.param_group_index, {})
            pieces[name] = Piece(part.start, place.start, part.numel)
    return groups


def _local_pieces_3(optimizer: Any, parameters: dict[str, Any], rank: int) -> Groups:
    """The pieces of ZeRO 3 (DeepSpeed 0.19: stage3.py, set_grad_positions). The last may be padded."""
    groups: Groups = {}
    for name, parameter in parameters.items():
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, numel = rank * size, parameter.ds_numel
        if start < numel:
            groups.setdefault(group, {})[name] = Piece(start, offset, min(size, numel - start))
    return groups
