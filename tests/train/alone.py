"""A run without Ray, in one process or as one rank of a gloo group: what Ray must agree with."""

import torch

from gptmoe import metrics
from gptmoe.parallel import mesh as meshes
from gptmoe.parallel.mesh import Mesh, single
from train.plan import RunPlan
from train.worker import Worker


def run_alone(plan: RunPlan, mesh: Mesh | None = None) -> list[dict[str, float]]:
    """Do what the plan says, by default in this process alone; returns what metrics.jsonl holds."""
    mesh = mesh or single()
    path = plan.run_dir / f"metrics{mesh.rank or ''}.jsonl"
    metrics.cut_after(path, plan.done)
    with metrics.JsonlRecorder(path) as recorder:
        worker = Worker.start(
            plan,
            mesh,
            torch.device("cpu"),
            recorders=[recorder],
            heartbeat=lambda step, *, last=False: None,
        )
        worker.run()
    return metrics.read(path)


def run_rank(rank: int, plan: RunPlan) -> list[dict[str, float]]:
    """The same as one rank of an initialised group."""
    return run_alone(plan, meshes.join(plan.config.parallel.layout(), rank))
