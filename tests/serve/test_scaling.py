"""How many replicas: the decision alone, and through Ray Serve's own contexts."""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from gptmoe.errors import ConfigError
from gptmoe.generate.stats import EngineStats
from serve.scaling import (
    Load,
    ScalingConfig,
    Targets,
    TokenPolicy,
    autoscaling_stats,
    desired,
    load_of,
)

TARGETS = Targets(target_tokens=1000, kv_ceiling=0.8, slack=0.2)
DEPLOYMENT = DeploymentID("Generator", "poems")
BUSY = EngineStats(running=4, waiting=4, running_tokens=1200, waiting_tokens=1200)
IDLE = EngineStats()


def context(
    replicas: Sequence[EngineStats | None],
    *,
    target: int | None = None,
    outside: float = 0.0,
    ongoing: float | None = None,
    bounds: tuple[int, int] = (1, 8),
    config: AutoscalingConfig | None = None,
    state: dict[str, Any] | None = None,
) -> AutoscalingContext:
    """As Ray's controller makes it; None: a replica that has said nothing yet."""
    ids = [ReplicaID(str(number), DEPLOYMENT) for number in range(len(replicas))]
    metrics: dict[str, dict[ReplicaID, float]] = {}
    for replica, stats in zip(ids, replicas, strict=True):
        for name, value in (autoscaling_stats(stats) if stats else {}).items():
            metrics.setdefault(name, {})[replica] = value
    known = sum(stats.running + stats.waiting for stats in replicas if stats)
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="Generator",
        app_name="poems",
        current_num_replicas=len(replicas),
        target_num_replicas=len(replicas) if target is None else target,
        running_replicas=ids,
        total_num_requests=lambda: known + outside if ongoing is None else ongoing,
        total_queued_requests=lambda: outside,
        aggregated_metrics=lambda: metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=bounds[0],
        capacity_adjusted_max_replicas=bounds[1],
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=config,
    )


def decide(replicas: Sequence[EngineStats | None], **kwargs: Any) -> int:
    return TokenPolicy(1000, 0.8, 0.2)(context(replicas, **kwargs))[0]


def test_what_a_replica_reports() -> None:
    stats = EngineStats(
        running=2, waiting=3, running_tokens=40, waiting_tokens=60, kv_blocks=8, kv_used_blocks=2
    )
    assert autoscaling_stats(stats) == {
        "queued_tokens": 60.0,
        "running_tokens": 40.0,
        "kv_use": 0.25,
        "waiting": 3.0,
        "running": 2.0,
    }


def test_tokens_decide_whatever_the_number_of_requests() -> None:
    one_long = EngineStats(running=1, running_tokens=2500)
    many_short = EngineStats(running=4, waiting=60, running_tokens=100, waiting_tokens=800)
    assert decide([one_long]) == 3
    assert decide([many_short]) == 1


def test_queued_and_running_tokens_of_all_replicas_count() -> None:
    assert decide([BUSY, BUSY]) == 5  # 4800 tokens
    assert load_of(context([BUSY, IDLE])).tokens == 2400


def test_a_full_kv_cache_needs_a_replica_though_tokens_are_few() -> None:
    full = EngineStats(running=4, running_tokens=10, kv_blocks=100, kv_used_blocks=90)
    assert decide([full]) == 2
    assert decide([full, full, IDLE], target=3) == 3


