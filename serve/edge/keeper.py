"""The edges of an application that Ray Serve builds itself: a deployment sees to them."""

from typing import Any

import ray.serve

from serve.config import ServeConfig

from .actor import Edges

DEPLOYMENT = "Edges"
_ANSWER_WITHIN_S = 5.0
_FREE_S = 2.0
"""For edges to be gone after their running calls."""


class EdgeKeeper:
    """Keeps one edge on every node, as `gptmoe serve` does. Its one replica asks for no CPU."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises ConfigError if one cannot listen; Ray Serve then shows the sentence."""
        self._edges, self._grace_s = Edges(config), config.health.drain_s
        self._edges.begin()
        self._edges.check()

    def check_health(self) -> None:
        """Called by Ray Serve from time to time."""
        self._edges.check(_ANSWER_WITHIN_S)

    def __del__(self) -> None:
        """Called by Ray Serve when the application goes."""
        if hasattr(self, "_edges"):
            self._edges.stop(self._grace_s)


def keeper(config: ServeConfig) -> Any:
    """The deployment, for the ingress to be bound with."""
    deployment = ray.serve.deployment(
        name=DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.health.drain_s + _FREE_S,
        health_check_period_s=config.health.period_s,
        max_constructor_retry_count=2,
    )(EdgeKeeper)
    return deployment.bind(config)
