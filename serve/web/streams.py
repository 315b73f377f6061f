"""Deltas on their way to HTTP: gathered into answers, or sent as server-sent events.

A caller who leaves ends the work for him, whether he waits for an answer or for the next event.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from itertools import groupby
from typing import Any, TypeVar

import pydantic
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gptmoe.errors import GptMoeError
from gptmoe.generate.delta import Delta, merge
from serve.service import Call, Service

T = TypeVar("T")

Placed = tuple[int, Delta]
"""The place of a call among those that were asked together, and what is new of it."""


def gather(deltas: Iterable[Delta]) -> list[Delta]:
    """The deltas of one call as one per answer, by index."""
    by_index = sorted(deltas, key=lambda delta: delta.index)  # stable: an answer keeps its order
    return [merge(list(group)) for _, group in groupby(by_index, key=lambda delta: delta.index)]


async def together(service: Service, calls: Sequence[Call]) -> AsyncGenerator[Placed, None]:
    """What the service says of all calls, as it comes; one call's error ends them all."""
    arrived: asyncio.Queue[Placed | asyncio.Task[None]] = asyncio.Queue()

    async def listen(place: int, call: Call) -> None:
        async with aclosing(service.stream(call)) as deltas:
            async for delta in deltas:
                arrived.put_nowait((place, delta))

    tasks = [asyncio.create_task(listen(place, call)) for place, call in enumerate(calls)]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, asyncio.Task):
                item.result()
                running -= 1
            else:
                yield item
    finally:
        await _end(*tasks)


async def collected(service: Service, calls: Sequence[Call]) -> list[list[Delta]]:
    """The answers to each call."""
    found: list[list[Delta]] = [[] for _ in calls]
    async with aclosing(together(service, calls)) as stream:
        async for place, delta in stream:
            found[place].append(delta)
    return [gather(deltas) for deltas in found]


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`; cancel it and raise ClientDisconnect when the caller leaves.

    The request's body must have been read: what `receive` brings after it is that he left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _end(working, leaving)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def event(data: pydantic.BaseModel) -> str:
    """One server-sent event."""
    return f"data: {data.model_dump_json()}\n\n"


async def answer_events(
    receive: Receive,
    events: AsyncGenerator[str, None],
    explain: Callable[[GptMoeError], str],
) -> Response:
    """Answer with `events`, once there is one: an error before it becomes a status.

    An error after it becomes the last event, as `explain` words it.
    """
    first = await while_connected(receive, anext(events))
    return _EventStream(first, events, explain)


class _EventStream(Response):
    """Closes `events` when it ends, for whatever reason: their work ends with it.

    Not Starlette's StreamingResponse: anyio cancels a task only where it finds it waiting, so one
    whose next event is always there already would be sent to nobody for ever.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: str, events: AsyncGenerator[str, None], explain: Callable[[GptMoeError], str]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._sent = _joined(first, events, explain)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events), aclosing(self._sent):
            with suppress(ClientDisconnect):
                await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for each in self._sent:
            body = each.encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _joined(
    first: str, rest: AsyncIterable[str], explain: Callable[[GptMoeError], str]
) -> AsyncGenerator[str, None]:
    yield first
    try:
        async for each in rest:
            yield each
    except GptMoeError as error:
        yield explain(error)
