"""A node under a group of shards is lost: its shard starts again on the next one."""

from pathlib import Path

import gptmoe
from tests import small_model
from tests.faults.nodes import Nodes
from tests.faults.shards import ENGINE, lose_node, write


def test_texts_go_on_when_a_node_is_lost(nodes: Nodes, tmp_path: Path) -> None:
    model = gptmoe.load(small_model.write(tmp_path))
    found = lose_node(nodes, model.path, spare=False)
    assert found["texts"] == write(model.engine(ENGINE).executor, model)
    assert len(found["after"]) == 2
    assert len(set(found["before"]) & set(found["after"])) == 1  # the other kept its weights
    assert "started again: rank" in found["failures"][-1]
