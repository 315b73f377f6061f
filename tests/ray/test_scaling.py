"""Replicas that follow the load, and what they say of it: metrics, access log."""

import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.serve

from cluster.client import Client
from gptmoe.generate.scheduler import EngineConfig
from serve import app
from serve.catalogue import EXPORTED
from serve.config import HealthConfig, ReplicasConfig, ServeConfig
from serve.launch import Endpoints, running
from serve.scaling import ScalingConfig

TOKENS = 120
CROWD = 10

COUNTED_BY_LOAD = {
    "ray_vllm_prompt_tokens_total",
    "ray_vllm_generation_tokens_total",
    "ray_vllm_request_success_total",
    "ray_vllm_time_to_first_token_seconds_count",
    "ray_vllm_inter_token_latency_seconds_count",
    "ray_vllm_request_time_per_output_token_seconds_count",
    "ray_vllm_e2e_request_latency_seconds_count",
    "ray_vllm_request_prompt_tokens_sum",
    "ray_vllm_request_generation_tokens_sum",
    "ray_gptmoe_step_seconds_count",
    "ray_gptmoe_expert_rows_total",
    "ray_gptmoe_expert_imbalance_ratio",
}
"""Above 0 once something was generated."""

NOT_HERE = {
    "ray_vllm_prefix_cache_queries_total",
    "ray_vllm_prefix_cache_hits_total",
    "ray_vllm_num_preemptions_total",
    "ray_gptmoe_refused_requests_total",
}
"""Counters that Ray exports once they have counted something, which this load may not do."""


@pytest.fixture(scope="module")
def endpoints(small_checkpoint: Path) -> Iterator[Endpoints]:
    config = ServeConfig(
        checkpoint=small_checkpoint,
        name="poems",
        http_port=0,
        grpc_port=0,
        threads=1,
        engine=EngineConfig(max_batch_size=2, max_queue=64),
        replicas=ReplicasConfig(min=1, max=3),
        # One caller has at most 124 tokens left, the crowd 1,240.
        scaling=ScalingConfig(target_tokens=300, look_back_s=2.0, up_delay_s=1.0, down_delay_s=3.0),
        health=HealthConfig(period_s=1.0),
    )
    with running(config) as endpoints:
        yield endpoints


class Callers:
    """Ask without a pause, each in a thread of its own, until they are told to leave."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._leave: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self.answers: list[int] = []
        self.failures: list[BaseException] = []

    def come(self, count: int) -> None:
        for _ in range(count):
            self._leave.append(threading.Event())
            thread = threading.Thread(target=self._ask, args=(self._leave[-1],), daemon=True)
            self._threads.append(thread)
            thread.start()

    def go(self, count: int) -> None:
        for leave in [event for event in self._leave if not event.is_set()][:count]:
            leave.set()

    def join(self) -> None:
        self.go(len(self._leave))
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _ask(self, leave: threading.Event) -> None:
        with Client(self._target, timeout_s=120) as client:
            while not leave.is_set():
                try:
                    chunks = client.stream("春风", max_new_tokens=TOKENS, temperature=0.0)
                    self.answers.append(sum(len(chunk.token_ids) for chunk in chunks))
                except BaseException as error:  # noqa: BLE001  the test counts them all
                    self.failures.append(error)


def replicas(application: str = "poems") -> int:
    deployment = ray.serve.status().applications[application].deployments["Generator"]
    return deployment.replica_states.get("RUNNING", 0)


def wait_until(condition: Callable[[], object], within_s: float, what: str) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.25)


def test_replicas_come_with_the_load_and_go_with_it(endpoints: Endpoints) -> None:
    """1 -> 3 -> 1, and no call fails meanwhile: those of a replica that goes come to their end.
    Newer weights leave the replicas as they are."""
    assert replicas() == 1
    callers = Callers(endpoints.grpc)
    try:
        callers.come(CROWD)
        wait_until(lambda: replicas() == 3, 90, "the crowd gets no three replicas")
        with Client(endpoints.grpc, timeout_s=120) as client:
            assert client.refresh(endpoints.checkpoint) == 1
        assert replicas() == 3
        callers.go(CROWD - 1)
        wait_until(lambda: replicas() == 1, 90, "one caller keeps more than one replica")
    finally:
        callers.join()
    assert callers.failures == []
    assert set(callers.answers) == {TOKENS}
    assert len(callers.answers) > CROWD


def test_nobody_asks_no_replica_runs_and_the_next_call_wakes_one(
    endpoints: Endpoints, small_checkpoint: Path
) -> None:
    config = ServeConfig(
        checkpoint=small_checkpoint,
        name="seldom",
        threads=1,
        replicas=ReplicasConfig(min=0, max=1, initial=0),
        scaling=ScalingConfig(look_back_s=2.0, up_delay_s=60.0, zero_delay_s=2.0),
    )
    ray.serve.run(app.build(config, num_cpus=1), name="seldom", route_prefix="/seldom")
    try:
        assert replicas("seldom") == 0
        with Client(endpoints.grpc, application="seldom", timeout_s=120) as client:
            answer = client.generate("春风", max_new_tokens=5, temperature=0.0)
        assert len(answer.token_ids) == 5
        wait_until(lambda: replicas("seldom") == 0, 60, "the idle replica stays")
    finally:
        ray.serve.delete("seldom")


def scraped() -> dict[str, list[tuple[dict[str, str], float]]]:
    """What Prometheus would read of this node: labels and values by name."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=20) as response:
        text = response.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        pairs = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))
        found.setdefault(name, []).append((pairs, float(value)))
    return found


