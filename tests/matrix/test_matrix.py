"""All cells of the matrices of which tests/ranks has pairwise covers: layouts, and routers."""

import pytest

from tests.ranks.cover import Cell, every
from tests.ranks.matrix import (
    DIMENSIONS,
    ROUTER_DIMENSIONS,
    assert_first_gradients_equal,
    assert_six_steps_equal,
    is_valid,
    name_of,
)
from tests.ranks.pool import RankPool

CELLS = [*every(DIMENSIONS, is_valid), *every(ROUTER_DIMENSIONS, is_valid)]
each_cell = pytest.mark.parametrize("cell", CELLS, ids=name_of)


@each_cell
def test_first_gradients_equal_one_process(pool: RankPool, cell: Cell) -> None:
    assert_first_gradients_equal(pool, cell)


@each_cell
def test_six_clipped_steps_equal_one_process(pool: RankPool, cell: Cell) -> None:
    assert_six_steps_equal(pool, cell)
