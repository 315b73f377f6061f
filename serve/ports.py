"""Where a server listens: ports that were asked for, or free ones."""

import dataclasses
import random
import socket

from gptmoe.errors import ConfigError

from .config import ServeConfig

FREE = range(20_000, 32_768)
"""Where port 0 is looked for: neither the system's ports for outgoing connections (from 32768 on
Linux) nor those of Ray's workers (10002 to 19999), since seconds pass before a server listens."""


def choose_ports(config: ServeConfig, *, check: bool) -> ServeConfig:
    """Put free ports in place of 0; with `check`, ConfigError if a port is in use here."""
    http_port, grpc_port, edge = config.http_port, config.grpc_port, config.edge
    if check or not http_port:
        http_port = free_port(config.host, http_port)
    if not edge.only and (check or not grpc_port):
        grpc_port = free_port("", grpc_port, besides={http_port})
    edge_port = edge.wanted_port
    if edge_port is not None and (check or not edge_port):
        edge_port = free_port(edge.host, edge_port, besides={http_port, grpc_port})
    edge = dataclasses.replace(edge, port=edge_port)
    return dataclasses.replace(config, http_port=http_port, grpc_port=grpc_port, edge=edge)


def free_port(host: str, port: int = 0, besides: frozenset[int] | set[int] = frozenset()) -> int:
    """The port if it is free here, for 0 some free one. Raises ConfigError if it is in use."""
    if port:
        _listen(host, port)
        return port
    for candidate in random.sample(FREE, len(FREE)):
        try:
            if candidate not in besides:
                _listen(host, candidate)
                return candidate
        except ConfigError:
            pass
    raise ConfigError(f"no port from {FREE[0]} to {FREE[-1]} is free here; choose another")


def _listen(host: str, port: int) -> None:
    """Listen for a moment. Raises ConfigError if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host or 'any address'}, port {port} ({error.strerror}); "
            "choose another port, or 0 for a free one"
        ) from None
