"""The gRPC server of the edge: TLS, keys, health, reflection, limits. Knows no Ray."""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from gptmoe.errors import ConfigError, PermissionDenied, Unauthenticated
from serve.access_log import AccessLog
from serve.config import EdgeConfig
from serve.guard import authorization
from serve.keys import Keys
from serve.methods import METHODS

from . import statuses
from .backend import Backend
from .forward import Forward
from .health import report, watch

log = logging.getLogger(__name__)

REFLECTION = ("grpc.reflection.v1.ServerReflection", reflection.SERVICE_NAME)
"""v1 and v1alpha: their messages are the same bytes."""

OPEN = (health.SERVICE_NAME, *REFLECTION)
"""Services that ask for no key: probes cannot send one, and an interface is no secret."""

_OPERATIONS = {method.path: method.name for method in METHODS if method.operates}

_PING_TIMEOUT_S = 20.0
_LEAST_PING_S = 10.0
_LAST_WORDS_S = 0.5
"""For statuses of ended calls to go out, and for health's last word."""


class EdgeServer:
    """From `start` to `stop`, in one event loop."""

    def __init__(
        self,
        backend: Backend,
        config: EdgeConfig,
        keys: Keys | None = None,
        *,
        sleeps: bool = False,
        log: AccessLog | None = None,
    ) -> None:
        """`sleeps`: where no replica runs, a request starts one. `log`: of what no replica does."""
        self._backend, self._config, self._sleeps = backend, config, sleeps
        self._forward = Forward(backend, config, log)
        doors = [KeyCheck(keys, log)] if keys else []
        self._server = grpc.aio.server(interceptors=doors, options=_options(config))
        self._health = health.aio.HealthServicer()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; returns the port. Raises ConfigError if the port or a certificate is no good."""
        config = self._config
        self._add_services()
        address = f"[{config.host}]" if ":" in config.host else config.host
        target, credentials = f"{address}:{config.port}", server_credentials(config)
        try:
            if credentials:
                port = self._server.add_secure_port(target, credentials)
            else:
                port = self._server.add_insecure_port(target)
        except RuntimeError:
            raise ConfigError(
                f"the edge cannot listen on {target}; choose another edge.host or edge.port"
            ) from None
        await report(self._health, serving=False)  # until a replica says otherwise
        await self._server.start()
        looking = watch(
            self._backend,
            self._health,
            stall_s=config.stall_s,
            every_s=config.health_every_s,
            sleeps=self._sleeps,
        )
        self._watch = asyncio.create_task(looking)
        return int(port)

    async def stop(self, grace_s: float) -> None:
        """Say so to whoever watches, take no new calls, give running ones so long to finish."""
        await self._health.enter_graceful_shutdown()
        if self._watch:
            self._watch.cancel()
        await self._forward.drain(grace_s)
        # Who watches health or shards never ends by itself.
        await self._server.stop(min(grace_s, _LAST_WORDS_S))

    def _add_services(self) -> None:
        services = sorted({method.service for method in METHODS})
        for service in services:
            methods = {m.name: self._forward.handler(m) for m in METHODS if m.service == service}
            handler = grpc.method_handlers_generic_handler(service, methods)
            self._server.add_generic_rpc_handlers((handler,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._config.reflection:
            _add_reflection(self._server, [*services, *OPEN])


class KeyCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Ends calls without a good key, whatever they call, but for the services that are open."""

    def __init__(self, keys: Keys, log: AccessLog | None = None) -> None:
        self._keys, self._log = keys, log

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """What grpc.aio calls before each call."""
        path = handler_call_details.method
        service = path.removeprefix("/").partition("/")[0]
        if service not in OPEN:
            shown = authorization(handler_call_details.invocation_metadata)
            try:
                self._keys.check(shown, operation=_OPERATIONS.get(path, ""))
            except (Unauthenticated, PermissionDenied) as error:
                if self._log:
                    with self._log.call(path.rpartition("/")[2], "grpc") as entry:
                        entry.fail(error)
                return _refusing(statuses.status_of(error))
        return await continuation(handler_call_details)


def server_credentials(config: EdgeConfig) -> grpc.ServerCredentials | None:
    """TLS as the config wants it; with edge.client_ca callers must have a certificate too.

    Raises ConfigError for files that are missing or do not fit.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    _check_pair(config.tls_cert, config.tls_key)
    authority = None
    if config.client_ca is not None:
        _check_authority(config.client_ca)
        authority = config.client_ca.read_bytes()
    return grpc.ssl_server_credentials(
        [(config.tls_key.read_bytes(), config.tls_cert.read_bytes())],
        root_certificates=authority,
        require_client_auth=authority is not None,
    )


def _check_pair(cert: Path, key: Path) -> None:
    """gRPC itself would only say that nobody can connect."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"edge.tls_cert={cert} and edge.tls_key={key} are no certificate and its private key, "
            f"both in PEM: {error}"
        ) from None


def _check_authority(path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"edge.client_ca={path} holds no certificate in PEM: {error}") from None


def _refusing(status: Any) -> Any:
    async def refuse(request: bytes, context: Any) -> None:
        await context.abort_with_status(status)

    return grpc.unary_unary_rpc_method_handler(refuse)


def _add_reflection(server: Any, services: Sequence[str]) -> None:
    servicer = reflection.aio.ReflectionServicer(services)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in REFLECTION:
        generic = grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler})
        server.add_generic_rpc_handlers((generic,))


def _options(config: EdgeConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(_PING_TIMEOUT_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(_LEAST_PING_S * 1000)),
        ("grpc.so_reuseport", 0),  # a port that is taken is an error, not half of the callers
    ]
