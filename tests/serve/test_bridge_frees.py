"""Who leaves frees slot and cache within two steps, through the thread of a real engine."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gptmoe.generate.engine import Engine
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.plan import StepPlan
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.text import load_tokenizer
from serve.bridge import EngineThread
from tests.gptmoe.generate.counting import FIRST, Clock, Counting

CORPUS = Path(__file__).parents[2] / "configs" / "corpus"
CONTEXT = 64
WITHIN_S = 10.0


class Gated(Counting):
    """Computes a step when the test says so."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.running: list[str] = []
        """Requests of the step under way."""

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        self.running = sorted(span.key.partition("/")[2] for span in plan.spans)
        self.begun.release()
        assert self.go.acquire(timeout=WITHIN_S)
        return super().run(plan, tokens)

    async def until_in_step(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=WITHIN_S)


class Scene:
    """Two requests have the slots and one waits for its turn; a step is under way."""

    def __init__(self) -> None:
        tokenizer = load_tokenizer(CORPUS)
        self.executor, self.clock = Gated(tokenizer.vocab_size), Clock()
        config = EngineConfig(max_batch_size=2, kv_tokens=2 * CONTEXT)
        self.engine = Engine(self.executor, tokenizer, CONTEXT, config, self.clock)
        self.bridge = EngineThread(self.engine)
        self.tasks = dict[str, asyncio.Task[list[str]]]()

    async def begin(self) -> None:
        for name in ("leaves", "stays", "waits"):
            self.tasks[name] = asyncio.create_task(self.ask(name))
            if name == "leaves":
                await self.executor.until_in_step()
        await asyncio.sleep(0)  # both are in the inbox
        await self.step()
        await self.step()

    async def ask(self, name: str) -> list[str]:
        sampling = SamplingParams(temperature=0, max_new_tokens=30, ignore_end=True)
        deadline_s = self.clock.now_s + 50 if name == "leaves" else None
        request = Request(name, (FIRST,) * 20, sampling, deadline_s=deadline_s)
        return [delta.finish_reason async for delta in self.bridge.stream(request)]

    async def step(self) -> list[str]:
        """Let the step that is under way end, and the next one begin; who is in that one."""
        self.executor.go.release()
        await self.executor.until_in_step()
        return self.executor.running

    async def end(self) -> None:
        self.executor.go.release(1000)
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.executor.go.release(1000)
    scene.bridge.stop()


async def disconnect(scene: Scene) -> None:
    task = scene.tasks["leaves"]
    task.cancel()
    await asyncio.wait([task])


async def abort(scene: Scene) -> None:
    task = asyncio.create_task(scene.bridge.abort("leaves"))
    scene.tasks["abort"] = task  # type: ignore[assignment]
    await asyncio.sleep(0)  # it is in the inbox


async def be_late(scene: Scene) -> None:
    scene.clock.now_s += 50


@pytest.mark.parametrize("leave", [disconnect, abort, be_late])
def test_who_leaves_in_the_middle_of_a_step_is_gone_within_two(
    scene: Scene, leave: Callable[[Scene], Any]
) -> None:
    async def story() -> list[list[str]]:
        await scene.begin()
        assert scene.executor.running == ["leaves", "stays"]
        blocks = scene.engine.stats.kv_used_blocks
        await leave(scene)
        running = [await scene.step(), await scene.step()]
        assert scene.engine.stats.kv_used_blocks == blocks == 4  # two each
        await scene.end()
        return running

    async def bounded() -> list[list[str]]:
        async with asyncio.timeout(6 * WITHIN_S):
            return await story()

    assert asyncio.run(bounded())[-1] == ["stays", "waits"]
    assert scene.engine.stats.kv_used_blocks == 0
    assert not scene.engine.has_work
