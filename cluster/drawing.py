"""Runs and clusters for people, in rich."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .follow import describe
from .messages import ExpertRange, Owner, Topology
from .operations import Topologies
from .planner.hot import Proposal, propose, rows_answered
from .shards.roles import part_of
from .status import ClusterStatus, JobStatus, RunStatus

ENOUGH_ROWS = 1000
"""Fewer rows answered in all say nothing of which experts are hot."""

ROWS = "rows/"
"""A shard's counter `rows/LAYER/EXPERT`: the rows that this expert has answered."""


def draw_run(run: RunStatus) -> RenderableType:
    """State, newest numbers, owners."""
    running = run.state == "running"
    steps = f"/{run.max_steps}" if run.max_steps else ""
    numbers = describe(run.metrics) if run.metrics else ""
    parts: list[RenderableType] = [
        Text(f"{run.run_dir}: {run.state or 'not started'}", style="bold"),
        Text(f"step {run.step}{steps}  {numbers}".rstrip()),
    ]
    if run.message:
        parts.append(Text(run.message, style="red" if run.state == "failed" else ""))
    if running and not run.alive and not run.job_id:
        parts.append(
            Text("its process is on another machine, another user's, or was killed", style="red")
        )
    if running and run.dashboard_url:
        parts.append(Text(f"dashboard {run.dashboard_url}"))
    if run.topology:
        parts.append(draw_topology(run.topology, running=running))
        for failure in run.topology.failures:
            parts.append(Text(str(failure), style="yellow"))
    return Group(*parts)


def draw_topology(topology: Topology, *, running: bool) -> Table:
    """One line a worker: what it owns, how far it is, when it was last heard of."""
    columns = ("worker", "node", "pid", "stage", "layers", "slice", "layer: experts", "step")
    title = f"epoch {topology.epoch}"
    table = Table(*columns, "heard of", box=None, title=title, title_justify="left")
    for owner in topology.owners:
        shard, age_s = owner.shard, owner.heartbeat_age_s
        table.add_row(
            owner.worker,
            owner.node,
            str(owner.pid),
            str(shard.stage),
            describe_layers(shard.layers),
            f"{shard.slice + 1}/{shard.slices}",
            describe_experts(shard.experts),
            str(owner.step),
            Text(f"{age_s:.0f} s ago", style="red" if running and owner.is_silent else ""),
        )
    return table


def draw_application(answer: Topologies) -> RenderableType:
    """What is served, and of each replica: its shards, their load, what failed."""
    replicas = _many(answer.replicas, "replica")
    version = f"weights version {answer.version}" + (", draining" if answer.draining else "")
    parts: list[RenderableType] = [
        Text(f"{answer.application}: {replicas}, {version}", style="bold"),
        Text(answer.checkpoint),
    ]
    if not answer.topologies:
        parts.append(Text("no replica lies on shards: each holds the whole model"))
    if answer.threads:
        parts.append(Text(describe_threads(answer)))
    for topology in answer.topologies:
        parts.append(_shards_table(topology))
        parts += [Text(f"hot: {proposal}", style="yellow") for proposal in hot_experts(topology)]
        parts += [Text(str(failure), style="yellow") for failure in topology.failures]
    return Group(*parts)


def describe_threads(answer: Topologies) -> str:
    """With how many threads a replica or shard computes, and how many those of a node have.

    These should not be more than its cores: threads that wait for each other crawl.
    """
    each = _many(answer.threads, "thread")
    shards = Counter(owner.node for topology in answer.topologies for owner in topology.owners)
    computing = shards or Counter(answer.nodes)
    nodes = (f"{count * answer.threads} on {node}" for node, count in sorted(computing.items()))
    what = "shard" if shards else "replica"
    return f"each {what} computes with {each}: {', '.join(nodes)}".removesuffix(": ")


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def hot_experts(topology: Topology) -> list[Proposal]:
    """Experts to hold on more shards (parallel.hot), once there are rows enough to say so."""
    rows = rows_answered([owner.counters for owner in topology.owners])
    if sum(rows.values()) < ENOUGH_ROWS:
        return []
    return propose(rows, [part_of(owner.shard) for owner in topology.owners])


