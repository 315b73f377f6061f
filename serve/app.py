"""ServeConfig -> Ray Serve application: one ingress deployment, called after what it owns."""

from dataclasses import asdict

import ray.serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from .config import ServeConfig
from .controller import Settings
from .replica import Generator

DEPLOYMENT = "Generator"


def build(config: ServeConfig, num_cpus: float) -> ray.serve.Application:
    """Describe the application; a replica asks Ray for `num_cpus`, computes with config.threads.

    One whose model lies on shards asks for nothing itself: each of its shards does.
    Queues: an engine holds max_batch_size + max_queue requests and refuses the next. Ray Serve lets
    through twice as many, so that the engine is asked and its refusal heard; then it refuses too.
    """
    replicas, health = config.replicas, config.health
    bound = 2 * (config.engine.max_batch_size + config.engine.max_queue)
    deployment = ray.serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": num_cpus if config.parallel.world == 1 else 0},
        user_config=asdict(Settings(checkpoint=str(config.checkpoint))),
        max_ongoing_requests=bound,
        max_queued_requests=bound,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1.0),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=health.drain_s,
        health_check_period_s=health.period_s,
        max_constructor_retry_count=2,
    )(ray.serve.ingress()(Generator))
    if replicas.min == replicas.max:
        return deployment.options(num_replicas=replicas.max).bind(config, num_cpus)
    scaling = AutoscalingConfig(
        min_replicas=replicas.min,
        max_replicas=replicas.max,
        initial_replicas=replicas.initial,
        target_ongoing_requests=replicas.target_ongoing,
    )
    return deployment.options(autoscaling_config=scaling).bind(config, num_cpus)
