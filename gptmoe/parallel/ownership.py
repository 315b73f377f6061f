"""Which boxes of each logical parameter a rank holds, and which rank speaks for them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptmoe.checkpoint.boxes import Box, Piece
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT

from .cuts import Cut, cut
from .layout import Layout


@dataclass(frozen=True, slots=True)
class Owned:
    """This rank's part of one logical parameter."""

    name: str
    parameter: nn.Parameter
    full_shape: tuple[int, ...]
    cut: Cut
    writes: bool
    """True on exactly one of the ranks that hold these boxes: it writes them to a checkpoint and
    counts them in the norm. Copies are spoken for by different ranks in turn."""

    def parts(self, values: Tensor) -> list[tuple[Box, Tensor]]:
        """A tensor shaped like the parameter as the values of each box (views)."""
        rows = [box.shape[0] for box in self.cut.boxes]
        return list(zip(self.cut.boxes, values.split(rows), strict=True))

    def pieces(self, name: str, values: Tensor) -> list[Piece]:
        """A tensor shaped like the parameter as pieces of the logical tensor `name`."""
        return [Piece(name, self.full_shape, box, part) for box, part in self.parts(values)]


def owned_parameters(model: GPT, layout: Layout, rank: int) -> list[Owned]:
    """This rank's parameters in model order."""
    shapes = logical_shapes(model.spec)
    owned = []
    for index, (name, parameter) in enumerate(model.named_parameters()):
        held = cut(name, shapes[name], layout, rank, model.spec.num_layers)
        writes = held.is_first_copy and index % held.copies == held.turn
        owned.append(Owned(name, parameter, shapes[name], held, writes))
    return owned


def logical_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every parameter of a model, in model order."""
    with torch.device("meta"):
        model = GPT(spec)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def weight_pieces(owned: list[Owned]) -> list[Piece]:
    """The weights that this rank writes."""
    return [piece for o in owned if o.writes for piece in o.pieces(o.name, o.parameter.detach())]


def state_pieces(model: GPT, layout: Layout, rank: int) -> list[Piece]:
    """The routers' state that this rank writes: of all that hold a layer one writes it whole."""
    pieces = []
    for name, buffer in model.named_buffers():
        shape = tuple(buffer.shape)
        held = cut(name, shape, layout, rank, model.spec.num_layers)
        if held.is_first_copy and held.turn == 0:
            pieces.append(Piece(name, shape, Box.whole(shape), buffer.detach()))
    return pieces
