"""Every metric that a replica gives out: one table, from which they are made, tested and drawn.

Names and labels of the first part are vLLM's, with an underscore for its colon: Ray exports no name
with a colon, and Ray's own "Serve LLM" dashboard asks for these. Ray puts `ray_` before each name,
`_total` behind a counter, and the label `WorkerId` to it.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Literal

MODEL = "model_name"
REPLICA = "ReplicaId"
COMMON_LABELS = (MODEL, REPLICA)
"""Of every metric; vLLM has the same two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    """With the unit, if the name does not say it."""
    labels: tuple[str, ...] = ()
    """Beside COMMON_LABELS."""
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """What Prometheus sees."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_sum", f"{name}_count")
        return (f"{name}_total",) if self.kind == "counter" else (name,)


def steps(least: float, decades: int, fine: bool = True) -> tuple[float, ...]:
    """Bounds of buckets: ten a decade (each 26 % above the last), or five."""
    series = (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8) if fine else (1, 1.6, 2.5, 4, 6.3)
    bounds = (least * number * 10**decade for decade in range(decades) for number in series)
    return (*(float(f"{bound:.3g}") for bound in bounds), float(least * 10**decades))


_STEP_S = steps(1e-4, 5)  # 0.1 ms to 10 s
_WAIT_S = steps(1e-3, 6, fine=False)  # 1 ms to 1,000 s
_FINE_WAIT_S = steps(1e-3, 6)
_TOKENS = steps(1, 5, fine=False)  # to 100,000


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name=name, kind="gauge", meaning=meaning, labels=labels)


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name=name, kind="counter", meaning=meaning, labels=labels)


def _histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=name, kind="histogram", meaning=meaning, buckets=buckets)


VLLM = (
    _gauge("vllm_num_requests_running", "requests with a place in the batch"),
    _gauge("vllm_num_requests_waiting", "requests without one"),
    _gauge("vllm_kv_cache_usage_perc", "part of the KV cache that running requests hold, 0 to 1"),
    _counter("vllm_prompt_tokens", "tokens of prompts computed, without those found in the cache"),
    _counter("vllm_generation_tokens", "tokens generated"),
    _counter("vllm_prefix_cache_queries", "tokens of prompts looked up in the prefix cache"),
    _counter("vllm_prefix_cache_hits", "tokens of them that were found"),
    _counter("vllm_num_preemptions", "requests put back to be computed again"),
    _counter("vllm_request_success", "answers that ended, by why", "finished_reason"),
    _histogram("vllm_time_to_first_token_seconds", "from arrival at the engine", _FINE_WAIT_S),
    _histogram("vllm_inter_token_latency_seconds", "between two tokens of an answer", _STEP_S),
    _histogram(
        "vllm_request_time_per_output_token_seconds",
        "mean time between the tokens of an answer",
        _STEP_S,
    ),
    _histogram("vllm_e2e_request_latency_seconds", "from arrival to the end", _FINE_WAIT_S),
    _histogram("vllm_request_queue_time_seconds", "from arrival to the first step", _WAIT_S),
    _histogram("vllm_request_prefill_time_seconds", "first step to first token", _WAIT_S),
    _histogram("vllm_request_decode_time_seconds", "first token to the end", _WAIT_S),
    _histogram("vllm_request_inference_time_seconds", "first step to the end", _WAIT_S),
    _histogram("vllm_request_prompt_tokens", "tokens of the prompt of a request", _TOKENS),
    _histogram("vllm_request_generation_tokens", "tokens of an answer", _TOKENS),
    _histogram("vllm_iteration_tokens_total", "tokens of one step", _TOKENS),
)
"""As in vLLM."""

OURS = (
    _histogram("gptmoe_step_seconds", "one step of the engine", _STEP_S),
    _gauge("gptmoe_tokens_per_second", "generated and computed, over the last seconds of work"),
    _gauge("gptmoe_waiting_tokens", "that waiting requests may still compute"),
    _gauge("gptmoe_running_tokens", "that running requests may still compute"),
    _counter("gptmoe_refused_requests", "requests that a full queue refused"),
    _counter(
        "gptmoe_expert_rows",
        "rows that an expert answered, padding of small steps included",
        "layer",
        "expert",
    ),
    _gauge(
        "gptmoe_expert_imbalance_ratio",
        "rows of a layer's busiest expert over their mean, since the last look; 1: all alike",
        "layer",
    ),
)
"""What vLLM has no name for."""

CATALOGUE = {metric.name: metric for metric in (*VLLM, *OURS)}

EXPORTED = frozenset(chain.from_iterable(metric.exported for metric in CATALOGUE.values()))
"""All names that Prometheus sees."""

NOT_APPLICABLE = {
    "ray_vllm_num_requests_swapped": "preempted requests are computed again, none is swapped out",
    "ray_vllm_nixl_": "prompts are not computed on other replicas: no KV cache travels",
    "ray_vllm_kv_offload_": "the KV cache has one tier",
    "ray_vllm_external_prefix_cache_": "the prefix cache has one tier",
}
"""Names (or their beginnings) in Ray's dashboard that stay empty, and why."""
