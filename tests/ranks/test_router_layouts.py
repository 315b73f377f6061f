"""Every router gives one process's loss, gradients and state on every layout: a pairwise cover."""

import pytest

from tests.ranks.cover import Cell, pairwise
from tests.ranks.matrix import (
    ROUTER_DIMENSIONS,
    assert_first_gradients_equal,
    assert_six_steps_equal,
    is_valid,
    name_of,
)
from tests.ranks.pool import RankPool

each_cell = pytest.mark.parametrize("cell", pairwise(ROUTER_DIMENSIONS, is_valid), ids=name_of)


@each_cell
def test_first_gradients_equal_one_process(pool: RankPool, cell: Cell) -> None:
    assert_first_gradients_equal(pool, cell)


@each_cell
def test_six_clipped_steps_and_the_state_equal_one_process(pool: RankPool, cell: Cell) -> None:
    assert_six_steps_equal(pool, cell)
