"""What an engine does, as numbers."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from ray.util import metrics as ray_metrics

from gptmoe.generate.delta import Delta, Timings
from gptmoe.generate.request import Request
from gptmoe.generate.stats import EngineStats
from serve.bridge import EngineThread
from serve.catalogue import CATALOGUE
from serve.metrics import NO_LABELS, EngineMetrics, RaySink, durations

Labels = tuple[tuple[str, str], ...]


class Recorded:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.counters: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self.gauges: dict[tuple[str, Labels], float] = {}
        self.histograms: defaultdict[str, list[float]] = defaultdict(list)
        self.calls = 0

    def count(self, name: str, more: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        assert CATALOGUE[name].kind == "counter"
        assert set(labels) == set(CATALOGUE[name].labels)
        assert more > 0
        self.counters[name, tuple(labels.items())] += more
        self.calls += 1

    def set(self, name: str, value: float, labels: Mapping[str, str] = NO_LABELS) -> None:
        assert CATALOGUE[name].kind == "gauge"
        assert set(labels) == set(CATALOGUE[name].labels)
        self.gauges[name, tuple(labels.items())] = value
        self.calls += 1

    def observe(self, name: str, values: Sequence[float]) -> None:
        assert CATALOGUE[name].kind == "histogram"
        self.histograms[name] += values
        self.calls += 1


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def sink() -> Recorded:
    return Recorded()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(sink: Recorded, clock: Clock) -> EngineMetrics:
    return EngineMetrics(sink, clock=clock)


def delta(request_id: str = "a", tokens: int = 1, reason: str = "", **more: Any) -> Delta:
    ids = tuple(range(tokens))
    return Delta(request_id=request_id, token_ids=ids, finish_reason=reason, **more)


def test_one_answer_becomes_its_times_and_tokens(
    metrics: EngineMetrics, sink: Recorded, clock: Clock
) -> None:
    timings = Timings(queue_s=0.25, first_token_s=0.5, total_s=1.0)
    metrics.watch(
        EngineStats(running=1, steps=1, prompt_tokens=5, generated_tokens=1), [delta()], 0.1
    )
    clock.now_s += 0.2
    metrics.watch(
        EngineStats(running=1, steps=2, prompt_tokens=5, generated_tokens=2), [delta()], 0.1
    )
    clock.now_s += 0.3
    end = delta(reason="length", prompt_tokens=5, timings=timings)
    metrics.watch(EngineStats(steps=3, prompt_tokens=5, generated_tokens=3), [end], 0.2)

    seen = dict(sink.histograms)
    assert seen.pop("vllm_inter_token_latency_seconds") == pytest.approx([0.2, 0.3])
    assert seen == {
        "gptmoe_step_seconds": [0.1, 0.1, 0.2],
        "vllm_iteration_tokens_total": [6, 1, 1],
        "vllm_time_to_first_token_seconds": [0.5],
        "vllm_request_time_per_output_token_seconds": [0.25],
        "vllm_e2e_request_latency_seconds": [1.0],
        "vllm_request_queue_time_seconds": [0.25],
        "vllm_request_prefill_time_seconds": [0.25],
        "vllm_request_decode_time_seconds": [0.5],
        "vllm_request_inference_time_seconds": [0.75],
        "vllm_request_prompt_tokens": [5],
        "vllm_request_generation_tokens": [3],
    }
    assert sink.counters == {
        ("vllm_prompt_tokens", ()): 5,
        ("vllm_generation_tokens", ()): 3,
        ("vllm_request_success", (("finished_reason", "length"),)): 1,
    }


def test_what_grows_and_what_is(metrics: EngineMetrics, sink: Recorded, clock: Clock) -> None:
    first = EngineStats(
        running=2, waiting=3, kv_blocks=8, kv_used_blocks=2, running_tokens=20, waiting_tokens=30,
        steps=1, prefix_queries=100, prefix_hits=40, preemptions=1, refused=2, tokens_per_s=50.0,
    )  # fmt: skip
    clock.now_s += 1.5
    metrics.watch(first, (), 0.1)
    clock.now_s += 1.5
    metrics.watch(EngineStats(steps=2, prefix_queries=150, prefix_hits=40, refused=3), (), 0.1)
    assert sink.counters == {
        ("vllm_prefix_cache_queries", ()): 150,
        ("vllm_prefix_cache_hits", ()): 40,
        ("vllm_num_preemptions", ()): 1,
        ("gptmoe_refused_requests", ()): 3,
    }
    assert sink.gauges["vllm_num_requests_running", ()] == 0
    metrics.watch(first, (), 0.0)
    clock.now_s += 1.5
    metrics.watch(first, (), 0.0)
    assert {name: value for (name, _), value in sink.gauges.items()} == {
        "vllm_num_requests_running": 2,
        "vllm_num_requests_waiting": 3,
        "vllm_kv_cache_usage_perc": 0.25,
        "gptmoe_tokens_per_second": 50.0,
        "gptmoe_waiting_tokens": 30,
        "gptmoe_running_tokens": 20,
    }


def test_a_busy_engine_hands_over_once_a_second(
    metrics: EngineMetrics, sink: Recorded, clock: Clock
) -> None:
    for step in range(1, 100):
        clock.now_s += 0.01
        metrics.watch(EngineStats(running=1, steps=step), [delta()], 0.01)
    assert sink.calls == 0
    clock.now_s += 0.01
    metrics.watch(EngineStats(running=1, steps=100), [delta()], 0.01)
    assert len(sink.histograms["gptmoe_step_seconds"]) == 100
    assert len(sink.histograms["vllm_inter_token_latency_seconds"]) == 99


def test_an_engine_out_of_work_hands_over_at_once(metrics: EngineMetrics, sink: Recorded) -> None:
    metrics.watch(EngineStats(running=1, steps=1), [delta()], 0.01)
    metrics.watch(EngineStats(steps=1), (), 0.0)  # its caller left
    assert sink.gauges["vllm_num_requests_running", ()] == 0
    assert sink.histograms["gptmoe_step_seconds"] == [0.01]


def test_several_answers_of_a_request_have_one_prompt(
    metrics: EngineMetrics, sink: Recorded
) -> None:
    ends = [delta(reason="stop", index=index, prompt_tokens=7) for index in range(3)]
    metrics.watch(EngineStats(steps=1), ends, 0.01)
    assert sink.histograms["vllm_request_prompt_tokens"] == [7]
    assert sink.histograms["vllm_request_generation_tokens"] == [1, 1, 1]
    assert sink.counters["vllm_request_success", (("finished_reason", "stop"),)] == 3


def test_a_delta_of_several_tokens_shares_its_time(
    metrics: EngineMetrics, sink: Recorded, clock: Clock
) -> None:
    metrics.watch(EngineStats(running=1, steps=1), [delta()], 0.01)
    clock.now_s += 0.4
    metrics.watch(EngineStats(steps=2), [delta(tokens=4, reason="stop")], 0.01)
    assert sink.histograms["vllm_inter_token_latency_seconds"] == pytest.approx([0.1] * 4)


def test_without_tokens_there_is_no_first_one() -> None:
    late = durations(Timings(queue_s=0.0, first_token_s=0.0, total_s=2.0), tokens=0)
    assert "vllm_time_to_first_token_seconds" not in late
    assert late["vllm_e2e_request_latency_seconds"] == 2.0
    one = durations(Timings(queue_s=0.1, first_token_s=0.5, total_s=0.5), tokens=1)
    assert "vllm_request_time_per_output_token_seconds" not in one


def test_answers_that_nobody_ends_are_forgotten(metrics: EngineMetrics, clock: Clock) -> None:
    for number in range(1000):
        metrics.watch(EngineStats(running=1, steps=number), [delta(str(number))], 0.01)
    clock.now_s += 61.0
    metrics.watch(EngineStats(running=1, steps=1000), [delta("last")], 0.01)
    assert set(metrics._answers) == {("last", 0)}


def test_what_happened_before_does_not_count(sink: Recorded) -> None:
    warm = EngineStats(steps=1, prompt_tokens=3, generated_tokens=1)
    metrics = EngineMetrics(sink, since=warm)
    metrics.watch(EngineStats(steps=2, prompt_tokens=5, generated_tokens=2), (), 0.01)
    assert sink.counters["vllm_prompt_tokens", ()] == 2
    assert sink.histograms["vllm_iteration_tokens_total"] == [3]


def test_the_load_of_experts(metrics: EngineMetrics, sink: Recorded) -> None:
    def rows(layer: int, expert: int) -> float:
        labels = (("layer", str(layer)), ("expert", str(expert)))
        return sink.counters["gptmoe_expert_rows", labels]

    metrics.experts({1: (30, 10, 0, 0), 3: (0, 0, 0, 0)})
    assert [rows(1, expert) for expert in range(4)] == [30, 10, 0, 0]
    assert sink.gauges == {("gptmoe_expert_imbalance_ratio", (("layer", "1"),)): 3.0}
    metrics.experts({1: (40, 20, 10, 10), 3: (5, 5, 5, 5)})
    assert [rows(1, expert) for expert in range(4)] == [40, 20, 10, 10]
    assert set(sink.gauges.values()) == {1.0}


def test_a_shard_that_counts_anew_takes_nothing_away(
    metrics: EngineMetrics, sink: Recorded
) -> None:
    metrics.experts({0: (100, 50)})
    metrics.experts({0: (4, 60)})
    labels = (("layer", "0"), ("expert", "0"))
    assert sink.counters["gptmoe_expert_rows", labels] == 104


def test_the_bridge_tells_the_observer(
    engine: Any, make_request: Callable[..., Request], wait_until: Callable[..., None]
) -> None:
    """At first, after each step, and when a caller who left takes the last request along."""
    seen: list[tuple[EngineStats, int, float]] = []

    class Watcher:
        def watch(self, stats: EngineStats, deltas: Sequence[Delta], took_s: float) -> None:
            seen.append((stats, len(deltas), took_s))

    bridge = EngineThread(engine, Watcher())

    async def listen() -> None:
        async for _ in bridge.stream(make_request(max_new_tokens=3)):
            pass
        leaving = bridge.stream(make_request("b", max_new_tokens=10**9))
        await anext(leaving)
        await leaving.aclose()

    try:
        asyncio.run(listen())
        wait_until(lambda: seen[-1][0].running == 0 and seen[-1][2] == 0.0)
    finally:
        bridge.stop()
    found = [(stats.steps, count) for stats, count, _ in seen[:4]]
    assert found == [(0, 0), (1, 1), (2, 1), (3, 1)]
    assert all(took_s > 0 for _, _, took_s in seen[1:4])


def test_the_bridge_tells_the_observer_of_an_abort_and_of_idle_times(
    engine: Any,
    make_request: Callable[..., Request],
    wait_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.bridge.WATCH_EVERY_S", 0.01)
    reasons: list[list[str]] = []

    class Watcher:
        def watch(self, stats: EngineStats, deltas: Sequence[Delta], took_s: float) -> None:
            reasons.append([delta.finish_reason for delta in deltas])

    bridge = EngineThread(engine, Watcher())

    async def abort() -> None:
        stream = bridge.stream(make_request("a", max_new_tokens=10**9))
        await anext(stream)
        assert await bridge.abort("a")
        await stream.aclose()

    try:
        wait_until(lambda: len(reasons) > 3)
        asyncio.run(abort())
        count = len(reasons)
        wait_until(lambda: len(reasons) > count + 3)
    finally:
        bridge.stop()
    assert reasons.count(["abort"]) == 1


def test_ray_gets_every_metric_of_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[str, float, dict[str, str]]] = []

    def record(self: Any, value: float, tags: Any = None) -> None:
        self._validate_tags(self._get_final_tags(tags))
        recorded.append((self.info["name"], value, dict(self._get_final_tags(tags))))

    monkeypatch.setattr(ray_metrics.Metric, "_record", record)
    sink = RaySink("poems", "abc")
    for name, metric in CATALOGUE.items():
        labels = dict.fromkeys(metric.labels, "1")
        if metric.kind == "histogram":
            sink.observe(name, [0.5, 2.0])
        else:
            (sink.count if metric.kind == "counter" else sink.set)(name, 3.0, labels)
    assert {name for name, _, _ in recorded} == set(CATALOGUE)
    for name, _, tags in recorded:
        assert tags.pop("model_name") == "poems"
        assert tags.pop("ReplicaId") == "abc"
        assert set(tags) == set(CATALOGUE[name].labels)
