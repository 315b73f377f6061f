"""What is asked of an engine that has failed, or fails by it, comes back."""

from typing import Any

import pytest

from gptmoe.errors import ClusterError
from serve.bridge import EngineThread

from .told import run


@pytest.mark.parametrize("stopped", [False, True])
def test_an_engine_that_has_failed_answers_at_once(
    bridge: EngineThread, engine: Any, make_request: Any, stopped: bool
) -> None:
    async def ask() -> bool:
        stream = bridge.stream(make_request(max_new_tokens=10**9))
        await anext(stream)
        engine.breaks = True
        with pytest.raises(ClusterError, match="has stopped"):
            [delta async for delta in stream]
        return await bridge.abort("a")

    if stopped:
        bridge.stop()
        assert not run(bridge.abort("a"))
    else:
        assert not run(ask())
    made: list[bool] = []
    bridge.between_steps(lambda: made.append(True)).result(5)
    assert made


def test_a_bug_between_steps_reaches_who_asked(bridge: EngineThread) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bridge.between_steps(bug).result(5)
    bridge.stop()
    with pytest.raises(ZeroDivisionError):
        bridge.between_steps(bug).result(5)
