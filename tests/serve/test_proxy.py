"""What the gRPC proxy's streams do when their caller leaves."""

import asyncio
from collections.abc import AsyncIterator
from unittest.mock import Mock

import pytest

from serve.proxy import cancellable


class Peer:
    """A call's context: who called, until the call is over."""

    def __init__(self) -> None:
        self.over = False

    def peer(self) -> str:
        assert not self.over, "asked after the call"
        return "ipv4:127.0.0.1:1"


class Replica:
    """A streaming behavior: one message, then a wait that only cancelling ends."""

    def __init__(self) -> None:
        self.waits, self.left = asyncio.Event(), asyncio.Event()

    async def stream(self, _: object, context: Peer) -> AsyncIterator[bytes]:
        yield b"one"
        self.waits.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert context.peer() == "ipv4:127.0.0.1:1"  # the proxy logs it at the end
            self.left.set()
            raise


def test_leaving_while_a_message_is_sent_is_heard() -> None:
    """The proxy is at its own `yield` then, where nothing waits for the replica."""

    async def leave() -> None:
        replica, peer = Replica(), Peer()
        stream = cancellable(replica.stream)(b"", peer)
        assert await anext(stream) == b"one"
        await replica.waits.wait()  # the next message is asked for before this one is sent
        peer.over = True
        await stream.aclose()
        await asyncio.wait_for(replica.left.wait(), 5)

    asyncio.run(leave())


def test_leaving_while_waiting_is_heard() -> None:
    async def leave() -> None:
        replica = Replica()

        async def read() -> None:
            async for _ in cancellable(replica.stream)(b"", Peer()):
                pass

        call = asyncio.create_task(read())
        await replica.waits.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(replica.left.wait(), 5)

    asyncio.run(leave())


def test_messages_and_errors_pass_in_order() -> None:
    async def behavior(request: int, context: Mock) -> AsyncIterator[int]:
        context.set_code("code")
        for number in range(request):
            yield number
        raise ValueError("at the end")

    async def read() -> None:
        context = Mock()
        stream = cancellable(behavior)(3, context)
        assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="at the end"):
            await anext(stream)
        context.set_code.assert_called_once_with("code")

    asyncio.run(read())
