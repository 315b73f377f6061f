"""How many replicas the load needs: decided over tokens, not requests.

A request may be one token or ten thousand, so counting requests says little of the work that waits.
`TokenPolicy` is what Ray Serve's controller asks a few times a second. It gets there by value: this
module's policy needs nothing but the standard library and Ray.
"""

import math
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

from gptmoe.errors import ConfigError
from gptmoe.generate.stats import EngineStats

QUEUED_TOKENS = "queued_tokens"
RUNNING_TOKENS = "running_tokens"
KV_USE = "kv_use"
WAITING = "waiting"
RUNNING = "running"

PROBES = 0.5
"""Fewer calls at a time than this are what an edge asks its replicas every second: nobody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """When Ray Serve adds and removes replicas, where replicas.min is below replicas.max."""

    target_tokens: int = 4096
    """That a replica may still have to compute, of waiting and running requests together."""
    kv_ceiling: float = 0.85
    """Part of its KV cache that a replica's running requests may hold."""
    slack: float = 0.2
    """A replica goes only if the others stay this part below both: no to and fro."""
    look_back_s: float = 10.0
    """The load is averaged over the last seconds."""
    up_delay_s: float = 5.0
    """More must be needed for so long before replicas are added."""
    down_delay_s: float = 120.0
    """Fewer must do for so long before replicas go."""
    zero_delay_s: float = 600.0
    """Nobody must have asked for so long before the last one goes; only with replicas.min=0."""

    def __post_init__(self) -> None:
        if self.target_tokens < 1:
            raise ConfigError(f"scaling.target_tokens={self.target_tokens} must be at least 1")
        if not 0 < self.kv_ceiling <= 1:
            raise ConfigError(f"scaling.kv_ceiling={self.kv_ceiling} must be above 0, at most 1")
        if not 0 <= self.slack < 1:
            raise ConfigError(f"scaling.slack={self.slack} must be at least 0 and below 1")
        if not 0.5 <= self.look_back_s < math.inf:
            raise ConfigError(
                f"scaling.look_back_s={self.look_back_s} must be at least 0.5 seconds"
            )
        for name in ("up_delay_s", "down_delay_s", "zero_delay_s"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"scaling.{name}={value} must be 0 or a number of seconds")


def autoscaling_stats(stats: EngineStats) -> dict[str, float]:
    """What a replica tells the controller: the answer of `record_autoscaling_stats`."""
    return {
        QUEUED_TOKENS: float(stats.waiting_tokens),
        RUNNING_TOKENS: float(stats.running_tokens),
        KV_USE: stats.kv_use,
        WAITING: float(stats.waiting),
        RUNNING: float(stats.running),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a replica may be burdened with; see ScalingConfig."""

    target_tokens: float
    kv_ceiling: float
    slack: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """All replicas together, averaged over a while."""

    replicas: int
    """That are wanted now."""
    known: bool = True
    """Whether all of them run and have said what they have to do."""
    tokens: float = 0.0
    """Still to compute, of the requests in all engines."""
    kv_use: float = 0.0
    """Parts of a KV cache in use, summed: 1.5 fills one and a half."""
    requests: float = 0.0
    """In all engines."""
    outside: float = 0.0
    """Requests that have no replica yet: nobody knows their tokens."""
    ongoing: float = 0.0
    """Calls that are not answered yet, wherever they are."""


def desired(load: Load, targets: Targets) -> int:
    """The number of replicas that the load needs; 0 where there is none.

    More as soon as they are needed; fewer only if those that stay keep `slack` below their targets.
    """
    asked = load.ongoing >= PROBES or load.outside > 0 or load.requests > 0
    least = 1 if asked else 0
    needed = max(least, _enough(load, targets, 1.0))
    if needed >= load.replicas:
        return needed
    if not load.known:
        return load.replicas
    return min(load.replicas, max(least, _enough(load, targets, 1.0 - targets.slack)))


def _enough(load: Load, targets: Targets, part: float) -> int:
    """Replicas that hold the load at this part of their targets."""
    mean = load.tokens / load.requests if load.requests else 0.0
    tokens = load.tokens + load.outside * min(mean, targets.target_tokens)
    by_tokens = tokens / (targets.target_tokens * part)
    by_kv = load.kv_use / (targets.kv_ceiling * part)
    return math.ceil(round(max(by_tokens, by_kv), 6))


class TokenPolicy:
    """Ray Serve's `policy(ctx)`. Ray adds the delays, and wakes up the first of 0 replicas itself:
    at once, for the first request that waits."""

    def __init__(self, target_tokens: float, kv_ceiling: float, slack: float) -> None:
        self._targets = Targets(target_tokens=target_tokens, kv_ceiling=kv_ceiling, slack=slack)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas, within the bounds; it keeps no state of its own."""
        wanted = desired(load_of(ctx), self._targets)
        least, most = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
        return max(least, min(most, wanted)), {}


def load_of(ctx: AutoscalingContext) -> Load:
    """What the controller knows, as Load: sums over the replicas' `autoscaling_stats`."""
    metrics = ctx.aggregated_metrics or {}

    def total(name: str) -> float:
        return float(sum(metrics.get(name, {}).values()))

    heard_of = len(metrics.get(QUEUED_TOKENS, {}))
    return Load(
        replicas=ctx.target_num_replicas,
        known=heard_of == ctx.current_num_replicas >= ctx.target_num_replicas,
        tokens=total(QUEUED_TOKENS) + total(RUNNING_TOKENS),
        kv_use=total(KV_USE),
        requests=total(WAITING) + total(RUNNING),
        outside=float(ctx.total_queued_requests or 0.0),
        ongoing=float(ctx.total_num_requests or 0.0),
    )
