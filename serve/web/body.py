"""Bodies of requests, read whole before anybody acts on them, and not for ever.

Whoever sends half of a body holds one of the places that Ray Serve lets requests through to a
replica, health checks included. So few may take their time, and the rest must send at once.
"""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

WITHIN_S = 30.0
"""For a body to arrive, while few others are on their way."""
CROWDED_S = 1.0
"""The same while many are."""
MANY = 32


class Bodies:
    """Those of one replica."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._arriving = 0

    def check(self, size_bytes: int) -> None:
        """Raise HTTPException for more than a body may have."""
        most = self._max_bytes
        if size_bytes > most:
            raise HTTPException(413, f"the body must have at most {most} bytes; send less text")

    async def read(self, receive: Receive) -> Receive | None:
        """The same as `receive`, with the whole body at once; None if its caller has left.

        Raises HTTPException for a body that is too large, or too slow.
        """
        within_s = CROWDED_S if self._arriving >= MANY else WITHIN_S
        self._arriving += 1
        try:
            async with asyncio.timeout(within_s):
                body = await self._whole(receive)
        except TimeoutError:
            raise HTTPException(
                408, f"the body must arrive within {within_s:g} s; send the request again"
            ) from None
        finally:
            self._arriving -= 1
        return None if body is None else _first({"type": "http.request", "body": body}, receive)

    async def _whole(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            self.check(len(body))
            if not message.get("more_body", False):
                return bytes(body)


def _first(message: Message, rest: Receive) -> Receive:
    """`rest` behind one message."""
    waiting: list[Message] = [message]

    async def receive() -> Message:
        return waiting.pop() if waiting else await rest()

    return receive
