"""What a replica hands to the edge in one piece."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from gptmoe.errors import Overloaded
from protos import generation_pb2 as messages
from serve.edge.inlet import Inlet
from serve.names import ALONE


class Replica(Inlet):
    """Streams these: a text, seconds to wait, or an error."""

    def __init__(self, *script: str | float | Exception) -> None:
        self.script = script
        self.closed = False

    async def GenerateStream(
        self, request: bytes, context: Any
    ) -> AsyncIterator[messages.GenerateChunk]:
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, str):
                    yield messages.GenerateChunk(text=item)
                else:
                    await asyncio.sleep(item)
        finally:
            self.closed = True


def parcels(replica: Replica) -> list[Any]:
    """Texts in tuples, and an error as it is."""

    async def collect() -> list[Any]:
        return [
            tuple(messages.GenerateChunk.FromString(data).text for data in found)
            if isinstance(found, tuple)
            else found
            async for found in replica.edge_stream("GenerateStream", b"", ALONE)
        ]

    return asyncio.run(collect())


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (("header", "春", "风", "。"), [("header", "春"), ("风",), ("。",)]),
        (("header", 0.05, "春", "风"), [("header",), ("春",), ("风",)]),
        ((0.05, "header", "春"), [("header", "春")]),
        (("header",), [("header",)]),
    ],
)
def test_a_first_token_that_is_there_goes_with_its_header(
    script: tuple[Any, ...], expected: list[Any]
) -> None:
    assert parcels(Replica(*script)) == expected


@pytest.mark.parametrize("before", [(), ("header",), ("header", 0.05), ("header", "春")])
def test_what_came_before_an_error_is_told_first(before: tuple[Any, ...]) -> None:
    error = Overloaded("come again", 1.0)
    *told, last = parcels(Replica(*before, error))
    assert last is error
    assert "".join(text for parcel in told for text in parcel) == "".join(
        item for item in before if isinstance(item, str)
    )


@pytest.mark.parametrize("count", [1, 2])
def test_leaving_closes_the_stream(count: int) -> None:
    replica = Replica("header", 0.01 if count == 2 else 60.0, "春", 60.0)

    async def leave() -> None:
        async with aclosing(replica.edge_stream("GenerateStream", b"", ALONE)) as found:
            for _ in range(count):
                await anext(found)
        assert replica.closed

    asyncio.run(asyncio.wait_for(leave(), 10))
