"""What a cluster says about its jobs, without one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from cluster import jobs, status
from cluster.dashboard import Dashboard
from cluster.drawing import draw_cluster


def cluster_with(*folders: Path) -> Dashboard:
    submitted = [
        SimpleNamespace(
            submission_id=folder.name,
            status="RUNNING",
            message="",
            metadata={jobs.KIND: "pretrain", jobs.RUN_DIR: str(folder)},
        )
        for folder in folders
    ]
    found: dict[str, Any] = {"CPU": 2.0}
    return cast(
        Dashboard,
        SimpleNamespace(
            url="http://head:8265",
            applications=dict,
            resources=lambda: found,
            jobs=lambda: submitted,
        ),
    )


@pytest.mark.parametrize("name", ["state.json", "topology.json", "metrics.jsonl"])
def test_a_damaged_run_hides_no_other(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, whole, absent = (tmp_path / word for word in ("damaged", "whole", "absent"))
    for folder in (damaged, whole):
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"state": "running"}))
    (damaged / name).write_text("{\n{}\n")
    found = status.of_cluster(cluster_with(damaged, whole, absent))
    bad, good, none = found.jobs
    assert (bad.run, none.run) == (None, None)
    assert good.run is not None
    assert str(damaged / name) in bad.problem
    assert (good.problem, none.problem) == ("", "")
    Console(width=300).print(draw_cluster(found))
    assert f"damaged: {bad.problem}\n" in capsys.readouterr().out
