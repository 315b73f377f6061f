"""Runs and clusters for people."""

import io
from dataclasses import replace

from rich.console import Console, RenderableType

from cluster.drawing import (
    describe_experts,
    describe_load,
    describe_step,
    describe_threads,
    draw_application,
    draw_cluster,
    draw_run,
)
from cluster.messages import ExpertRange, Owner, Shard, Topology
from cluster.operations import Topologies
from cluster.status import ApplicationStatus, ClusterStatus, JobStatus, RunStatus

from .conftest import SERVED

OWNER = Owner(
    worker="train-1",
    rank=1,
    node="node-a",
    pid=77,
    shard=Shard(
        layers=(0, 1, 2, 3),
        experts=(ExpertRange(layer=1, first=4, end=8), ExpertRange(layer=3, first=4, end=8)),
    ),
    step=20,
    heartbeat_age_s=40.0,
)
RUN = RunStatus(
    run_dir="runs/tiny",
    state="running",
    message="",
    step=20,
    max_steps=40,
    metrics={"step": 20, "loss": 2.5},
    dashboard_url="http://127.0.0.1:8265",
    job_id="",
    alive=True,
    topology=Topology(epoch=2, run="tiny", owners=(OWNER,)),
)


def text(drawing: RenderableType, *, color: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=160, force_terminal=color).print(drawing)
    return file.getvalue()


def words(line: str) -> list[str]:
    return line.split()


def test_a_run_with_its_owners() -> None:
    lines = text(draw_run(RUN)).splitlines()
    assert lines[:2] == ["runs/tiny: running", "step 20/40  loss 2.5000"]
    assert "epoch 2" in lines[3]
    assert words(lines[-1]) == [
        "train-1",
        "node-a",
        "77",
        "0",
        "0-3",
        "1/1",
        "1,3:",
        "4-7",
        "20",
        "40",
        "s",
        "ago",
    ]


def test_a_silent_worker_is_red_while_the_run_lasts() -> None:
    assert "\x1b[31m40 s ago" in text(draw_run(RUN), color=True)
    assert "\x1b[31m" not in text(draw_run(replace(RUN, state="finished")), color=True)


def test_a_run_whose_process_is_gone_or_that_failed_says_so() -> None:
    assert "was killed" in text(draw_run(replace(RUN, alive=False)))
    assert "was killed" not in text(draw_run(replace(RUN, alive=False, job_id="job")))
    assert "no space" in text(draw_run(replace(RUN, state="failed", message="no space left")))


def test_experts_in_words() -> None:
    ranges = [ExpertRange(layer=1, first=0, end=4), ExpertRange(layer=3, first=0, end=8)]
    assert describe_experts(ranges) == "1: 0-3; 3: 0-7"
    assert describe_experts([ExpertRange(layer=1, first=4, end=4)]) == "1: none"
    assert describe_experts([]) == ""


def test_a_cluster_with_jobs_and_what_it_serves() -> None:
    cluster = ClusterStatus(
        dashboard_url="http://head:8265",
        resources={"CPU": 4.0},
        jobs=[
            JobStatus(job_id="pretrain-a", kind="pretrain", status="RUNNING", message="", run=RUN),
            JobStatus(job_id="old", kind="", status="FAILED", message="", run=None),
        ],
        applications=[
            ApplicationStatus(name="gptmoe", status="RUNNING", message="", replicas=2),
        ],
    )
    drawn = text(draw_cluster(cluster))
    assert drawn.startswith("http://head:8265: 4 CPU, 0 GPU\n")
    assert "serves gptmoe: RUNNING, 2 replicas" in drawn
    assert [words(line) for line in drawn.splitlines()][2:4] == [
        ["pretrain-a", "RUNNING", "runs/tiny", "20/40"],
        ["old", "FAILED"],
    ]
    assert "train-1" in drawn
    assert "no jobs" in text(draw_cluster(replace(cluster, jobs=[])))


def test_a_served_model_with_its_shards_and_their_load() -> None:
    lines = text(draw_application(SERVED)).splitlines()
    assert lines[:2] == ["poems: 1 replica, weights version 4", SERVED.checkpoint]
    assert "poems#1, epoch 3" in lines[2]
    assert [" ".join(words(line)) for line in lines[4:6]] == [
        "0 node-a 70 0 0-1 1/1 0 1: 0-1 1,200 75% 1/0 20 0 s ago",
        "1 node-a 71 0 0-1 1/1 1 1: 2-3 1,200 75% 1/2 20 0 s ago",
    ]
    assert lines[6].startswith("rank 1 died")
    assert "draining" in text(draw_application(replace(SERVED, draining=True)))
    assert "each holds the whole model" in text(draw_application(replace(SERVED, topologies=())))


def test_threads_are_told_by_node() -> None:
    lines = text(draw_application(replace(SERVED, threads=2))).splitlines()
    assert lines[2] == "each shard computes with 2 threads: 4 on node-a"
    (topology,) = SERVED.topologies
    moved = (topology.owners[0], replace(topology.owners[1], node="node-b"))
    apart = replace(SERVED, threads=1, topologies=(replace(topology, owners=moved),))
    assert describe_threads(apart) == "each shard computes with 1 thread: 1 on node-a, 1 on node-b"
    whole = replace(SERVED, threads=4, replicas=2, topologies=())
    assert "each replica computes with 4 threads\n" in text(draw_application(whole))
    placed = replace(whole, replicas=3, nodes=("10.0.0.2", "10.0.0.1", "10.0.0.2"))
    assert "each replica computes with 4 threads: 4 on 10.0.0.1, 8 on 10.0.0.2" in text(
        draw_application(placed)
    )


def test_the_load_of_a_shard_in_words() -> None:
    assert describe_load({"weights_bytes": 5.0}) == ("", "")
    assert describe_load({"rows/1/0": 0.0, "rows/1/1": 0.0}) == ("0", "")
    assert describe_load({"rows/1/0": 1.0, "rows/3/7": 3.0}) == ("4", "75% 3/7")


def test_experts_that_make_shards_wait_are_named() -> None:
    shards = [
        Shard(
            layers=(0, 1),
            data=data,
            experts=(ExpertRange(layer=1, first=2 * data, end=2 * data + 2),),
        )
        for data in (0, 1)
    ]
    rows = ({"rows/1/0": 900.0, "rows/1/1": 100.0}, {"rows/1/2": 100.0, "rows/1/3": 100.0})
    owners = tuple(
        Owner(worker=f"shard-{rank}", rank=rank, node="vm", pid=1, shard=shard, counters=counters)
        for rank, (shard, counters) in enumerate(zip(shards, rows, strict=True))
    )
    answer = Topologies(
        application="gptmoe", topologies=(Topology(epoch=1, run="gptmoe#1", owners=owners),)
    )
    drawn = text(draw_application(answer))
    assert 'hot: "1:0" (busiest shard 1.67 -> 1.08 times the mean)' in drawn


def test_a_shard_that_loads_says_how_far_it_is() -> None:
    shard = Shard(layers=(0, 1))
    owner = Owner(worker="shard-0", rank=0, node="vm", pid=1, shard=shard, step=7)
    assert describe_step(owner) == "7"
    assert describe_step(replace(owner, counters={"loaded": 0.454})) == "loading 45%"
