"""Boxes of logical tensors: exactly which part of a whole tensor somebody holds.

A box is half-open in every dimension: `start` up to `start + shape`. A tensor without dimensions
has the one box Box((), ()). Any layout is a way to cut logical tensors into boxes, so a checkpoint
of boxes can be written by one layout and read by another.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from gptmoe.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a logical tensor; prints as a slice, `[0:4, 0:64]`."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """The box of a complete tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def stop(self) -> tuple[int, ...]:
        """The first index behind the box, in each dimension."""
        return tuple(first + size for first, size in zip(self.start, self.shape, strict=True))

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def narrow(self, dim: int, first: int, stop: int) -> "Box":
        """This box with only first..stop-1 (coordinates of the whole tensor) along `dim`."""
        start = (*self.start[:dim], first, *self.start[dim + 1 :])
        return Box(start, (*self.shape[:dim], stop - first, *self.shape[dim + 1 :]))

    def cut(self, dim: int, index: int, parts: int) -> "Box":
        """Part `index` of `parts` equal ones along `dim`."""
        size, rest = divmod(self.shape[dim], parts)
        assert rest == 0
        assert 0 <= index < parts
        first = self.start[dim] + index * size
        return self.narrow(dim, first, first + size)

    def intersect(self, other: "Box") -> "Box | None":
        """What both hold; None if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(low >= high for low, high in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(high - low for low, high in zip(start, stop, strict=True)))

    def minus(self, other: "Box") -> list["Box"]:
        """What is left of this box without `other`, as disjoint boxes."""
        common = self.intersect(other)
        if common is None:
            return [self]
        left, rest = [], self
        for dim, (low, high) in enumerate(zip(common.start, common.stop, strict=True)):
            for first, stop in ((rest.start[dim], low), (high, rest.stop[dim])):
                if first < stop:
                    left.append(rest.narrow(dim, first, stop))
            rest = rest.narrow(dim, low, high)
        return left

    def slices(self, outer: "Box") -> tuple[slice, ...]:
        """The index that selects this box from a tensor that holds `outer`."""
        firsts = (mine - theirs for mine, theirs in zip(self.start, outer.start, strict=True))
        return tuple(
            slice(first, first + size) for first, size in zip(firsts, self.shape, strict=True)
        )

    def __str__(self) -> str:
        bounds = zip(self.start, self.stop, strict=True)
        return "[" + ", ".join(f"{first}:{stop}" for first, stop in bounds) + "]"


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of the logical tensor `name`, with its values; `tensor` has the box's shape."""

    name: str
    full_shape: tuple[int, ...]
    box: Box
    tensor: Tensor

    def __post_init__(self) -> None:
        if tuple(self.tensor.shape) != self.box.shape or not fits(self.box, self.full_shape):
            raise CheckpointError(
                f"a piece of {self.name} {list(self.full_shape)} holds values of shape "
                f"{list(self.tensor.shape)} for the box {self.box}; a box lies in its tensor and "
                f"has the shape of its values"
            )


def whole(name: str, tensor: Tensor) -> Piece:
    """A complete logical tensor as one piece."""
    return Piece(name, tuple(tensor.shape), Box.whole(tensor.shape), tensor)


def cut(name: str, tensor: Tensor, box: Box) -> Piece:
    """The part `box` of a complete logical tensor (a view of it)."""
    return Piece(name, tuple(tensor.shape), box, tensor[box.slices(Box.whole(tensor.shape))])


def fits(box: Box, shape: Sequence[int]) -> bool:
    """Whether `box` lies in a tensor of this shape."""
    if len(box.start) != len(shape):
        return False
    sides = zip(box.start, box.stop, shape, strict=True)
    return all(0 <= first <= stop <= size for first, stop, size in sides)


def gaps(outer: Box, boxes: Iterable[Box]) -> list[Box]:
    """The parts of `outer` that none of `boxes` covers."""
    left = [outer] if outer.volume else []
    for box in boxes:
        left = [rest for part in left for rest in part.minus(box)]
    return left


def overlap(boxes: Sequence[Box]) -> Box | None:
    """A part that two of `boxes` both hold, if there is one."""
    for one, other in combinations(boxes, 2):
        if common := one.intersect(other):
            return common
    return None


def flat_range(shape: Sequence[int], first: int, stop: int) -> list[Box]:
    """Elements first..stop-1 of a tensor stored row by row, as boxes in that order.

    ZeRO gives a rank such a range, which need not begin or end at a row: a matrix makes at most
    three boxes, a tensor of three dimensions five.
    """
    if first >= stop:
        return []
    if not shape:
        return [Box((), ())]
    inner, boxes = tuple(shape[1:]), []
    row = math.prod(inner)
    while first < stop:
        index, offset = divmod(first, row)
        rows = (stop - first) // row
        if offset == 0 and rows > 0:
            boxes.append(Box((index, *(0 for _ in inner)), (rows, *inner)))
            first += rows * row
        else:
            end = min(stop, (index + 1) * row)
            parts = flat_range(inner, offset, offset + end - first)
            boxes += [Box((index, *part.start), (1, *part.shape)) for part in parts]
            first = end
    return boxes
