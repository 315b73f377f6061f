"""Boxes: cutting, covering, and flat ranges."""

import math
from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.checkpoint import Box, Piece, cut, flat_range, whole
from gptmoe.checkpoint.boxes import fits, gaps, overlap
from gptmoe.errors import CheckpointError

SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    bounds = [sorted(draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape]
    return Box(tuple(low for low, _ in bounds), tuple(high - low for low, high in bounds))


def counts(shape: tuple[int, ...], boxes: Iterable[Box]) -> torch.Tensor:
    """How many of the boxes hold each element: the slow and obvious way."""
    held = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        held[box.slices(Box.whole(shape))] += 1
    return held


def test_ranks_cut_a_tensor_into_pieces_of_it() -> None:
    up_weight = torch.arange(8 * 6).view(8, 6)
    second = cut("up_weight", up_weight, Box.whole((8, 6)).cut(0, 1, 4))
    assert str(second.box) == "[2:4, 0:6]"
    assert second.tensor.tolist() == up_weight[2:4].tolist()
    assert whole("up_weight", up_weight).box == Box((0, 0), (8, 6))


def test_a_cut_of_a_cut_is_a_box_of_the_whole() -> None:
    box = Box.whole((8, 6)).cut(0, 1, 2).cut(1, 2, 3)
    assert box == Box((4, 4), (4, 2))
    assert box.stop == (8, 6)
    assert box.volume == 8


@given(st.data(), SHAPES)
def test_intersect_and_minus_agree_with_masks(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, other = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = one.intersect(other)
    both = counts(shape, [one]) * counts(shape, [other])
    assert counts(shape, [common] if common else []).equal(both)
    assert counts(shape, one.minus(other)).equal(counts(shape, [one]) - both)


@given(st.data(), SHAPES)
def test_gaps_are_what_no_box_holds(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(st.lists(boxes_in(shape), max_size=5))
    held = counts(shape, boxes)
    assert counts(shape, gaps(Box.whole(shape), boxes)).equal((held == 0).long())
    assert (overlap(boxes) is not None) == bool((held > 1).any())


@given(st.data(), SHAPES)
def test_a_flat_range_is_boxes_in_row_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    first, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    values = torch.arange(size).view(shape)
    boxes = flat_range(shape, first, stop)
    parts = [values[box.slices(Box.whole(shape))].flatten() for box in boxes]
    assert [int(v) for part in parts for v in part] == list(range(first, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(st.data(), SHAPES)
def test_flat_ranges_of_all_ranks_cover_once(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    inner = data.draw(st.lists(st.integers(0, size), max_size=4).map(sorted))
    ranges = pairwise([0, *inner, size])
    boxes = [box for first, stop in ranges for box in flat_range(shape, first, stop)]
    assert counts(shape, boxes).eq(1).all()


def test_a_box_of_other_dimensions_does_not_fit() -> None:
    assert fits(Box((1,), (2,)), (3,))
    assert not fits(Box((2,), (2,)), (3,))
    assert not fits(Box((0,), (3,)), (3, 1))
    assert not fits(Box((-1,), (2,)), (3,))


def test_a_piece_has_the_shape_of_its_box() -> None:
    with pytest.raises(CheckpointError, match=r"up_weight \[8, 6\] holds values of shape \[2, 5\]"):
        Piece("up_weight", (8, 6), Box((0, 0), (2, 6)), torch.zeros(2, 5))
    with pytest.raises(
        CheckpointError, match=r"for the box \[7:9, 0:6\]; a box lies in its tensor"
    ):
        Piece("up_weight", (8, 6), Box((7, 0), (2, 6)), torch.zeros(2, 6))
