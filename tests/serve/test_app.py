"""What Ray Serve is told, without a cluster."""

from pathlib import Path
from typing import Any

import pytest
from ray.serve.config import BackpressureConfig

from gptmoe.generate.scheduler import EngineConfig
from serve.app import build
from serve.config import HealthConfig, ReplicasConfig, ServeConfig


def deployment(**settings: Any) -> Any:
    application = build(ServeConfig(checkpoint=Path("a"), **settings), num_cpus=2)
    return application._bound_deployment


def test_the_deployment_is_called_after_what_it_owns() -> None:
    generator = deployment()
    assert generator.name == "Generator"
    assert generator.ray_actor_options["num_cpus"] == 2


def test_a_fixed_number_of_replicas() -> None:
    generator = deployment(replicas=ReplicasConfig(min=3, max=3))
    assert generator.num_replicas == 3
    assert generator._deployment_config.autoscaling_config is None


def test_a_scaled_number_of_replicas() -> None:
    replicas = ReplicasConfig(min=1, max=4, initial=2, target_ongoing=6)
    scaling = deployment(replicas=replicas)._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.initial_replicas) == (1, 4, 2)
    assert scaling.target_ongoing_requests == 6


def test_queues_are_bounded_and_the_engine_refuses_first() -> None:
    generator = deployment(engine=EngineConfig(max_batch_size=2, max_queue=3))
    assert generator.max_ongoing_requests == generator.max_queued_requests == 10 > 2 + 3
    assert generator._deployment_config.backpressure_config == BackpressureConfig(
        status_code=429, retry_after_s=1.0
    )


@pytest.mark.parametrize("period_s", [1.0, 10.0])
def test_health_checks_follow_the_config(period_s: float) -> None:
    config = deployment(health=HealthConfig(period_s=period_s, drain_s=7.0))._deployment_config
    assert config.health_check_period_s == period_s
    assert config.graceful_shutdown_timeout_s == 7.0
