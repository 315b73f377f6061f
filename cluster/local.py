"""The Ray cluster of a run: started here for it, or one that is already there.

    with session(workers=2) as cluster:
        ...  # ray is initialised; cluster.threads threads a worker

A machine may have fewer cores than a run has workers, so a local cluster has as many *logical* CPUs
as the run asks for; the threads of all workers together still stay within the cores.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from gptmoe.errors import ClusterError

from . import env
from .resources import at_once, gpus_per_worker, missing, needed

log = logging.getLogger(__name__)

_TOKEN_NOTICES = "ray._private.authentication.authentication_token_setup"
_KNOCK_S = 5.0
_OBJECT_STORE_BYTES = 256 * 2**20  # little goes through it: tensors travel by torch.distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A cluster that this process is connected to, and what each worker may use of it."""

    address: str
    dashboard_url: str
    local: bool
    cpus_per_worker: int  # to ask Ray for
    threads: int  # to compute with; those of all workers on a node add up to its cores at most
    gpus_per_worker: int = 0


@contextmanager
def session(
    *,
    workers: int,
    least: int | None = None,
    gpus: bool = False,
    address: str | None = None,
    spare_cpus: int = 0,
    worker_logs: bool = False,
    timeout_s: float = 60.0,
) -> Iterator[Session]:
    """Connect to a cluster with room for `workers` workers, and disconnect (or stop it) at the end.

    Without an address: the cluster of the Ray job that this process runs in, else a new local one.
    With `least` room for so many is enough; threads are shared out among those that find room now.
    With `gpus` each worker takes a GPU if the cluster has any; a new local one must have enough for
    all that must run, else they take none. `spare_cpus` is room for other actors that ask for CPUs.
    Raises ClusterError if the cluster is unreachable, or still too small after `timeout_s`.
    """
    env.prepare()
    least = workers if least is None else least
    logging.getLogger(_TOKEN_NOTICES).setLevel(logging.ERROR)
    if address is None and env.inside_job():
        address = "auto"
    try:
        if address is None:
            yield _start(workers, least, gpus, spare_cpus, worker_logs)
        else:
            yield _connect(address, workers, least, gpus, spare_cpus, worker_logs, timeout_s)
    finally:
        ray.shutdown()


def logical_cpus(workers: int, spare_cpus: int, cores: int) -> int:
    """CPUs that a new local cluster declares; one warning if that is more than the machine has."""
    if workers > cores:
        log.warning(
            "%d workers share %d cores: right but slow; use fewer workers or a larger machine",
            workers,
            cores,
        )
    return max(cores, workers + spare_cpus)


def local_gpus(workers: int, cluster: Mapping[str, float]) -> int:
    """GPUs that each worker takes on a new local cluster; one warning if there are too few."""
    gpus = cluster.get("GPU", 0.0)
    if 0 < gpus < workers:
        log.warning(
            "%d workers compute on CPUs: this machine has %g GPU, fewer than one for each; use "
            "fewer workers to train on it",
            workers,
            gpus,
        )
        return 0
    return gpus_per_worker(cluster)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(workers: int, least: int, gpus: bool, spare_cpus: int, worker_logs: bool) -> Session:
    started = at_once(workers, least, {"CPU": cores()})
    try:
        context: Any = ray.init(
            address="local",
            num_cpus=logical_cpus(started, spare_cpus, cores()),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=True,
            log_to_driver=worker_logs,
            logging_level=logging.WARNING,
        )
    except Exception as error:
        raise ClusterError(f"a local Ray cluster did not start: {error}") from error
    env.protect_token()
    per_worker = local_gpus(least, ray.cluster_resources()) if gpus else 0
    _require(needed(least, per_worker), "this machine", timeout_s=0.0)
    running = at_once(started, least, ray.cluster_resources(), per_worker)
    return Session(
        address=context.address_info["gcs_address"],
        dashboard_url=_dashboard_url(context),
        local=True,
        cpus_per_worker=1,
        threads=max(1, cores() // running),
        gpus_per_worker=per_worker,
    )


def _connect(
    address: str,
    workers: int,
    least: int,
    gpus: bool,
    spare_cpus: int,
    worker_logs: bool,
    timeout_s: float,
) -> Session:
    try:
        _knock(address)
        context: Any = ray.init(
            address=address, log_to_driver=worker_logs, logging_level=logging.WARNING
        )
    except Exception as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}); check the address, and that "
            "~/.ray/auth_token holds the cluster's token"
        ) from error
    per_worker = gpus_per_worker(ray.cluster_resources()) if gpus else 0
    _require(needed(least, per_worker, spare_cpus), f"the cluster at {address}", timeout_s)
    threads = _threads(at_once(workers, least, ray.cluster_resources(), per_worker))
    return Session(
        address=context.address_info["gcs_address"],
        dashboard_url=_dashboard_url(context),
        local=False,
        cpus_per_worker=threads,
        threads=threads,
        gpus_per_worker=per_worker,
    )


def _knock(address: str) -> None:
    """Fail in seconds, with the system's words, where `ray.init` would be silent for 20 seconds."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()


def _require(amounts: Mapping[str, float], where: str, timeout_s: float) -> None:
    """Wait until the cluster has the resources; an autoscaler may still be adding nodes."""
    deadline_s = time.monotonic() + timeout_s
    while lack := missing(amounts, ray.cluster_resources()):
        if time.monotonic() >= deadline_s:
            raise ClusterError(
                f"{where} lacks {lack} for this run (waited {timeout_s:g} s); "
                "add nodes, or use fewer workers"
            )
        time.sleep(min(1.0, timeout_s))


def _threads(workers: int) -> int:
    """Threads a worker if the workers are spread evenly over the nodes that have CPUs."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    cpus = [count for count in cpus if count >= 1]
    return max(1, min(cpus) // -(-workers // len(cpus)))


def _dashboard_url(context: Any) -> str:
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""
