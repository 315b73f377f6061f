"""What operators ask of the application: done here, in one replica, for all of them.

The replicas have no way to each other. What all are to know goes to Ray Serve's controller, as
`Settings`; it tells each of them, and those that start later.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from cluster.messages import Topology
from cluster.operations import (
    ControlQuery,
    DrainRequest,
    DrainResponse,
    RefreshRequest,
    RefreshResponse,
    ScaleRequest,
    ScaleResponse,
    Topologies,
)
from gptmoe.errors import ClusterError, DeadlineExceeded, RequestError

from .controller import Settings, State
from .refusals import Overtaken

WITHIN_S = 300.0
EVERY_S = 1.0
LEAST_EVERY_S = 0.2
MOST_REPLICAS = 10_000
"""More are a slip: Ray would try to start them all."""
_POLL_S = 0.2


class Application(Protocol):
    """What is needed of controller.Controlled. Its calls block."""

    name: str

    def state(self) -> State: ...
    def change(self, settings: Settings) -> None: ...
    def scale(self, replicas: int) -> None: ...


class Operations:
    """The operators' side of one replica. Blocking calls are made in threads."""

    def __init__(
        self,
        application: Application,
        *,
        me: str,
        check: Callable[[str], str],
        topologies: Callable[[str], tuple[Topology, ...]],
        threads: int = 0,
    ) -> None:
        """`me` is this replica's key in `State.states`; `check` is Interchangeable's;
        `topologies` finds those of the runs whose name begins so; `threads` are those that each
        replica, or each of its shards, computes with."""
        self._application, self._me = application, me
        self._check, self._topologies, self._threads = check, topologies, threads

    async def topology(self, query: ControlQuery) -> Topologies:
        """Who owns what, and what is served.

        Raises RequestError, or ClusterError if this replica is to stop: it waits for its callers.
        """
        if query.every_s and not query.every_s >= LEAST_EVERY_S:
            raise RequestError(
                f"every_s must be at least {LEAST_EVERY_S:g}, or 0 for {EVERY_S:g}; "
                f"found {query.every_s:g}",
                "every_s",
            )
        state = await asyncio.to_thread(self._application.state)
        if state.states.get(self._me) == "STOPPING":
            raise ClusterError("the replica that was asked is being stopped; ask again")
        name = self._application.name
        found = await asyncio.to_thread(self._topologies, f"{name}#")
        return Topologies(
            application=name,
            topologies=found,
            replicas=state.running,
            checkpoint=state.settings.checkpoint,
            version=state.settings.version,
            draining=state.settings.draining,
            threads=self._threads,
            nodes=tuple(node for replica, node in state.nodes.items() if state.runs(replica)),
        )

    async def drain(self, request: DrainRequest) -> DrainResponse:
        """Have all replicas refuse new requests, or take them again. Raises as `refresh`."""
        deadline_s = _deadline(request.within_s)
        state = await asyncio.to_thread(self._application.state)
        await self._tell(replace(state.settings, draining=not request.resume), deadline_s)
        return DrainResponse()

    async def refresh(self, request: RefreshRequest) -> RefreshResponse:
        """Have all replicas serve other weights.

        Raises RequestError and NotWithThis as Interchangeable.check, and nothing is changed;
        DeadlineExceeded, Overtaken, or ClusterError if replicas cannot take them.
        """
        deadline_s = _deadline(request.within_s)
        checkpoint = await asyncio.to_thread(self._check, request.checkpoint)
        now = (await asyncio.to_thread(self._application.state)).settings
        settings = replace(
            now, checkpoint=checkpoint, version=now.version + 1, restart=request.restart
        )
        await self._tell(settings, deadline_s)
        return RefreshResponse(version=settings.version, checkpoint=checkpoint)

    async def scale(self, request: ScaleRequest) -> ScaleResponse:
        """Set the number of replicas.

        Raises RequestError, NotWithThis, DeadlineExceeded or Overtaken.
        """
        deadline_s, wanted = _deadline(request.within_s), request.replicas
        if not 1 <= wanted <= MOST_REPLICAS:
            wants = f"replicas must be at least 1 and at most {MOST_REPLICAS}; found {wanted}"
            raise RequestError(wants, "replicas")
        await asyncio.to_thread(self._application.scale, wanted)
        while True:
            state = await asyncio.to_thread(self._application.state)
            if state.wanted != wanted:
                raise Overtaken(f"another operator wants {state.wanted} replicas, not {wanted}")
            if state.running == wanted:
                return ScaleResponse(replicas=wanted)
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(
                    f"{state.running} of {wanted} replicas run so far, and it goes on; the cluster "
                    f"may lack room for more {_in_brackets(state.message)}".rstrip()
                )
            await asyncio.sleep(_POLL_S)

    async def _tell(self, settings: Settings, deadline_s: float) -> None:
        await asyncio.to_thread(self._application.change, settings)
        arrived = False
        while True:
            state = await asyncio.to_thread(self._application.state)
            if state.settings == settings:
                arrived = True
            elif arrived or state.status == "RUNNING":
                raise Overtaken("another operator told the replicas something else; look and retry")
            if state.status == "RUNNING":
                return
            if state.status == "DEPLOY_FAILED":
                raise ClusterError(f"not all replicas could change: {_last_line(state.message)}")
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(
                    f"not all replicas have changed in time, and it goes on "
                    f"{_in_brackets(state.message)}".rstrip()
                )
            await asyncio.sleep(_POLL_S)


def _deadline(within_s: float) -> float:
    if not 0 <= within_s < float("inf"):
        wanted = f"within_s must be seconds, 0 for {WITHIN_S:g}; found {within_s:g}"
        raise RequestError(wanted, "within_s")
    return time.monotonic() + (within_s or WITHIN_S)


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray Serve gives no reason"


def _in_brackets(message: str) -> str:
    return f"({_last_line(message)})" if message else ""
