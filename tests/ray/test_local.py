"""A cluster for a run: room, threads, and what is said when there is none."""

import logging
import socket
import subprocess
import sys

import pytest
import ray

from cluster import env, local
from gptmoe.errors import ClusterError


def test_a_local_cluster_has_room_for_more_workers_than_cores() -> None:
    cores = local.cores()
    with local.session(workers=cores + 2) as session:
        assert ray.cluster_resources()["CPU"] == cores + 2
        assert (session.local, session.cpus_per_worker, session.threads) == (True, 1, 1)
        assert session.dashboard_url.startswith("http://127.0.0.1:")
    assert not ray.is_initialized()


def test_a_second_process_connects_to_it_and_is_told_what_is_missing() -> None:
    """Workers take no GPUs where there are none."""
    with local.session(workers=1, gpus=True) as session:
        assert session.gpus_per_worker == (1 if env.has_gpu() else 0)
        code = (
            "from cluster import local\n"
            f"with local.session(workers=1, address='{session.address}') as s: print(s.threads)\n"
            f"with local.session(workers=9, address='{session.address}', timeout_s=0.1): pass\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=env.ROOT
        )
    assert done.stdout.strip() == str(local.cores())
    assert "ClusterError: the cluster at" in done.stderr
    assert f"lacks {9 - local.cores()} of 9 CPU for this run (waited 0.1 s)" in done.stderr


GPUS = """
from ray.cluster_utils import Cluster
from cluster import local

options = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=options)
with local.session(workers=1, gpus=True, address=cluster.address) as one:
    print(one.gpus_per_worker)
with local.session(workers=2, address=cluster.address) as none:
    print(none.gpus_per_worker)
try:
    with local.session(workers=2, gpus=True, address=cluster.address, timeout_s=0.1):
        pass
finally:
    cluster.shutdown()
"""


def test_workers_take_gpus_where_the_cluster_has_any() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GPUS], capture_output=True, text=True, timeout=120, cwd=env.ROOT
    )
    assert done.stdout.split() == ["1", "0"], done.stderr
    assert "ClusterError: the cluster at" in done.stderr
    assert "lacks 1 of 2 GPU for this run (waited 0.1 s); add nodes, or use" in done.stderr


def test_an_address_without_a_cluster_is_refused_in_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (
        pytest.raises(
            ClusterError, match=f"no Ray cluster answers at {address} .*refused.*auth_token"
        ),
        local.session(workers=1, address=address),
    ):
        pass


def test_one_warning_if_workers_share_cores(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert local.logical_cpus(2, 1, cores=2) == 3
        assert caplog.records == []
        assert local.logical_cpus(4, 1, cores=2) == 5
    assert [record.getMessage() for record in caplog.records] == [
        "4 workers share 2 cores: right but slow; use fewer workers or a larger machine"
    ]