def test_fewer_only_with_slack() -> None:
    """1800 tokens fill two replicas to 90 %: three stay. 1500: two are enough."""

    def shared(tokens: int) -> list[EngineStats]:
        return [EngineStats(running=1, running_tokens=tokens // 3)] * 3

    assert decide(shared(1800)) == 3
    assert decide(shared(1500)) == 2


def test_nothing_to_do_is_no_replica_where_that_is_allowed() -> None:
    assert decide([IDLE]) == 1
    assert decide([IDLE], bounds=(0, 8)) == 0


def test_a_call_that_no_engine_knows_keeps_a_replica() -> None:
    assert decide([IDLE], bounds=(0, 8), ongoing=1.0) == 1


def test_what_an_edge_asks_its_replicas_keeps_none() -> None:
    assert decide([IDLE], bounds=(0, 8), ongoing=0.01) == 0
    assert decide([IDLE], bounds=(0, 8), ongoing=0.01, outside=1) == 1


def test_a_replica_that_said_nothing_yet_is_not_taken_for_idle() -> None:
    assert decide([IDLE, None, None]) == 3
    assert decide([IDLE], target=3) == 3  # two still start


def test_requests_without_a_replica_count_with_the_tokens_of_the_others() -> None:
    assert decide([BUSY]) == 3  # 2400 tokens, 300 a request
    assert decide([BUSY], outside=6) == 5  # and 1800 more
    assert decide([], target=0, outside=6, bounds=(0, 8)) == 1  # nobody knows theirs: wake up one


def test_the_bounds_hold() -> None:
    crowd = EngineStats(running=1, running_tokens=10**6)
    assert decide([crowd], bounds=(1, 4)) == 4
    assert decide([IDLE] * 3, bounds=(2, 4)) == 2


loads = st.builds(
    Load,
    replicas=st.integers(0, 20),
    known=st.booleans(),
    tokens=st.floats(0, 1e6),
    kv_use=st.floats(0, 20),
    requests=st.floats(0, 100),
    outside=st.floats(0, 100),
    ongoing=st.floats(0, 100),
)


@given(loads)
def test_the_decision_is_stable_and_enough(load: Load) -> None:
    count = desired(load, TARGETS)
    assert count * TARGETS.target_tokens >= load.tokens * (1 - 1e-6)
    assert count * TARGETS.kv_ceiling >= load.kv_use * (1 - 1e-6)
    again = Load(**{name: getattr(load, name) for name in Load.__slots__} | {"replicas": count})
    if load.known:
        assert desired(again, TARGETS) == count, "the same load would be decided anew"


@given(loads, st.floats(0, 1e5))
def test_more_work_never_needs_fewer(load: Load, more: float) -> None:
    heavier = {name: getattr(load, name) for name in Load.__slots__}
    heavier["tokens"] += more
    assert desired(Load(**heavier), TARGETS) >= desired(load, TARGETS)


def scaled(up_delay_s: float = 0.0, down_delay_s: float = 0.0, **more: Any) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=0,
        max_replicas=8,
        upscale_delay_s=up_delay_s,
        downscale_delay_s=down_delay_s,
        policy=AutoscalingPolicy(
            policy_function=TokenPolicy,
            policy_kwargs={"target_tokens": 1000, "kv_ceiling": 0.8, "slack": 0.2},
        ),
        **more,
    )


def through_ray(config: AutoscalingConfig, replicas: Sequence[EngineStats], **kwargs: Any) -> int:
    """One decision as the controller makes it: delays, cold start, the pickled policy."""
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    ctx = context(replicas, bounds=(0, 8), config=config, **kwargs)
    count, _ = _apply_autoscaling_config(policy)(ctx)
    return math.ceil(count)


def test_ray_applies_its_delays_to_it() -> None:
    assert through_ray(scaled(), [BUSY]) == 3
    assert through_ray(scaled(up_delay_s=30), [BUSY]) == 1
    assert through_ray(scaled(), [IDLE] * 3) == 1  # to zero only from one
    assert through_ray(scaled(down_delay_s=30), [IDLE] * 3) == 3
    assert through_ray(scaled(), [IDLE]) == 0
    assert through_ray(scaled(downscale_to_zero_delay_s=30), [IDLE]) == 1


def test_ray_wakes_up_the_first_replica_at_once() -> None:
    assert through_ray(scaled(up_delay_s=30), [], target=0, outside=1) == 1


def test_the_controller_needs_none_of_our_code(tmp_path: Path) -> None:
    """The controller's process may have been started from anywhere."""
    pickled = tmp_path / "policy"
    pickled.write_bytes(scaled().policy.get_serialized_policy_def())
    script = (
        "import pathlib, sys\n"
        "from ray import cloudpickle\n"
        "policy = cloudpickle.loads(pathlib.Path(sys.argv[1]).read_bytes())(1000, 0.8, 0.2)\n"
        "class Context:\n"
        "    aggregated_metrics = {'queued_tokens': {1: 2500.0}, 'waiting': {1: 1.0}}\n"
        "    current_num_replicas = target_num_replicas = 1\n"
        "    total_queued_requests = total_num_requests = 0.0\n"
        "    capacity_adjusted_min_replicas, capacity_adjusted_max_replicas = 0, 8\n"
        "print(policy(Context())[0])\n"
        "assert 'gptmoe' not in sys.modules and 'serve' not in sys.modules\n"
    )
    command = [sys.executable, "-I", "-c", script, str(pickled)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_tokens": 0}, "scaling.target_tokens=0 must be at least 1"),
        ({"kv_ceiling": 0.0}, "scaling.kv_ceiling=0.0 must be above 0, at most 1"),
        ({"kv_ceiling": 1.5}, "scaling.kv_ceiling=1.5 must be"),
        ({"slack": 1.0}, "scaling.slack=1.0 must be at least 0 and below 1"),
        ({"look_back_s": 0.1}, "scaling.look_back_s=0.1 must be at least 0.5 seconds"),
        ({"up_delay_s": -1.0}, "scaling.up_delay_s=-1.0 must be 0 or a number of seconds"),
        ({"zero_delay_s": math.inf}, "scaling.zero_delay_s=inf must be"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScalingConfig(**settings)
