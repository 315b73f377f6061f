"""A node under a group of shards is lost: its shard starts again on the next one."""

import json
import subprocess
import sys
from pathlib import Path

import gptmoe
from cluster import env
from tests import small_model
from tests.faults.nodes import Nodes
from tests.faults.shards import ENGINE, write


def test_texts_go_on_when_a_node_is_lost(nodes: Nodes, tmp_path: Path) -> None:
    model = gptmoe.load(small_model.write(tmp_path))
    nodes.change("add", 2)
    command = [sys.executable, "-m", "tests.faults.shards_on", nodes.address, str(model.path)]
    variables = env.child_environment(starts_cluster=True)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        nodes.change("remove", 1)
        nodes.change("add", 1)
        said, _ = process.communicate("go on\n", timeout=120)
    found = json.loads(said.strip().splitlines()[-1])
    assert found["texts"] == write(model.engine(ENGINE).executor, model)
    assert len(found["after"]) == 2
    assert len(set(found["before"]) & set(found["after"])) == 1  # the other kept its weights
    assert "started again: rank" in found["failures"][-1]
