"""topology.json: whole or absent, ages counted on, damage named."""

import json
import logging
import time
from pathlib import Path

import pytest

from cluster import topology_file
from cluster.messages import ExpertRange, Owner, Shard, Topology
from gptmoe.errors import ClusterError

TOPOLOGY = Topology(
    epoch=2,
    run="tiny",
    owners=(
        Owner(
            worker="train-0",
            rank=0,
            node="here",
            pid=7,
            shard=Shard(layers=(0, 1), experts=(ExpertRange(layer=1, first=0, end=4),)),
            step=20,
            heartbeat_age_s=1.0,
            counters={"loss": 2.5},
        ),
    ),
)


def test_what_is_written_is_read_and_ages(tmp_path: Path) -> None:
    assert topology_file.read(tmp_path) is None
    topology_file.write(tmp_path / "run", TOPOLOGY)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["topology.json"]
    time.sleep(0.05)
    found = topology_file.read(tmp_path / "run")
    assert found is not None
    assert found.owners[0].shard == TOPOLOGY.owners[0].shard
    assert found.owners[0].counters == {"loss": 2.5}
    assert 1.05 <= found.owners[0].heartbeat_age_s < 5


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"written_at_s": 1, "epoch": "x", "run": ""}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "topology.json").write_text(text)
    with pytest.raises(ClusterError, match=r"topology\.json is not a topology"):
        topology_file.read(tmp_path)


def test_an_old_file_stays_whole_if_the_folder_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        topology_file.write(tmp_path / "file" / "run", TOPOLOGY)
    assert "topology not written" in caplog.text


def test_the_file_is_plain_json_for_other_tools(tmp_path: Path) -> None:
    topology_file.write(tmp_path, TOPOLOGY)
    raw = json.loads((tmp_path / "topology.json").read_text())
    assert raw["owners"][0]["shard"]["experts"] == [{"layer": 1, "first": 0, "end": 4}]
