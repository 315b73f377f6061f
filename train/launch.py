"""From a run plan to a Ray Train job, on a local cluster started for it or on one that is there."""

import logging
import signal
import time
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from cluster import env
from cluster.coordinator_actor import coordinating
from cluster.local import Session, session
from cluster.resources import missing

from .plan import RunPlan
from .recovery import RecoveryPolicy, first_cause
from .state import GO_ON, StateFile
from .watchdog import group_timeout
from .worker import work

log = logging.getLogger(__name__)


def launch(plan: RunPlan, state: StateFile, address: str | None) -> None:
    """Train on Ray Train until plan.max_steps. Raises what the first failing worker raised."""
    layout = plan.config.parallel.layout()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    fewest = plan.config.parallel.fewest_workers
    with session(workers=layout.world, least=fewest, gpus=True, address=address) as cluster:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own, set by now, aborts the process
        state.write(
            state="running",
            cluster_address=cluster.address,
            dashboard_url=cluster.dashboard_url,
        )
        if not cluster.local:
            say_if_busy(cluster, fewest)
        with coordinating(plan.run_name, plan.run_dir):
            try:
                make_trainer(plan, cluster).fit()
            except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
                raise first_cause(error) from error
            except KeyboardInterrupt:
                state.end("interrupted", GO_ON)  # now: a job that is stopped has only 3 s to live
                raise


def say_if_busy(cluster: Session, workers: int) -> None:
    """A warning if training will have to wait for others to leave: Ray itself waits in silence."""
    needed = {"CPU": workers * cluster.cpus_per_worker, "GPU": workers * cluster.gpus_per_worker}
    lack = missing({name: float(n) for name, n in needed.items() if n}, ray.available_resources())
    if lack:
        log.warning("the cluster is busy, it lacks %s now: training waits until it is free", lack)


class SteadyTrainer(TorchTrainer):
    """TorchTrainer without three of its habits, and with our own idea of what can be tried again.

    Its watchdog removes the workers of a controller that it takes for dead. It asks the dashboard,
    and on a busy machine an unanswered question counts as a death (seen on two loaded cores, Ray
    2.60). The workers' placement group belongs to the controller and goes with it anyway.

    It starts a process that hands out Ray datasets, for every group of workers; we read our own.

    Its handler of Ctrl-C ends the process with 0; ours is to say that the run was interrupted.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        habits = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [c for c in callbacks if not isinstance(c, habits)]

    def _register_sigint_handler(self, controller: Any) -> None:
        pass

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        config = self.run_config.failure_config
        assert isinstance(config, FailureConfig)
        assert self.train_loop_config is not None
        policy = RecoveryPolicy(config, self.train_loop_config["run_name"])
        return super()._initialize_and_run_controller(**given | {"failure_policy": policy})


def make_trainer(plan: RunPlan, cluster: Session) -> TorchTrainer:
    """One worker a rank. Ray's folder in run.dir holds its bookkeeping, ours the checkpoints."""
    use_gpu = cluster.gpus_per_worker > 0
    parallel = plan.config.parallel
    world = parallel.layout().world
    settings = {"plan": plan, "run_name": plan.run_name, "threads": cluster.threads}
    return SteadyTrainer(
        work,
        train_loop_config=settings,
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo",
            timeout_s=int(group_timeout(plan.config.run.hang_s).total_seconds()),
        ),
        scaling_config=ScalingConfig(
            num_workers=(parallel.min_workers, world) if parallel.min_workers else world,
            elastic_resize_monitor_interval_s=parallel.resize_every_s,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=f"{plan.run_name}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(plan.run_dir / "ray"),
            failure_config=FailureConfig(max_failures=plan.config.run.max_failures),
            worker_runtime_env={
                "env_vars": env.worker_environment(cluster.threads, use_gpu=use_gpu)
            },
        ),
    )
