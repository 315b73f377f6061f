"""What the workers of a new local cluster take. Real ones: tests/ray."""

import logging
from types import SimpleNamespace

import pytest
import ray

from cluster import local


@pytest.mark.parametrize(
    ("workers", "gpus", "taken"), [(1, 1, 1), (2, 2, 1), (2, 0, 0), (2, 1, 0), (4, 3, 0)]
)
def test_workers_take_a_gpu_each_or_compute_on_cpus(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    workers: int,
    gpus: int,
    taken: int,
) -> None:
    """Two workers on a machine with one GPU were refused, `make demo` with them."""
    started = SimpleNamespace(address_info={"gcs_address": "here:1"}, dashboard_url="")
    monkeypatch.setattr(ray, "init", lambda **options: started)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    resources = {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {})
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(local, "cores", lambda: 8)
    with caplog.at_level(logging.WARNING), local.session(workers=workers, gpus=True) as session:
        assert session.gpus_per_worker == taken
    few = f"{workers} workers compute on CPUs: this machine has {gpus} GPU, fewer than one for each"
    assert [message.partition(";")[0] for message in caplog.messages] == [few] * (
        0 < gpus < workers
    )


@pytest.mark.parametrize("address", [None, "there"])
def test_threads_are_those_of_the_workers_that_run_not_of_the_least_that_must(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    """Two elastic workers took two threads each on two cores; on eight a worker wanted all."""
    there = SimpleNamespace(address_info={"gcs_address": "here:1"}, dashboard_url="")
    monkeypatch.setattr(ray, "init", lambda **options: there)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(local, "cores", lambda: 8)

    def threads(workers: int, least: int | None) -> int:
        with local.session(workers=workers, least=least, address=address) as session:
            return session.threads

    assert threads(4, None) == threads(4, 1) == 2
    assert threads(32, 1) == 1  # eight find room
    assert threads(2, 1) == 4
