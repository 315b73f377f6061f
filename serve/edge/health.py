"""grpc.health.v1, fed by how the engines come along: being up is not the same as answering.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from grpc_health.v1 import health_pb2

from serve.methods import GENERATION

from .backend import Backend
from .inlet import Progress

SERVICES = ("", GENERATION)
"""The names that can be asked for: the server as a whole, and the service."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def answers(found: Sequence[Progress], stall_s: float) -> bool:
    """Whether a new request would be answered by any replica: one that moves, or has no work."""
    return any(not one.draining and (not one.pending or one.silent_s <= stall_s) for one in found)


async def report(servicer: Any, serving: bool) -> None:
    """Tell whoever checks or watches."""
    for service in SERVICES:
        await servicer.set(service, SERVING if serving else NOT_SERVING)


async def watch(backend: Backend, servicer: Any, *, stall_s: float, every_s: float) -> None:
    """Report again and again, for ever."""
    while True:
        await report(servicer, answers(await backend.progress(), stall_s))
        await asyncio.sleep(every_s)
