"""Callers of a served model: one at a time, many together, more than it can answer."""

import asyncio
import itertools
import random
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.client import AsyncClient, Client, GenerationError

NEW_TOKENS = 48
LINES = ("春风又绿江南岸", "明月何时照我还", "白日依山尽", "黄河入海流", "千山鸟飞绝", "万径人踪灭")
LENGTHS = (1, 4, 9, 16)
"""Lines of a prompt, where there are several lengths."""

_numbers = itertools.count()


@dataclass(slots=True)
class Found:
    """What callers met with."""

    seconds: float
    asked: int = 0
    answered: int = 0
    tokens: int = 0
    refused: int = 0
    failed: int = 0
    alive: bool = True


@dataclass(frozen=True, slots=True)
class FirstToken:
    """How long one took."""

    seconds: float
    """From the call."""
    in_engine_s: float
    """Of them, as the engine says."""


def prompt(lines: int = 4) -> str:
    """One that no request had before: nothing of it is in the prefix cache but by chance."""
    number = next(_numbers)
    chosen = random.Random(number).choices(LINES, k=lines)
    return f"{number}。{'，'.join(chosen)}。"


def caller_of_one(target: str) -> Callable[[], FirstToken]:
    """One call after another, each with a prompt of its own."""
    client = Client(target)

    def act() -> FirstToken:
        began_s = time.perf_counter()
        stream = client.stream(prompt(), max_new_tokens=1, temperature=0.0, ignore_end=True)
        first = next(stream)
        seconds = time.perf_counter() - began_s
        stream.close()
        return FirstToken(seconds, first.timings.first_token_s)

    return act


def caller_of_many(target: str, together: int) -> Callable[[], float]:
    """Tokens a second of streams that run together."""

    async def streams() -> int:
        async with AsyncClient(target) as client:
            streams = [_stream(client, prompt(), NEW_TOKENS) for _ in range(together)]
            return sum(await asyncio.gather(*streams))

    def act() -> float:
        began_s = time.perf_counter()
        return asyncio.run(streams()) / (time.perf_counter() - began_s)

    return act


async def closed_loop(target: str, together: int, seconds: float) -> Found:
    """Each caller asks again as soon as it is answered."""
    found, ends_s = Found(seconds), time.monotonic() + seconds

    async def caller(client: AsyncClient) -> None:
        while time.monotonic() < ends_s:
            await _ask(client, found)

    async with AsyncClient(target) as client:
        began_s = time.monotonic()
        await asyncio.gather(*[caller(client) for _ in range(together)])
        found.seconds = time.monotonic() - began_s
    return found


async def open_loop(target: str, rate: float, seconds: float, http: str) -> Found:
    """Callers come at random, whether others were answered or not."""
    found, chance = Found(seconds), random.Random(0)
    async with AsyncClient(target) as client:
        began_s = time.monotonic()
        watch = asyncio.create_task(_watch(http, found))
        tasks = []
        while time.monotonic() - began_s < seconds:
            tasks.append(asyncio.create_task(_ask(client, found)))
            await asyncio.sleep(chance.expovariate(rate))
        await asyncio.gather(*tasks)
        found.seconds = time.monotonic() - began_s
        watch.cancel()
    return found


async def many(target: str, requests: int, together: int = 16) -> None:
    """So many requests of four prompt lengths, all answered."""
    left = iter(range(requests))

    async def caller(client: AsyncClient) -> None:
        for number in left:
            lines = LENGTHS[number % len(LENGTHS)]
            await client.generate(prompt(lines), max_new_tokens=8, temperature=0.0, ignore_end=True)

    async with AsyncClient(target) as client:
        await asyncio.gather(*[caller(client) for _ in range(together)])


def replica_pid() -> int:
    """Of the only replica."""
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", "serve")
    details: Any = ray.get(controller.get_serve_instance_details.remote())
    (application,) = details["applications"].values()
    (replica,) = application["deployments"]["Generator"]["replicas"]
    return int(replica["pid"])


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/{pid}/status has no VmRSS")


async def _stream(client: AsyncClient, asked: str, new_tokens: int) -> int:
    tokens = 0
    async for chunk in client.stream(
        asked, max_new_tokens=new_tokens, temperature=0.0, ignore_end=True
    ):
        tokens += len(chunk.token_ids)
    return tokens


async def _ask(client: AsyncClient, found: Found) -> None:
    """With answers of several lengths: callers whose answers end together would also begin
    together, and prompts computed together take less time than those of random arrivals."""
    found.asked += 1
    new_tokens = random.Random(found.asked).randint(NEW_TOKENS // 2, NEW_TOKENS * 3 // 2)
    try:
        tokens = await _stream(client, prompt(), new_tokens)  # others add to the sum meanwhile
        found.tokens += tokens
        found.answered += 1
    except GenerationError as error:
        if error.code == "RESOURCE_EXHAUSTED":
            found.refused += 1
        else:
            found.failed += 1


async def _watch(http: str, found: Found) -> None:
    """Ask for liveness each second."""

    def alive() -> bool:
        try:
            with urllib.request.urlopen(f"{http}/healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    while True:
        found.alive &= await asyncio.to_thread(alive)
        await asyncio.sleep(1)
