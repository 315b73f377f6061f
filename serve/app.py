"""ServeConfig -> Ray Serve application: one ingress deployment, called after what it owns."""

import dataclasses
import warnings
from dataclasses import asdict
from typing import Any

import ray.serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig

from cluster import env
from gptmoe.config import build as load_config
from gptmoe.errors import ConfigError

from .checkpoints import pinned
from .config import ReplicasConfig, ServeConfig
from .controller import DEPLOYMENT, Settings
from .edge.keeper import keeper
from .replica import Generator
from .scaling import ScalingConfig, TokenPolicy

REPORTS_A_LOOK = 5
"""Replicas report so often in the time over which their load is averaged."""

LOGGING = LoggingConfig(enable_access_log=False)
"""The access log says more of a call than Ray Serve's own, whose line is written twice: to its file
and to the process's output. It took a third of what a replica's event loop does for a call."""

ELSEWHERE = ("address", "host", "http_port", "grpc_port")
"""What a Serve config file says itself."""


def build(
    config: ServeConfig, num_cpus: float, *, with_edges: bool = False
) -> ray.serve.Application:
    """Describe the application; a replica asks Ray for `num_cpus`, computes with config.threads.

    One whose model lies on shards asks for nothing itself: each of its shards does.
    Queues: an engine holds max_batch_size + max_queue requests and refuses the next. Ray Serve lets
    through twice as many, so that the engine is asked and its refusal heard; then it refuses too.
    `with_edges`: a second deployment sees to them, since no command does.
    """
    replicas, health = config.replicas, config.health
    bound = 2 * (config.engine.max_batch_size + config.engine.max_queue)
    deployment = ray.serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options={
            "num_cpus": num_cpus if config.parallel.world == 1 else 0,
            "num_gpus": int(config.device == "cuda"),
            "runtime_env": {"env_vars": env.replica_environment()},
        },
        user_config=asdict(Settings(checkpoint=str(config.checkpoint))),
        max_ongoing_requests=bound,
        max_queued_requests=bound,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1.0),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=health.drain_s,
        health_check_period_s=health.period_s,
        max_constructor_retry_count=2,
        logging_config=LOGGING,
    )(ray.serve.ingress()(Generator))
    if replicas.min == replicas.max:
        deployment = deployment.options(num_replicas=replicas.max)
    else:
        scaling = autoscaling(replicas, config.scaling)
        deployment = deployment.options(autoscaling_config=scaling)
    beside = (keeper(config),) if with_edges else ()
    return deployment.bind(config, num_cpus, *beside)


def autoscaling(replicas: ReplicasConfig, scaling: ScalingConfig) -> AutoscalingConfig:
    """What Ray Serve is told of scaling: our policy over tokens, its own delays."""
    initial = max(1, replicas.min) if replicas.initial is None else replicas.initial
    targets = ("target_tokens", "kv_ceiling", "slack")
    with warnings.catch_warnings():
        # metrics_interval_s is deprecated for an environment variable of every process of Ray's.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            initial_replicas=initial,
            look_back_period_s=scaling.look_back_s,
            metrics_interval_s=scaling.look_back_s / REPORTS_A_LOOK,
            upscale_delay_s=scaling.up_delay_s,
            downscale_delay_s=scaling.down_delay_s,
            downscale_to_zero_delay_s=scaling.zero_delay_s,
            policy=AutoscalingPolicy(
                policy_function=TokenPolicy,
                policy_kwargs={name: getattr(scaling, name) for name in targets},
            ),
        )


def from_args(args: dict[str, Any]) -> ray.serve.Application:
    """The application of a Serve config file or a RayService: `import_path: serve.app:from_args`.

    `args` holds the keys of ServeConfig; `name` should be the application's. Ports, host and
    address are the file's own. A replica asks for as many CPUs as `threads` says, at least 1. With
    `edge.port` every node gets an edge.
    Raises ConfigError, and CheckpointError or DataError where there is no checkpoint.
    """
    given = set(args) & set(ELSEWHERE)
    if given:
        raise ConfigError(
            f"args: {', '.join(sorted(given))} cannot be set here; Ray Serve's own file sets ports "
            "and host (http_options, grpc_options)"
        )
    config = load_config(ServeConfig, args)
    if config.edge.only or config.edge.port == 0:
        raise ConfigError(
            "args: edge.port must be a port here, the same on every node; for edge.only leave "
            "grpc_options out of Ray Serve's own file"
        )
    config = dataclasses.replace(
        config, checkpoint=pinned(config.checkpoint), threads=max(1, config.threads)
    )
    return build(config, config.threads, with_edges=config.edge.port is not None)
