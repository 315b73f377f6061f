"""Callers that leave in every way, over real gRPC and a real engine: nothing of them is left."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

import gptmoe
from gptmoe.generate.engine import Engine
from gptmoe.generate.scheduler import EngineConfig
from protos import generation_pb2 as messages
from protos import generation_pb2_grpc as services
from serve.service import Service
from tests import small_model

from .grpc_server import serving
from .small_service import served

REQUESTS = 1000
AT_ONCE = 12
WAYS = ("stays", "cancels", "disconnects", "deadline", "hurries", "aborts")
OFTEN = (
    "stays OK",
    "cancels CANCELLED",
    "disconnects OK",
    "hurries DEADLINE_EXCEEDED",
    "deadline DEADLINE_EXCEEDED",
    "aborts OK",
)
FINE = {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "NOT_FOUND"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> gptmoe.LoadedModel:
    folder = tmp_path_factory.mktemp("run")
    return gptmoe.load(small_model.write(folder, num_layers=2, d_model=32))


@pytest.fixture
def engine(model: gptmoe.LoadedModel) -> Engine:
    return model.engine(EngineConfig(max_batch_size=4, max_queue=6, token_budget=64))


@pytest.fixture
def service(model: gptmoe.LoadedModel, engine: Engine) -> Iterator[Service]:
    with served(model, engine) as service:
        yield service


def asked(chance: random.Random, way: str, number: int) -> messages.GenerateRequest:
    """A request of some length; a named one if it is to be aborted."""
    prompt = "春风又绿江南岸，" * chance.choice([1, 1, 2, 8])
    request = messages.GenerateRequest(
        prompt=prompt, max_new_tokens=chance.randint(1, 30), seed=number
    )
    if way == "deadline":
        request.deadline_ms = chance.randint(1, 120)
    if way in ("aborts", "disconnects"):
        request.request_id = f"{way}-{number}"
    if chance.random() < 0.2:
        request.n = 2
    return request


async def one(target: str, shared: Any, chance: random.Random, number: int) -> str:
    """One caller, from asking to leaving; says how, and the status that it saw."""
    way = chance.choice(WAYS)
    request = asked(chance, way, number)
    channel = grpc.aio.insecure_channel(target) if way == "disconnects" else shared
    stub: Any = services.GenerationStub(channel)
    timeout_s = chance.uniform(0.001, 0.12) if way == "hurries" else 60
    unary = way in ("deadline", "hurries", "cancels") and chance.random() < 0.5
    patience = chance.randint(0, 12)
    try:
        if unary:
            task = stub.Generate(request, timeout=timeout_s)
            if way == "cancels":
                await asyncio.sleep(patience / 100)
                task.cancel()
            await task
            return f"{way} OK"
        call = stub.GenerateStream(request, timeout=timeout_s)
        async for _ in call:
            patience -= 1
            if patience < 0 and way == "aborts":
                await stub.Abort(messages.AbortRequest(request_id=request.request_id))
                patience = 10**9
            elif patience < 0 and way == "cancels":
                call.cancel()
            elif patience < 0 and way == "disconnects":
                break
    except grpc.aio.AioRpcError as error:
        return f"{way} {error.code().name}"
    except asyncio.CancelledError:
        return f"{way} CANCELLED"
    finally:
        if way == "disconnects":
            await channel.close(None)
    return f"{way} OK"


async def everyone(service: Service) -> Counter[str]:
    chance = random.Random(7)
    places = asyncio.Semaphore(AT_ONCE)
    async with serving(service) as target, grpc.aio.insecure_channel(target) as shared:

        async def placed(number: int) -> str:
            async with places:
                return await one(target, shared, random.Random(chance.random()), number)

        return Counter(await asyncio.gather(*map(placed, range(REQUESTS))))


async def answer(service: Service) -> str:
    async with serving(service) as target, grpc.aio.insecure_channel(target) as channel:
        stub: Any = services.GenerationStub(channel)
        request = messages.GenerateRequest(prompt="春风", seed=7, max_new_tokens=20)
        return str((await stub.Generate(request)).text)


def test_a_thousand_leavers_leave_the_pool_empty(
    service: Service, engine: Engine, wait_until: Any, model: gptmoe.LoadedModel
) -> None:
    expected = model.generate("春风", seed=7, max_new_tokens=20)
    assert asyncio.run(answer(service)) == expected
    seen = asyncio.run(everyone(service))
    assert seen.total() == REQUESTS
    assert {outcome.split()[1] for outcome in seen} <= FINE
    for outcome in OFTEN:
        assert seen[outcome] > 20, seen
    wait_until(lambda: not engine.has_work)
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert engine.stats.kv_used_blocks == 0
    service.check(stall_s=10)
    assert asyncio.run(answer(service)) == expected