def _shards_table(topology: Topology) -> Table:
    columns = ("shard", "node", "pid", "stage", "layers", "slice", "data", "layer: experts")
    title = f"{topology.run}, epoch {topology.epoch}"
    table = Table(*columns, "rows", "load", "step", "heard of", box=None, title=title)
    table.title_justify = "left"
    for owner in topology.owners:
        shard, age_s = owner.shard, owner.heartbeat_age_s
        rows, load = describe_load(owner.counters)
        table.add_row(
            str(owner.rank),
            owner.node,
            str(owner.pid),
            str(shard.stage),
            "" if shard.experts_only else describe_layers(shard.layers),
            f"{shard.slice + 1}/{shard.slices}",
            str(shard.data),
            describe_experts(shard.experts),
            rows,
            load,
            describe_step(owner),
            Text(f"{age_s:.0f} s ago", style="red" if owner.is_silent else ""),
        )
    return table


def describe_step(owner: Owner) -> str:
    """Its steps, or how much of its weights it has read so far."""
    loaded = owner.counters.get("loaded", 1.0)
    return f"loading {loaded:.0%}" if loaded < 1 else str(owner.step)


def describe_load(counters: Mapping[str, float]) -> tuple[str, str]:
    """Rows that a shard's experts have answered in all, and the share of the busiest one.

    `1,200`, `41% 3/7`: expert 7 of layer 3 got 41% of them. Two empty texts without experts.
    """
    rows = {
        name.removeprefix(ROWS): value for name, value in counters.items() if name.startswith(ROWS)
    }
    if not rows:
        return "", ""
    total, busiest = sum(rows.values()), max(rows, key=lambda name: rows[name])
    return f"{total:,.0f}", f"{rows[busiest] / total:.0%} {busiest}" if total else ""


def describe_layers(layers: Sequence[int]) -> str:
    """Numbers in ascending order as ranges: `0-1, 4-5`."""
    spans = []
    for _, group in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        numbers = [layer for _, layer in group]
        spans.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}")
    return ", ".join(spans)


def draw_cluster(cluster: ClusterStatus) -> RenderableType:
    """Resources, jobs with their runs, what is served."""
    cpus, gpus = (cluster.resources.get(name, 0) for name in ("CPU", "GPU"))
    parts: list[RenderableType] = [
        Text(f"{cluster.dashboard_url}: {cpus:g} CPU, {gpus:g} GPU", style="bold"),
        _jobs_table(cluster.jobs) if cluster.jobs else Text("no jobs"),
    ]
    for job in cluster.jobs:
        if job.problem:
            parts.append(Text(f"{job.job_id}: {job.problem}", style="red"))
    for application in cluster.applications:
        name, status, replicas = application.name, application.status, application.replicas
        parts.append(Text(f"serves {name}: {status}, {replicas} replicas {application.message}"))
    for job in cluster.jobs:
        if job.run and job.status == "RUNNING":
            parts.append(draw_run(job.run))
    return Group(*parts)


def describe_experts(experts: Sequence[ExpertRange]) -> str:
    """`1,3: 0-3` says that of layers 1 and 3 experts 0 to 3 are owned."""
    parts = []
    for (first, end), ranges in groupby(experts, key=lambda item: (item.first, item.end)):
        layers = ",".join(str(item.layer) for item in ranges)
        parts.append(f"{layers}: {first}-{end - 1}" if end > first else f"{layers}: none")
    return "; ".join(parts)


def _jobs_table(jobs: Sequence[JobStatus]) -> Table:
    table = Table("job", "status", "run", "step", box=None)
    for job in jobs:
        where = job.run.run_dir if job.run else ""
        step = f"{job.run.step}/{job.run.max_steps}" if job.run else ""
        table.add_row(job.job_id, job.status, where, step)
    return table
