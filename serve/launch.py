"""From a ServeConfig to endpoints that answer, and back to nothing.

with running(config) as endpoints:
    ...  # endpoints.grpc answers
"""

import dataclasses
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import ray.serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve.config import gRPCOptions
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster import env, local
from cluster.access import Access
from cluster.client import Client, GenerationError
from gptmoe.checkpoint import open_checkpoint
from gptmoe.config import Uri
from gptmoe.errors import ClusterError, ConfigError
from gptmoe.loaded import named_device
from gptmoe.stored import spec_of

from . import app
from .checkpoints import pinned
from .config import ServeConfig
from .controller import DEPLOYMENT
from .edge.actor import Edges
from .edge.server import server_credentials
from .keys import Keys, first_token
from .ports import choose_ports

SERVICER = "serve.proxy.add_services"
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where a running application is found."""

    name: str
    grpc: str
    """Ray Serve's port; empty with edge.only."""
    http: str
    dashboard: str
    address: str
    checkpoint: str
    edge: str = ""
    """The gRPC port with TLS and keys; empty: there is none."""


@contextmanager
def running(config: ServeConfig) -> Iterator[Endpoints]:
    """Deploy the application; at the end remove it, and the cluster if it was started for it.

    Raises CheckpointError, DataError or ConfigError before anything starts, ClusterError if the
    cluster is too small or unreachable, or the application does not run after health.start_s
    seconds.
    """
    config = dataclasses.replace(config, checkpoint=pinned(config.checkpoint))
    joins = bool(config.address) or env.inside_job()
    config = choose_ports(config, check=not joins)
    check_parallel(config)
    if not joins:
        named_device(config.device)
        check_doors(config)
    workers = config.parallel.world * (
        max(1, config.replicas.min) if joins else config.replicas.max
    )
    if not joins:
        check_threads(config.threads, workers, local.cores())
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with local.session(workers=workers, address=config.address or None) as cluster:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own, set by now, aborts after 3 s
        threads = config.threads or cluster.threads
        config = dataclasses.replace(config, threads=threads)
        config = start_proxies(config, cluster)
        try:
            deploy(config, num_cpus=threads)
            with edged(config):
                yield endpoints(config, cluster)
        finally:
            remove(config.name, cluster)


@contextmanager
def edged(config: ServeConfig) -> Iterator[None]:
    """With edges on all nodes, if the config wants some."""
    if config.edge.port is None:
        yield
        return
    edges = Edges(config)
    try:
        edges.start()
        yield
    finally:
        edges.stop(config.health.drain_s)


def check_parallel(config: ServeConfig) -> None:
    """Raise LayoutError unless the shards can share the model; unknown behind a URI."""
    if config.parallel.world > 1 and not isinstance(config.checkpoint, Uri):
        spec = spec_of(open_checkpoint(config.checkpoint, verify=False))
        config.parallel.parts(spec)


