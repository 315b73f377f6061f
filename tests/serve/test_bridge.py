"""The engine's thread between an engine and asyncio."""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest

from gptmoe.errors import CheckpointError, ClusterError, Overloaded
from gptmoe.generate.request import Request
from serve.bridge import EngineThread

Make = Callable[..., Request]

ENDLESS = 10**9
"""Tokens."""


def run(task: Any) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await task

    return asyncio.run(bounded())


async def text_of(bridge: EngineThread, request: Request) -> str:
    return "".join([delta.text async for delta in bridge.stream(request)])


def test_a_stream_brings_each_delta_and_ends_with_a_reason(
    bridge: EngineThread, make_request: Make
) -> None:
    async def collect() -> list[Any]:
        return [delta async for delta in bridge.stream(make_request())]

    deltas = run(collect())
    assert "".join(delta.text for delta in deltas) == "一二三"
    assert [delta.finish_reason for delta in deltas][-1] == "length"
    assert not any(delta.finish_reason for delta in deltas[:-1])


def test_the_first_token_comes_at_once_and_the_end_waits_for_nothing(
    bridge: EngineThread, make_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.bridge.SMOOTH_S", 100.0)  # more than a test may take

    async def collect() -> list[Any]:
        return [delta async for delta in bridge.stream(make_request(max_new_tokens=9))]

    first, *rest = run(collect())
    assert first.token_ids[:1] == (ord("一"),)
    assert len(rest) <= 1, "what came while it waited comes together"
    assert first.text + "".join(delta.text for delta in rest) == "一二三四五六七八九"
    assert [*first.token_ids, *(t for d in rest for t in d.token_ids)] == [
        ord(character) for character in "一二三四五六七八九"
    ]


def test_an_error_waits_for_nothing(
    engine: Any, bridge: EngineThread, make_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.bridge.SMOOTH_S", 100.0)

    async def broken_off() -> None:
        async with aclosing(bridge.stream(make_request(max_new_tokens=ENDLESS))) as stream:
            await anext(stream)
            engine.breaks = True
            await anext(stream)  # what came before the error
            await anext(stream)

    with pytest.raises(ClusterError, match="has stopped"):
        run(broken_off())


def test_a_stream_waits_between_its_deltas(
    bridge: EngineThread, make_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.bridge.SMOOTH_S", 0.1)

    async def times_s() -> list[float]:
        async with aclosing(bridge.stream(make_request(max_new_tokens=ENDLESS))) as stream:
            found = []
            async for _ in stream:
                found.append(time.monotonic())
                if len(found) == 4:
                    return found
        raise AssertionError("it never ends")

    assert all(after - before > 0.09 for before, after in pairwise(run(times_s())))


def test_streams_are_smoother_where_more_cores_compute(
    engine: Any, make_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.bridge.SMOOTH_S", 0.0)

    def send_every_s(cores: int) -> float:
        bridge = EngineThread(engine, cores=cores)

        async def between_two() -> float:
            async with aclosing(bridge.stream(make_request(max_new_tokens=ENDLESS))) as stream:
                await anext(stream)
                return bridge.send_every_s

        try:
            return run(between_two())
        finally:
            bridge.stop()

    assert send_every_s(2) == pytest.approx(4 * send_every_s(8)) != 0


def test_many_streams_share_the_engine(bridge: EngineThread, make_request: Make) -> None:
    async def both() -> list[str]:
        calls = [text_of(bridge, make_request(f"{n}", max_new_tokens=n)) for n in range(1, 9)]
        return await asyncio.gather(*calls)

    texts = run(both())
    assert texts == ["一二三四五六七八"[:n] for n in range(1, 9)]


def test_streams_of_several_event_loops(bridge: EngineThread, make_request: Make) -> None:
    for _ in range(3):
        assert run(text_of(bridge, make_request())) == "一二三"


def test_leaving_a_stream_early_aborts_the_request(
    bridge: EngineThread, engine: Any, make_request: Make, wait_until: Any
) -> None:
    async def leave() -> None:
        async with aclosing(bridge.stream(make_request(max_new_tokens=10**9))) as deltas:
            async for _ in deltas:
                break

    run(leave())
    wait_until(lambda: engine.aborted == ["a"])
    assert not engine.has_work


def test_cancelling_a_task_aborts_the_request(
    bridge: EngineThread, engine: Any, make_request: Make, wait_until: Any
) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(text_of(bridge, make_request(max_new_tokens=10**9)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancel())
    wait_until(lambda: engine.aborted == ["a"])


def test_a_finished_stream_aborts_nothing(
    bridge: EngineThread, engine: Any, make_request: Make
) -> None:
    run(text_of(bridge, make_request()))
    bridge.stop()
    assert engine.aborted == []


def test_a_full_engine_refuses_until_there_is_room(
    bridge: EngineThread, engine: Any, make_request: Make, wait_until: Any
) -> None:
    async def fill() -> None:
        streams = [bridge.stream(make_request(str(n), 10**9)) for n in range(engine.capacity)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Overloaded) as refusal:
            await anext(bridge.stream(make_request("late")))
        assert refusal.value.retry_after_s == 1.5
        for stream in streams:
            await stream.aclose()

    run(fill())
    wait_until(lambda: not engine.has_work)
    assert "late" not in engine.aborted
    assert run(text_of(bridge, make_request("after"))) == "一二三"


def test_random_leaving_leaves_nothing_behind(
    bridge: EngineThread, engine: Any, make_request: Make, wait_until: Any
) -> None:
    chance = random.Random(7)

    async def one(number: int) -> None:
        stream = bridge.stream(make_request(str(number), max_new_tokens=chance.randint(1, 20)))
        async with aclosing(stream) as deltas:
            patience = chance.randint(0, 15)
            try:
                async for _ in deltas:
                    patience -= 1
                    if patience < 0:
                        break
            except Overloaded:
                await asyncio.sleep(0.001)

    async def many() -> None:
        tasks = [asyncio.create_task(one(number)) for number in range(300)]
        for task in chance.sample(tasks, 100):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(many())
    wait_until(lambda: not engine.has_work)
    bridge.check(stall_s=1)
    assert run(text_of(bridge, make_request())) == "一二三"


def test_a_failing_engine_ends_every_stream_and_the_health(
    bridge: EngineThread, engine: Any, make_request: Make, wait_until: Any
) -> None:
    async def fail() -> list[Any]:
        engine.gate.clear()
        tasks = [asyncio.create_task(text_of(bridge, make_request(n))) for n in "abc"]
        await asyncio.to_thread(engine.in_step.wait, 5)
        engine.breaks = True
        engine.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    for error in run(fail()):
        assert isinstance(error, ClusterError)
        assert "engine has stopped; send the request again" in str(error)
    with pytest.raises(ClusterError, match="engine has stopped"):
        bridge.check(stall_s=1)
    with pytest.raises(ClusterError, match="engine has stopped"):
        run(text_of(bridge, make_request("later")))


def test_health_knows_a_stuck_step_from_an_idle_engine(
    bridge: EngineThread, engine: Any, make_request: Make, wait_until: Any
) -> None:
    bridge.check(stall_s=1e-9)  # idle, however long

    async def stick() -> None:
        engine.gate.clear()
        task = asyncio.create_task(text_of(bridge, make_request()))
        await asyncio.to_thread(engine.in_step.wait, 5)
        bridge.check(stall_s=60)
        with pytest.raises(ClusterError, match="one step for over 1e-09 s; restart the replica"):
            bridge.check(stall_s=1e-9)
        engine.gate.set()
        await task

    run(stick())
    bridge.check(stall_s=1e-9)


def test_stopping_ends_running_streams(
    bridge: EngineThread, engine: Any, make_request: Make
) -> None:
    async def stop() -> None:
        stream = bridge.stream(make_request(max_new_tokens=10**9))
        await anext(stream)
        await asyncio.to_thread(bridge.stop)
        with pytest.raises(ClusterError, match="engine has stopped"):
            [delta async for delta in stream]

    run(stop())


def test_who_leaves_while_he_waits_for_an_abort_does_not_harm_the_engine(
    bridge: EngineThread, engine: Any, make_request: Make
) -> None:
    async def scenario() -> list[str]:
        stream = bridge.stream(make_request(max_new_tokens=10**9))
        await anext(stream)
        engine.gate.clear()
        engine.in_step.clear()
        await asyncio.to_thread(engine.in_step.wait)  # now no command is obeyed
        abort = asyncio.create_task(bridge.abort("a"))
        await asyncio.sleep(0.01)
        abort.cancel()
        await asyncio.gather(abort, return_exceptions=True)
        engine.gate.set()
        assert (await anext(stream)).token_ids, "the engine goes on"
        await stream.aclose()
        bridge.check(10.0)
        return [delta.finish_reason async for delta in bridge.stream(make_request("b"))]

    assert run(scenario())[-1] == "length"


def test_a_caller_whose_loop_is_gone_does_not_harm_the_engine(
    bridge: EngineThread, engine: Any, make_request: Make
) -> None:
    loop = asyncio.new_event_loop()
    stream = bridge.stream(make_request("gone", max_new_tokens=50))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert run(text_of(bridge, make_request())) == "一二三"
    del stream


def test_a_request_that_cannot_go_on_leaves_the_others_alone(
    bridge: EngineThread, engine: Any, make_request: Make
) -> None:
    engine.spoilt.add("bad")

    async def ask() -> tuple[str, str]:
        good = asyncio.create_task(text_of(bridge, make_request("good")))
        with pytest.raises(CheckpointError) as caught:
            await text_of(bridge, make_request("bad"))
        return await good, str(caught.value)

    assert run(ask()) == ("一二三", "no numbers")
    bridge.check(stall_s=10.0)
    assert run(text_of(bridge, make_request("bad2"))) == "一二三"
