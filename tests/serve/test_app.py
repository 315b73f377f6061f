"""What Ray Serve is told, without a cluster."""

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from ray.serve.config import BackpressureConfig

from gptmoe.errors import ConfigError
from gptmoe.generate.scheduler import EngineConfig
from serve import app
from serve.app import build
from serve.config import HealthConfig, ReplicasConfig, ServeConfig
from serve.scaling import ScalingConfig


def deployment(**settings: Any) -> Any:
    application = build(ServeConfig(checkpoint=Path("a"), **settings), num_cpus=2)
    return application._bound_deployment


def test_the_deployment_is_called_after_what_it_owns() -> None:
    generator = deployment()
    assert generator.name == "Generator"
    assert generator.ray_actor_options["num_cpus"] == 2


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda", 1)])
def test_a_replica_on_a_gpu_asks_for_one(device: Literal["cpu", "cuda"], gpus: int) -> None:
    assert deployment(device=device).ray_actor_options["num_gpus"] == gpus


def test_a_fixed_number_of_replicas() -> None:
    generator = deployment(replicas=ReplicasConfig(min=3, max=3))
    assert generator.num_replicas == 3
    assert generator._deployment_config.autoscaling_config is None


def test_a_scaled_number_of_replicas() -> None:
    replicas = ReplicasConfig(min=1, max=4, initial=2)
    scaling = ScalingConfig(target_tokens=600, look_back_s=5.0, down_delay_s=7.0, zero_delay_s=9.0)
    made = deployment(replicas=replicas, scaling=scaling)._deployment_config.autoscaling_config
    assert (made.min_replicas, made.max_replicas, made.initial_replicas) == (1, 4, 2)
    assert (made.look_back_period_s, made.metrics_interval_s) == (5.0, 1.0)
    assert (made.upscale_delay_s, made.downscale_delay_s) == (5.0, 7.0)
    assert made.downscale_to_zero_delay_s == 9.0
    assert made.policy.policy_function == "serve.scaling.TokenPolicy"
    assert made.policy.policy_kwargs == {"target_tokens": 600, "kv_ceiling": 0.85, "slack": 0.2}


def test_scaling_to_zero_starts_with_one_that_shows_it_can() -> None:
    replicas = ReplicasConfig(min=0, max=2)
    made = deployment(replicas=replicas)._deployment_config.autoscaling_config
    assert (made.min_replicas, made.initial_replicas) == (0, 1)


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


def test_a_serve_config_file_of_rays_builds_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "pinned", lambda location: location / "checkpoints" / "step-1")
    args = {"name": "poems", "checkpoint": "/data/run", "replicas": {"min": 2, "max": 2}}
    built = app.from_args(args)._bound_deployment
    config, num_cpus = built.init_args
    assert config.checkpoint == Path("/data/run/checkpoints/step-1")
    assert (config.name, config.threads, num_cpus, built.num_replicas) == ("poems", 1, 1, 2)


def test_edges_are_a_deployment_of_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "pinned", lambda location: location)
    args = {"checkpoint": "/data/run", "edge": {"port": 9443}}
    beside = app.from_args(args)._bound_deployment.init_args[2]
    keeper = beside._bound_deployment
    assert keeper.name == "Edges"
    assert keeper.num_replicas == 1
    assert keeper.ray_actor_options["num_cpus"] == 0
    assert keeper.init_args[0].edge.port == 9443


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"checkpoint": "/a", "http_port": 1, "host": "x"}, "args: host, http_port cannot be set"),
        ({"checkpoint": "/a", "thread": 1}, "unknown config key thread; did you mean threads?"),
        ({"name": "poems"}, "key checkpoint is missing"),
        ({"checkpoint": "/a", "edge": {"port": 0}}, "args: edge.port must be a port here"),
        ({"checkpoint": "/a", "edge": {"only": True}}, "leave grpc_options out of"),
    ],
)
def test_what_such_a_file_cannot_say(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        app.from_args(args)
