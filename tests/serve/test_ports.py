"""Ports that a server is asked to listen at, and free ones."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.utils import is_grpc_enabled

from cluster.local import Session
from gptmoe.errors import ClusterError, ConfigError
from serve import ports
from serve.config import EdgeConfig, ServeConfig
from serve.launch import SERVICER, grpc_options, start_proxies
from serve.ports import choose_ports, free_port


def test_ports_of_the_edge() -> None:
    def chosen(**edge: Any) -> ServeConfig:
        config = ServeConfig(
            checkpoint=Path("x"), http_port=0, grpc_port=0, edge=EdgeConfig(**edge)
        )
        return choose_ports(config, check=True)

    assert chosen().edge.port is None
    assert chosen(port=0).edge.port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}"):
            chosen(port=port)
    only = chosen(port=0, only=True)
    assert only.grpc_port == 0, "no port is taken that is not opened"
    assert not is_grpc_enabled(grpc_options(only))
    assert is_grpc_enabled(grpc_options(chosen(port=0)))


@pytest.mark.parametrize(
    ("only", "opened", "sentence"),
    [
        (True, True, "Ray Serve runs on the cluster .*, with its gRPC port 9000 open, where this"),
        (True, False, ""),
        (False, True, ""),
        (False, False, "Ray Serve runs on the cluster .*, without our gRPC services"),
    ],
)
def test_a_grpc_port_that_is_open_already_must_be_meant(
    monkeypatch: pytest.MonkeyPatch, only: bool, opened: bool, sentence: str
) -> None:
    services = [SERVICER] if opened else []
    details = {
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "grpc_options": {"port": 9000, "grpc_servicer_functions": services},
    }
    client = SimpleNamespace(get_serve_details=lambda: details)
    monkeypatch.setattr("serve.launch.ServeSubmissionClient", lambda dashboard_url: client)
    monkeypatch.setattr("ray.serve.start", lambda **options: None)
    cluster = Session(
        address="10.0.0.1:6379",
        dashboard_url="http://10.0.0.1:8265",
        local=False,
        cpus_per_worker=1,
        threads=1,
    )
    config = ServeConfig(checkpoint=Path("x"), edge=EdgeConfig(port=9443, only=only))
    if sentence:
        with pytest.raises(ClusterError, match=sentence):
            start_proxies(config, cluster)
    else:
        found = start_proxies(config, cluster)
        assert (found.host, found.http_port, found.grpc_port) == ("0.0.0.0", 8000, 9000)


def test_ports_are_free_or_named() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        for host in ("", "127.0.0.1"):
            with pytest.raises(ConfigError, match=f"port {port} .*choose another port, or 0"):
                free_port(host, port)


def test_ports_in_use_stop_the_command_unless_it_joins_a_cluster() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = ServeConfig(checkpoint=Path("a"), http_port=port, grpc_port=0)
        with pytest.raises(ConfigError, match=f"port {port} "):
            choose_ports(config, check=True)
        chosen = choose_ports(config, check=False)
        assert chosen.http_port == port
        assert chosen.grpc_port > 0


def test_free_ports_are_not_those_that_others_are_given_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {free_port("127.0.0.1") for _ in range(20)}
    assert given <= set(ports.FREE)
    system = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if system.exists():
        assert given.isdisjoint(range(*map(int, system.read_text().split())))

    monkeypatch.setattr(ports, "FREE", range(free_port("127.0.0.1"), ports.FREE.stop)[:1])
    (only,) = ports.FREE
    assert free_port("127.0.0.1") == only
    with pytest.raises(ConfigError, match=f"no port from {only} to {only} is free"):
        free_port("127.0.0.1", besides={only})


def test_no_two_servers_get_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(port for port in ports.FREE if all(is_free(port + more) for more in range(3)))
    monkeypatch.setattr(ports, "FREE", range(first, first + 3))
    config = ServeConfig(checkpoint=Path("x"), http_port=0, grpc_port=0, edge=EdgeConfig(port=0))
    chosen = choose_ports(config, check=True)
    assert {chosen.http_port, chosen.grpc_port, chosen.edge.port} == set(ports.FREE)


def is_free(port: int) -> bool:
    try:
        return bool(free_port("", port))
    except ConfigError:
        return False
