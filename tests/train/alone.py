"""A run in one process, without Ray: what a run on any layout must agree with."""

import torch

from gptmoe import metrics
from gptmoe.parallel.mesh import single
from train.plan import RunPlan
from train.worker import Worker


def run_alone(plan: RunPlan) -> list[dict[str, float]]:
    """Do what the plan says in this process, without Ray; returns what metrics.jsonl holds."""
    path = plan.run_dir / "metrics.jsonl"
    metrics.cut_after(path, plan.done)
    with metrics.JsonlRecorder(path) as recorder:
        worker = Worker.start(
            plan,
            single(),
            torch.device("cpu"),
            recorders=[recorder],
            heartbeat=lambda step, *, last=False: None,
            saved=lambda step: None,
        )
        worker.run()
    return metrics.read(path)
