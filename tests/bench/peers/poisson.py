"""Requests that come at random times, and how long each waited. Standard library only."""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import shape

PROMPTS = (16, 32, 64, 128)
"""Tokens of a prompt, in turns."""
NEW = 32
"""Tokens of each answer."""

Stream = Callable[[str, list[int], int], AsyncIterator[int]]
"""(request id, prompt, new tokens) -> how many tokens came, each time that some came."""


def schedule(rate: float, seconds: float, seed: int) -> list[tuple[float, list[int]]]:
    """When each request comes (seconds from the start), and its prompt; no two begin alike."""
    chance, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + chance.expovariate(rate)) < seconds:
        length = PROMPTS[len(found) % len(PROMPTS)]
        found.append((at_s, [chance.randrange(shape.VOCABULARY) for _ in range(length)]))
    return found


async def waits(stream: Stream, requests: Sequence[tuple[float, list[int]]]) -> dict[str, Any]:
    """Of each request: seconds to its first token, and from there to each further one.

    Both are infinite for one that was refused: no token came.
    """
    began_s = time.perf_counter()

    async def one(number: int, at_s: float, prompt: list[int]) -> tuple[float, float]:
        await asyncio.sleep(began_s + at_s - time.perf_counter())
        first_s, tokens = 0.0, 0
        async for count in stream(f"{began_s}-{number}", prompt, NEW):
            first_s = first_s or time.perf_counter() - began_s
            tokens += count
        if not tokens:
            return math.inf, math.inf
        assert tokens == NEW, tokens
        ended_s = time.perf_counter() - began_s
        return first_s - at_s, (ended_s - first_s) / (NEW - 1)

    tasks = [one(number, *request) for number, request in enumerate(requests)]
    found = await asyncio.gather(*tasks)
    return {"waits": found, "seconds": time.perf_counter() - began_s}
