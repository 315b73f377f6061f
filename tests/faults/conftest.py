"""Nodes for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.faults.nodes import Nodes


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.process.communicate(timeout=120)
