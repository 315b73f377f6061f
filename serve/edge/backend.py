"""The replicas, as the edge asks them: bytes over a deployment's handle, typed errors back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import grpc.aio
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from gptmoe.errors import GptMoeError, Overloaded, Unavailable
from serve.names import Ticket

from .inlet import Progress
from .patience import NoReplica, ReplicaLost

A = TypeVar("A")

log = logging.getLogger(__name__)

_ANSWER_WITHIN_S = 5.0


class Backend(Protocol):
    """What the edge needs of an application."""

    async def unary(self, method: str, request: bytes, ticket: Ticket) -> bytes:
        """One answer. Raises GptMoeError; cancelled, it cancels the replica's work."""
        ...

    def stream(self, method: str, request: bytes, ticket: Ticket) -> AsyncIterator[bytes]:
        """A stream of answers. Raises GptMoeError; left early, it cancels the replica's work."""
        ...

    async def progress(self) -> Sequence[Progress]:
        """How the replicas that answer come along. Raises Unavailable if there is none."""
        ...


class Replicas:
    """An application behind a Ray Serve DeploymentHandle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._unary = handle.options(method_name="edge_unary")
        self._stream = handle.options(method_name="edge_stream", stream=True)

    async def unary(self, method: str, request: bytes, ticket: Ticket) -> bytes:
        """See Backend.unary."""
        with _typed(), _cancelling(self._unary.remote(method, request, ticket)) as response:
            return _answer(await response)

    async def stream(self, method: str, request: bytes, ticket: Ticket) -> AsyncIterator[bytes]:
        """See Backend.stream."""
        with _typed(), _cancelling(self._stream.remote(method, request, ticket)) as response:
            async for found in response:
                for message in _answer(found):
                    yield message

    async def progress(self) -> Sequence[Progress]:
        """See Backend.progress. One that hangs holds up no other, and is left out."""
        try:
            # `results_async` would wait for all of them or have none.
            calls = self._handle.broadcast("edge_progress")._fetch_replica_results_async()
            results = await asyncio.wait_for(calls, _ANSWER_WITHIN_S)
        except DeploymentUnavailableError:
            raise Unavailable("no replica runs") from None
        except (RayError, TimeoutError) as error:
            log.info("no replica can be asked reason=%s", error)
            return ()
        answers = (asyncio.wait_for(result.get_async(), _ANSWER_WITHIN_S) for result in results)
        found = await asyncio.gather(*answers, return_exceptions=True)
        return [one for one in found if isinstance(one, Progress)]


def _answer(found: A | GptMoeError) -> A:
    """Raises what the replica refused with: it hands errors over as values."""
    if isinstance(found, GptMoeError):
        raise found
    return found


@contextmanager
def _cancelling(response: Any) -> Iterator[Any]:
    """Whoever leaves early takes the replica's work along: a handle does not do that by itself."""
    try:
        yield response
    except (GeneratorExit, asyncio.CancelledError):
        response.cancel()
        raise


@contextmanager
def _typed() -> Iterator[None]:
    """Errors of Ray, and of its way to a replica, as ours."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ReplicaLost("the replica gave the request up") from None
    except RayTaskError as error:
        if isinstance(error.cause, GptMoeError):
            raise error.cause from None
        raise
    except BackPressureError as error:
        raise Overloaded(
            "too many requests wait already; come again later", error.retry_after_s or 1.0
        ) from None
    except DeploymentUnavailableError:
        raise NoReplica("the application does not run; ask its operator", 10.0) from None
    except (RayError, grpc.aio.AioRpcError) as error:  # gRPC's: between the edge and a replica
        log.warning("a replica is lost reason=%s", error)
        raise ReplicaLost("the replica that worked on it is gone") from None
