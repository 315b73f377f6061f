"""Which box of each logical parameter a rank holds, and which rank writes it to a checkpoint."""

from dataclasses import dataclass

from torch import nn

from gptmoe.checkpoint.boxes import Box, Piece
from gptmoe.model.experts import Experts
from gptmoe.model.transformer import GPT

from .layout import Layout


@dataclass(frozen=True, slots=True)
class Owned:
    """This rank's part of one logical parameter."""

    name: str
    parameter: nn.Parameter
    full_shape: tuple[int, ...]
    box: Box
    is_expert: bool
    writes: bool
    """True on exactly one of the ranks that hold this box."""


def owned_parameters(model: GPT, layout: Layout, rank: int) -> list[Owned]:
    """This rank's parameters in model order. Copies are written by different ranks in turn."""
    experts = {
        name: module for name, module in model.named_modules() if isinstance(module, Experts)
    }
    owned = []
    for index, (name, parameter) in enumerate(model.named_parameters()):
        shape = tuple(parameter.shape)
        shard = experts.get(name.rpartition(".")[0])
        if shard is None:
            box, full = Box((0,) * len(shape), shape), shape
            writes = index % layout.world == rank
        else:
            split = shard.count * layout.ep, *shape[1:]
            box, full = Box((shard.first,) + (0,) * (len(shape) - 1), shape), split
            writes = index % (layout.world // layout.ep) == rank // layout.ep
        owned.append(Owned(name, parameter, full, box, shard is not None, writes))
    return owned


def weight_pieces(owned: list[Owned]) -> list[Piece]:
    """The weights that this rank writes."""
    return [Piece(o.name, o.full_shape, o.box, o.parameter.detach()) for o in owned if o.writes]