def check_threads(threads: int, workers: int, cores: int) -> None:
    """Raise ConfigError for more threads than cores: threads that wait for each other crawl.

    `threads` are those of each of the workers (replicas, or their shards); 0: their share.
    """
    most = max(1, cores // workers)
    if threads > most:
        many = "one replica" if workers == 1 else f"each of {workers} replicas or shards"
        raise ConfigError(
            f"threads={threads} for {many} is more than the {cores} cores of this machine; "
            f"use at most {most}, or 0 for that"
        )


def check_doors(config: ServeConfig) -> None:
    """Raise ConfigError for keys and certificates that are not what they should be, before a
    cluster is started for nothing. Only where they are read: on the nodes."""
    if config.auth.keys is not None:
        Keys(config.auth.keys)
    if config.edge.wanted_port is not None:
        server_credentials(config.edge)


def start_proxies(config: ServeConfig, cluster: local.Session) -> ServeConfig:
    """Start Ray Serve; where it runs already its ports stay, and come back in the config.

    Raises ClusterError if it runs without our gRPC services; and with them, if only the edge is to
    answer: Ray Serve's port asks for no certificate, and reaches each application.
    """
    ray.serve.start(
        http_options=ray.serve.HTTPOptions(host=config.host, port=config.http_port),
        grpc_options=grpc_options(config),
        logging_config=app.LOGGING,
    )
    if cluster.local or not cluster.dashboard_url:
        return config
    details = ServeSubmissionClient(cluster.dashboard_url).get_serve_details()
    http, grpc = details["http_options"], details["grpc_options"]
    opened = SERVICER in grpc.get("grpc_servicer_functions", ())
    if config.edge.only and opened:
        raise ClusterError(
            f"Ray Serve runs on the cluster {cluster.address} already, with its gRPC port "
            f"{grpc['port']} open, where this application would answer, too; serve on another "
            "cluster, or without --edge-only"
        )
    if not config.edge.only and not opened:
        raise ClusterError(
            f"Ray Serve runs on the cluster {cluster.address} already, without our gRPC services; "
            "shut it down there (serve shutdown), or serve on another cluster"
        )
    return dataclasses.replace(
        config, host=http["host"], http_port=http["port"], grpc_port=grpc["port"]
    )


def grpc_options(config: ServeConfig) -> gRPCOptions:
    """Ray Serve's gRPC port with our services; it opens none where it has no services."""
    services = [] if config.edge.only else [SERVICER]
    return gRPCOptions(port=config.grpc_port, grpc_servicer_functions=services)


def deploy(config: ServeConfig, num_cpus: float) -> None:
    """Deploy the application and wait until it runs. Raises ClusterError if it does not."""
    target = ray.serve.RunTarget(
        app.build(config, num_cpus),
        name=config.name,
        route_prefix="/",
        # `gptmoe scale` sets the number of replicas where autoscaling does not.
        external_scaler_enabled=config.replicas.min == config.replicas.max,
    )
    ray.serve.run_many(
        [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )
    deadline_s = time.monotonic() + config.health.start_s
    while (found := _application(config.name)).status != ApplicationStatus.RUNNING:
        deployment = found.deployments.get(DEPLOYMENT)
        reason = last_line((deployment.message if deployment else "") or found.message)
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise ClusterError(f"application {config.name} did not start: {reason}")
        if time.monotonic() > deadline_s:
            wants = f"{num_cpus:g} CPU" + (" and 1 GPU" if config.device == "cuda" else "")
            free = room(ray.available_resources())
            raise ClusterError(
                f"application {config.name} does not run after {config.health.start_s:g} s "
                f"(a replica needs {wants}; {free}): {reason}"
            )
        time.sleep(_POLL_S)


def room(free: Mapping[str, float]) -> str:
    """What Ray's free resources are, in words."""
    gpus = f" and {free['GPU']:g} GPU" if free.get("GPU") else ""
    return f"{free.get('CPU', 0):g} CPU{gpus} are free"


def endpoints(config: ServeConfig, cluster: local.Session) -> Endpoints:
    """Where the application answers, once it does over gRPC."""
    node = "127.0.0.1" if cluster.local else ray.util.get_node_ip_address()
    host = node if config.host in ("0.0.0.0", "::") else config.host
    target, edge = "", ""
    if not config.edge.only:
        target = f"{node}:{config.grpc_port}"
        key = first_token(config.auth.keys) if config.auth.keys else ""
        await_answer(target, config.name, key)
    if config.edge.port is not None:
        at = node if config.edge.host in ("0.0.0.0", "::") else config.edge.host
        edge = f"{in_url(at)}:{config.edge.port}"
    return Endpoints(
        name=config.name,
        grpc=target,
        edge=edge,
        http=f"http://{in_url(host)}:{config.http_port}",
        dashboard=cluster.dashboard_url,
        address=cluster.address,
        checkpoint=str(config.checkpoint),
    )


def in_url(host: str) -> str:
    """An address of IPv6 stands in brackets before a port."""
    return f"[{host}]" if ":" in host else host


def remove(name: str, cluster: local.Session) -> None:
    """Delete the application after its running requests; Ray Serve goes with the last one."""
    ray.serve.delete(name)
    if not cluster.local and not ray.serve.status().applications:
        ray.serve.shutdown()


def last_line(message: str) -> str:
    """The sentence in a failed deployment's message, which may end in a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return "Ray Serve gives no reason; see its logs in the dashboard"
    return re.sub(r"^gptmoe\.errors\.\w+: ", "", lines[-1])


def _application(name: str) -> ApplicationStatusOverview:
    return ray.serve.status().applications[name]


def await_answer(target: str, name: str, token: str = "", within_s: float = 30.0) -> None:
    """Wait until the application answers over gRPC; ClusterError if it does not in time."""
    deadline_s = time.monotonic() + within_s
    access = Access(token=token)
    with Client(target, application=name, timeout_s=5.0, access=access) as client:
        while True:
            try:
                client.model()
                return
            except GenerationError as error:
                if time.monotonic() > deadline_s:
                    raise ClusterError(f"gRPC at {target} does not answer: {error}") from error
            time.sleep(_POLL_S)
