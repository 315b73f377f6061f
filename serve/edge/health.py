"""grpc.health.v1, fed by how the engines come along: being up is not the same as answering.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from grpc_health.v1 import health_pb2

from gptmoe.errors import Unavailable
from serve.methods import GENERATION

from .backend import Backend
from .inlet import Progress

log = logging.getLogger(__name__)

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


async def look(backend: Backend, *, stall_s: float, sleeps: bool) -> bool:
    """Whether a new request would be answered; `sleeps`: it would start a replica if none runs."""
    try:
        found = await backend.progress()
    except Unavailable:
        return sleeps
    return answers(found, stall_s)


async def watch(
    backend: Backend, servicer: Any, *, stall_s: float, every_s: float, sleeps: bool
) -> None:
    """Report again and again, for ever."""
    while True:
        try:
            serving = await look(backend, stall_s=stall_s, sleeps=sleeps)
        except Exception:
            log.exception("the replicas cannot be asked how they are")
            serving = False
        await report(servicer, serving)
        await asyncio.sleep(every_s)
