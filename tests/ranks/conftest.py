"""One pool of processes for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.ranks.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four processes, started once."""
    with RankPool(4) as pool:
        yield pool
