"""Every layout gives one process's loss, gradients, norm and weights: a pairwise cover of it all.

The whole matrix is in tests/matrix.
"""

import pytest

from gptmoe.parallel.layout import Layout
from tests.ranks.cover import Cell, every, pairwise
from tests.ranks.matrix import (
    CASES,
    DIMENSIONS,
    assert_first_gradients_equal,
    assert_six_steps_equal,
    is_valid,
    name_of,
)
from tests.ranks.pool import RankPool
from tests.ranks.sgd import train

each_cell = pytest.mark.parametrize("cell", pairwise(DIMENSIONS, is_valid), ids=name_of)


@each_cell
def test_first_gradients_equal_one_process(pool: RankPool, cell: Cell) -> None:
    assert_first_gradients_equal(pool, cell)


@each_cell
def test_six_clipped_steps_equal_one_process(pool: RankPool, cell: Cell) -> None:
    assert_six_steps_equal(pool, cell)


def test_the_cases_are_what_they_say(pool: RankPool) -> None:
    layout = Layout(dp=4, ep=4)
    plain, padded, crowded = (pool.run(4, train, layout, case) for case in CASES.values())
    assert plain[0].dropped > 0
    assert all(rank.load_E.all() for rank in plain)
    assert [int(rank.load_E.sum()) > 0 for rank in padded] == [True, False, False, False]
    for rank in crowded:
        assert rank.load_E[0] > 0
        assert not rank.load_E[1:].any()


def test_a_cover_holds_every_pair_that_can_be() -> None:
    dimensions = {"a": [1, 2, 3], "b": ["x", "y"], "c": [True, False]}

    def valid(a: int, b: str, c: bool) -> bool:
        return not (a == 2 and b == "y") and (c or a != 3)

    cover, whole = pairwise(dimensions, valid), every(dimensions, valid)
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        assert {(x[one], x[other]) for x in cover} == {(x[one], x[other]) for x in whole}
    assert len(cover) < len(whole)
