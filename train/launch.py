"""From a run plan to a Ray Train job, on a local cluster started for it or on one that is there."""

import dataclasses
import logging
import time
from typing import Any

import ray.train
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from cluster import env
from cluster.coordinator_actor import coordinating
from cluster.local import Session, session
from gptmoe.errors import ClusterError, GptMoeError

from .plan import RunPlan
from .state import State, write_state
from .worker import work

log = logging.getLogger(__name__)


def launch(plan: RunPlan, state: State, address: str | None) -> None:
    """Train on Ray Train until plan.max_steps. Raises what the first failing worker raised."""
    layout = plan.config.parallel.layout()
    gpus = 1 if env.has_gpu() else 0
    with session(workers=layout.world, gpus_per_worker=gpus, address=address) as cluster:
        write_state(
            plan.run_dir,
            dataclasses.replace(
                state,
                state="running",
                max_steps=plan.max_steps,
                cluster_address=cluster.address,
                dashboard_url=cluster.dashboard_url,
            ),
        )
        run_name = plan.run_dir.name
        with coordinating(run_name, plan.run_dir):
            trainer = make_trainer(plan, cluster, run_name)
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise first_cause(error) from error


class SteadyTrainer(TorchTrainer):
    """TorchTrainer without the watchdog that removes the workers of a controller it takes for dead.

    The watchdog asks the dashboard, and on a busy machine an unanswered question counts as a death
    (seen on two loaded cores, Ray 2.60). The workers' placement group belongs to the controller and
    goes with it anyway.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]


def make_trainer(plan: RunPlan, cluster: Session, run_name: str) -> TorchTrainer:
    """One worker a rank. Ray's folder in run.dir holds its bookkeeping, ours the checkpoints."""
    use_gpu = cluster.gpus_per_worker > 0
    settings: dict[str, Any] = {"plan": plan, "run_name": run_name, "threads": cluster.threads}
    return SteadyTrainer(
        work,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=plan.config.parallel.layout().world,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=f"{plan.kind}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(plan.run_dir / "ray"),
            worker_runtime_env={
                "env_vars": env.worker_environment(cluster.threads, use_gpu=use_gpu)
            },
        ),
    )


def first_cause(error: BaseException) -> GptMoeError:
    """Our own error if a worker raised one, else the first worker's failure in a sentence."""
    failures = list(getattr(error, "worker_failures", {}).items())
    for rank, failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, GptMoeError):
                return cause
            cause = cause.__cause__ or getattr(cause, "cause", None)
        log.error("worker failed rank=%s", rank, exc_info=failure)
    where = f"worker {failures[0][0]}: {failures[0][1]}" if failures else str(error)
    return ClusterError(
        f"training stopped, {where}; start the same command again to go on from the last checkpoint"
    )
