"""Plans as plain data: what `gptmoe plan --json` prints, and what its tables are drawn from."""

from typing import Any

from gptmoe.model.counts import parameters

from .assumptions import Assumptions
from .devices import Cluster
from .equal_cost import EqualCost, Sparse
from .job import Choice, Job
from .search import Answer, Plan
from .step_time import bubble_fraction, sent_bytes


def plan_facts(name: str, job: Job, cluster: Cluster, answer: Answer) -> dict[str, Any]:
    """The best plan with its items, and the runners-up with the reasons why they lost."""
    best, choice = answer.best, answer.best.choice
    return {
        **_job_facts(name, job, cluster),
        **choice_facts(job, choice),
        "world": choice.layout.world,
        "idle_devices": cluster.num_devices - choice.layout.world,
        "overrides": overrides(choice),
        **_plan_facts(best),
        "memory_bytes": best.memory.items() | {"total": best.memory.total},
        "usable_bytes": best.usable_bytes,
        "step_time_s": best.time.items() | {"total": best.time.total},
        "sent_bytes": sent_bytes(job, choice, Assumptions()),
        "bubble": bubble_fraction(choice.layout.pp, choice.layout.chunks, choice.microbatches(job)),
        "runners_up": [
            {
                **choice_facts(job, lost.plan.choice),
                "fits": lost.plan.fits,
                "step_time_s": lost.plan.time.total,
                "memory_bytes": lost.plan.memory.total,
                "reason": lost.reason,
            }
            for lost in answer.runners_up
        ],
        "layouts_seen": answer.layouts_seen,
    }


def equal_cost_facts(name: str, job: Job, cluster: Cluster, found: EqualCost) -> dict[str, Any]:
    """The dense model, and the sparse ones that cost as much."""
    dense = found.dense
    return {
        **_job_facts(name, job, cluster),
        **choice_facts(job, dense.choice),
        **_plan_facts(dense),
        "most_parameters": _sparse_facts(job, found.most) if found.most else None,
        "equal_cost": [_sparse_facts(job, sparse) for sparse in found.equal],
        "other_costs": [_sparse_facts(job, sparse) for sparse in found.nearest],
        "too_large": list(found.too_large),
    }


def choice_facts(job: Job, choice: Choice) -> dict[str, Any]:
    """What a planner decides, by the words of the config."""
    layout = choice.layout
    return {
        "layout": {"dp": layout.dp, "tp": layout.tp, "ep": layout.ep, "pp": layout.pp},
        "zero": choice.zero,
        "recompute": choice.recompute,
        "microbatch_size": choice.microbatch_size,
        "microbatches": choice.microbatches(job),
        "schedule": choice.schedule,
        "chunks": choice.layout.chunks,
    }


def overrides(choice: Choice) -> list[str]:
    """The layout as a training command takes it."""
    layout = choice.layout
    pipeline = [f"parallel.schedule={choice.schedule}", f"parallel.chunks={layout.chunks}"]
    if layout.pp == 1:
        pipeline = []
    found = [f"parallel.{name}={getattr(layout, name)}" for name in ("dp", "tp", "ep", "pp")]
    return [
        *found,
        f"parallel.zero={choice.zero}",
        *pipeline,
        f"train.microbatch_size={choice.microbatch_size}",
        f"train.recompute={choice.recompute}",
    ]


def _job_facts(name: str, job: Job, cluster: Cluster) -> dict[str, Any]:
    count = parameters(job.spec)
    return {
        "model": name,
        "parameters": count.total,
        "active_parameters": count.active,
        "batch_tokens": job.batch_tokens,
        "seq_len": job.seq_len,
        "dtype": job.dtype,
        "cluster": {
            "num_devices": cluster.num_devices,
            "device": cluster.device.name,
            "device_memory_bytes": cluster.device.memory_bytes,
            "device_flops_per_s": cluster.device.flops_per_s(job.dtype),
            "devices_per_node": cluster.devices_per_node,
            "link_bytes_per_s": cluster.link_bytes_per_s,
            "network_bytes_per_s": cluster.network_bytes_per_s,
        },
    }


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {"tokens_per_s": plan.tokens_per_s, "utilization": plan.utilization}


def _sparse_facts(job: Job, sparse: Sparse) -> dict[str, Any]:
    return {
        "model": sparse.name,
        "parameters": sparse.count.total,
        "active_parameters": sparse.count.active,
        "cost": sparse.cost,
        **choice_facts(job, sparse.plan.choice),
        **_plan_facts(sparse.plan),
    }
