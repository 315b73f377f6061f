"""What an engine does, as metrics: seen after every step, given to Ray about once a second.

The engine's thread calls `EngineMetrics.watch`, so it only notes numbers; these go to Ray's metrics
in one go, once a second and when the engine runs out of work. See catalogue.py for the names.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ray.util import metrics as ray_metrics

from gptmoe.generate.delta import Delta, Timings
from gptmoe.generate.stats import EngineStats

from .catalogue import CATALOGUE, COMMON_LABELS, MODEL, REPLICA

FLUSH_EVERY_S = 1.0
FORGET_AFTER_S = 60.0
"""An answer without tokens for so long was left by its caller, or counts as new if it goes on."""

NO_LABELS: Mapping[str, str] = {}


class Observer(Protocol):
    """Who is told what an engine did."""

    def watch(self, stats: EngineStats, deltas: Sequence[Delta], took_s: float) -> None:
        """After each step of `took_s` seconds, in the engine's thread; so it must return at once.

        Also, without deltas and with 0 s, when the last request was taken out between two steps,
        and now and then while there is none: Ray forgets gauges that nobody sets.
        """
        ...


class Sink(Protocol):
    """Where metrics of the catalogue go."""

    def count(self, name: str, more: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Add to a counter; more than 0."""
        ...

    def set(self, name: str, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """Set a gauge."""
        ...

    def observe(self, name: str, values: Sequence[float]) -> None:
        """Put values into a histogram."""
        ...


class RaySink:
    """ray.util.metrics: Prometheus finds them at the metrics port of the node."""

    def __init__(self, model: str, replica: str) -> None:
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._histograms: dict[str, ray_metrics.Histogram] = {}
        common = {MODEL: model, REPLICA: replica}
        for name, metric in CATALOGUE.items():
            keys = (*COMMON_LABELS, *metric.labels)
            if metric.kind == "counter":
                self._counters[name] = ray_metrics.Counter(name, metric.meaning, keys)
                self._counters[name].set_default_tags(common)
            elif metric.kind == "gauge":
                self._gauges[name] = ray_metrics.Gauge(name, metric.meaning, keys)
                self._gauges[name].set_default_tags(common)
            else:
                bounds = list(metric.buckets)
                made = ray_metrics.Histogram(name, metric.meaning, bounds, keys)
                self._histograms[name] = made
                made.set_default_tags(common)

    def count(self, name: str, more: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """See Sink.count."""
        self._counters[name].inc(more, dict(labels))

    def set(self, name: str, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        """See Sink.set."""
        self._gauges[name].set(value, dict(labels))

    def observe(self, name: str, values: Sequence[float]) -> None:
        """See Sink.observe."""
        histogram = self._histograms[name]
        for value in values:
            histogram.observe(value)


COUNTERS: Mapping[str, Callable[[EngineStats], int]] = {
    "vllm_prompt_tokens": lambda stats: stats.prompt_tokens,
    "vllm_generation_tokens": lambda stats: stats.generated_tokens,
    "vllm_prefix_cache_queries": lambda stats: stats.prefix_queries,
    "vllm_prefix_cache_hits": lambda stats: stats.prefix_hits,
    "vllm_num_preemptions": lambda stats: stats.preemptions,
    "gptmoe_refused_requests": lambda stats: stats.refused,
}
"""What grows in EngineStats."""

GAUGES: Mapping[str, Callable[[EngineStats], float]] = {
    "vllm_num_requests_running": lambda stats: stats.running,
    "vllm_num_requests_waiting": lambda stats: stats.waiting,
    "vllm_kv_cache_usage_perc": lambda stats: stats.kv_use,
    "gptmoe_tokens_per_second": lambda stats: stats.tokens_per_s if stats.running else 0.0,
    "gptmoe_waiting_tokens": lambda stats: stats.waiting_tokens,
    "gptmoe_running_tokens": lambda stats: stats.running_tokens,
}
"""What EngineStats says of now."""


@dataclass(slots=True)
class _Answer:
    """One that is being given."""

    last_s: float
    tokens: int


class EngineMetrics:
    """An Observer that gives the catalogue's metrics to a sink.

    One thread calls `watch`, another may call `experts`.
    """

    def __init__(
        self,
        sink: Sink,
        since: EngineStats | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`since`: what happened before does not count."""
        self.stats = since or EngineStats()
        """The newest."""
        self._sink = sink
        self._clock = clock
        self._flushed = self.stats
        self._flushed_s = clock()
        self._answers: dict[tuple[str, int], _Answer] = {}
        self._values: defaultdict[str, list[float]] = defaultdict(list)
        self._ended: defaultdict[str, int] = defaultdict(int)
        self._rows: dict[int, list[int]] = {}
        self._imbalance: dict[int, float] = {}

    def watch(self, stats: EngineStats, deltas: Sequence[Delta], took_s: float) -> None:
        """See Observer.watch."""
        now_s = self._clock()
        if stats.steps != self.stats.steps:
            self._values["gptmoe_step_seconds"].append(took_s)
            if tokens := _tokens(stats) - _tokens(self.stats):
                self._values["vllm_iteration_tokens_total"].append(tokens)
        self.stats = stats
        for delta in deltas:
            self._see(delta, now_s)
        idle = not (stats.running or stats.waiting)
        if idle or now_s - self._flushed_s >= FLUSH_EVERY_S:
            self._flush(now_s)

    def experts(self, rows: Mapping[int, Sequence[int]]) -> None:
        """Give out the rows that each expert answered since the start, by layer."""
        for layer, total in rows.items():
            before = self._rows.get(layer, [0] * len(total))
            # Fewer than before: a process that counted them was replaced, and counts anew.
            more = [
                now - then if now >= then else now for now, then in zip(total, before, strict=True)
            ]
            self._rows[layer] = list(total)
            for expert, count in enumerate(more):
                if count:
                    labels = {"layer": str(layer), "expert": str(expert)}
                    self._sink.count("gptmoe_expert_rows", count, labels)
            if any(more):
                self._imbalance[layer] = max(more) * len(more) / sum(more)
                self._set_imbalance(layer)

    def _set_imbalance(self, layer: int) -> None:
        ratio = self._imbalance[layer]
        self._sink.set("gptmoe_expert_imbalance_ratio", ratio, {"layer": str(layer)})

    def _see(self, delta: Delta, now_s: float) -> None:
        key, count = (delta.request_id, delta.index), len(delta.token_ids)
        answer = self._answers.get(key)
        if answer is None:
            answer = self._answers[key] = _Answer(now_s, 0)
        elif count:
            gap_s = (now_s - answer.last_s) / count
            self._values["vllm_inter_token_latency_seconds"] += [gap_s] * count
        answer.last_s = now_s
        answer.tokens += count
        if delta.finish_reason:
            del self._answers[key]
            self._end(delta, answer.tokens)

    def _end(self, delta: Delta, tokens: int) -> None:
        self._ended[delta.finish_reason] += 1
        if delta.index == 0:  # once a request, however many answers it has
            self._values["vllm_request_prompt_tokens"].append(delta.prompt_tokens)
        self._values["vllm_request_generation_tokens"].append(tokens)
        if delta.timings is not None:
            for name, value_s in durations(delta.timings, tokens).items():
                self._values[name].append(value_s)

    def _flush(self, now_s: float) -> None:
        for name, of in GAUGES.items():
            self._sink.set(name, of(self.stats))
        for layer in list(self._imbalance):  # `experts` may add one meanwhile
            self._set_imbalance(layer)
        for name, of in COUNTERS.items():
            if (more := of(self.stats) - of(self._flushed)) > 0:
                self._sink.count(name, more)
        for name, values in self._values.items():
            self._sink.observe(name, values)
        for reason, count in self._ended.items():
            self._sink.count("vllm_request_success", count, {"finished_reason": reason})
        self._values.clear()
        self._ended.clear()
        self._flushed, self._flushed_s = self.stats, now_s
        silent = [k for k, one in self._answers.items() if now_s - one.last_s > FORGET_AFTER_S]
        for key in silent:
            del self._answers[key]


def durations(timings: Timings, tokens: int) -> dict[str, float]:
    """The parts of an answer's time, by metric; without tokens there was no first one."""
    found = {
        "vllm_request_queue_time_seconds": timings.queue_s,
        "vllm_request_inference_time_seconds": timings.total_s - timings.queue_s,
        "vllm_e2e_request_latency_seconds": timings.total_s,
    }
    if tokens:
        decode_s = timings.total_s - timings.first_token_s
        found["vllm_time_to_first_token_seconds"] = timings.first_token_s
        found["vllm_request_prefill_time_seconds"] = timings.first_token_s - timings.queue_s
        found["vllm_request_decode_time_seconds"] = decode_s
        if tokens > 1:
            found["vllm_request_time_per_output_token_seconds"] = decode_s / (tokens - 1)
    return found


def _tokens(stats: EngineStats) -> int:
    return stats.prompt_tokens + stats.generated_tokens