def test_prometheus_finds_the_metrics_of_the_catalogue(endpoints: Endpoints) -> None:
    """With values, and with the labels by which Ray's dashboard joins them to its own."""
    with Client(endpoints.grpc, timeout_s=60) as client:
        client.generate("春风又绿", max_new_tokens=20, temperature=0.0)

    def there() -> bool:
        found = scraped()
        counted = {name for name in COUNTED_BY_LOAD if any(v > 0 for _, v in found.get(name, ()))}
        return counted == COUNTED_BY_LOAD and found.keys() >= EXPORTED - NOT_HERE

    wait_until(there, 60, "metrics do not arrive")
    found = scraped()
    ours = {
        name: [row for row in rows if row[0]["model_name"] == "poems"]
        for name, rows in found.items()
        if name in EXPORTED
    }
    assert ours.keys() >= EXPORTED - NOT_HERE
    assert all(
        rows and labels["ReplicaId"] and labels["WorkerId"]
        for rows in ours.values()
        for labels, _ in rows
    )
    rays = {
        labels["WorkerId"]: labels["deployment"]
        for labels, _ in found["ray_serve_deployment_request_counter_total"]
    }
    workers = {labels["WorkerId"] for labels, _ in ours["ray_vllm_generation_tokens_total"]}
    assert workers <= rays.keys()
    assert {rays[worker] for worker in workers} == {"Generator"}
    experts = {(row["layer"], row["expert"]) for row, _ in ours["ray_gptmoe_expert_rows_total"]}
    assert experts <= {("1", str(expert)) for expert in range(4)}


def test_each_call_leaves_a_line_without_its_prompt(endpoints: Endpoints) -> None:
    with Client(endpoints.grpc, timeout_s=60) as client:
        client.generate("明月几时有", max_new_tokens=3, temperature=0.0, request_id="moon")

    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())

    def line() -> dict[str, Any] | None:
        for file in logs.glob("worker-*.out"):
            text = file.read_text(encoding="utf-8")
            if found := re.findall(r'^\{.*"request_id": "moon".*\}$', text, re.MULTILINE):
                return json.loads(found[-1])
        return None

    wait_until(line, 20, "no line in the log")
    entry = line()
    assert entry is not None
    assert (entry["transport"], entry["status"], entry["completion_tokens"]) == ("grpc", "ok", 3)
    assert "明月" not in json.dumps(entry, ensure_ascii=False)
